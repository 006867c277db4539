"""Claim: what ToMe saves in operations it saves in time.

Times `stack=["tome"]` in a timm ViT beside the same model without it, interleaved in one run; both
are eager, or both compiled.

    python benchmarks/tome_speed.py --model vit_small_patch16_224 --batch 16 --r 13
    python benchmarks/tome_speed.py --batch 64 --device cuda --dtype bfloat16 --mode compiled
    python benchmarks/tome_speed.py --batch 256 --device cuda --dtype bfloat16 --mode compiled
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timing import describe_machine, time_interleaved
from torch.utils.flop_counter import FlopCounterMode

import adaptok


def count_flops(model: torch.nn.Module, images: torch.Tensor) -> int:
    """Return the operations of one uncompiled call."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        model(images)
    return int(counter.get_total_flops())


def run_with(model: torch.nn.Module, stage: Any, r: int, images: torch.Tensor) -> torch.Tensor:
    """Run the wrapped model with one r."""
    if stage.r != r:
        stage.r = r
    out: torch.Tensor = model(images)
    return out


def make_models(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Make the model as it is and with ToMe, with the same weights."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    plain = timm.create_model(options.model).eval().to(options.device, dtype)
    merging = timm.create_model(options.model).eval().to(options.device, dtype)
    merging.load_state_dict(plain.state_dict())
    proportional = not options.plain_attention
    adaptok.wrap(merging, stack=[{"name": "tome", "proportional": proportional}])
    return plain, merging


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--r", nargs="+", type=int, default=[8, 13])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mode", choices=["eager", "compiled"], default="eager")
    parser.add_argument("--plain-attention", action="store_true", help="sizes do not count")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    plain, merging = make_models(options)
    stage = merging.blocks.adaptok["tome"]
    images = torch.randn(options.batch, 3, *plain.patch_embed.img_size)
    images = images.to(options.device, getattr(torch, options.dtype))
    with torch.inference_mode():
        flops = {"plain": count_flops(plain, images)}
        calls = {"plain": partial(plain, images)}
        for r in options.r:
            calls[f"r={r}"] = partial(run_with, merging, stage, r, images)
            stage.r = r
            flops[f"r={r}"] = count_flops(merging, images)
        if options.mode == "compiled":
            plain.compile()
            adaptok.compile(merging)
            for call in (*calls.values(), *calls.values()):  # graphs are made here
                call()
        times = time_interleaved(calls, options.repeats, torch.device(options.device))
    result = {
        "model": options.model,
        "batch": options.batch,
        "dtype": options.dtype,
        "mode": options.mode,
        "proportional": not options.plain_attention,
        "machine": describe_machine(torch.device(options.device)),
        "gflops": {name: round(count / 1e9, 2) for name, count in flops.items()},
        "ms": {name: round(time.median, 3) for name, time in times.items()},
        "quartiles": {name: [round(t.low, 3), round(t.high, 3)] for name, t in times.items()},
        "saved": {},
    }
    for name in list(calls)[1:]:
        operations = 1 - flops[name] / flops["plain"]
        time = 1 - times[name].median / times["plain"].median
        result["saved"][name] = {
            "flops": round(operations, 4),
            "time": round(time, 4),
            "time_of_flops": round(time / operations, 3) if operations else None,
        }
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
