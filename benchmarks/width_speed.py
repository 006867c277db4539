"""What running a part of the width saves: milliseconds beside FLOPs, interleaved in one run.

`python benchmarks/width_speed.py` compares a DiT of scale S (patch size 2, latents of 32 x 32) with
the same model wrapped by `stack=["width"]`. The routers are set, not trained: at each step every
block runs the given share of its heads and channel groups, drawn at random, and the MLP runs on the
given share of the tokens.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from adaptok_width import DynamicWidth
from timing import describe_machine, time_interleaved
from torch import Tensor

import adaptok
from adaptok.counting import count_operations
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DiTConfig

STEP = 420.0


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", default="S")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    plain = make_model(options.scale, options.latent)
    calls: dict[str, Callable[[], object]] = {}
    models = {"plain": plain}
    for name, (cut, keep, tabulated) in {
        "width, all on": (False, None, False),
        "heads and channels": (True, None, False),
        "heads and channels, tabulated": (True, None, True),
        "tokens": (False, options.share, False),
        "all three, tabulated": (True, options.share, True),
    }.items():
        model = make_model(options.scale, options.latent)
        model.load_state_dict(plain.state_dict())
        # cut weights of a larger model than S may be larger than the default
        stage = DynamicWidth(gate_tokens=keep is not None, cache_mb=1024.0)
        adaptok.wrap(model, stack=[stage])
        if keep is not None:
            stage.limit_tokens(keep=keep)
        if cut:
            set_widths(stage, options.share)
        models[name] = model
        if tabulated:
            stage.timesteps = (STEP,)
    x = torch.randn(options.batch, 4, options.latent, options.latent, device=device)
    t = torch.full((options.batch,), STEP, device=device)
    y = torch.zeros(options.batch, dtype=torch.long, device=device)
    flops = {}
    with torch.no_grad():
        for name, model in models.items():
            model.to(device, getattr(torch, options.dtype)).eval()
            flops[name] = count(model, x, t, y)
            calls[name] = bind(model, x, t, y)
        times = time_interleaved(calls, options.repeats, device)
    base, ms = flops["plain"], {name: value.median for name, value in times.items()}
    saved = {
        name: (1 - ms[name] / ms["plain"]) / (1 - flops[name] / base)
        for name in models
        if flops[name] < 0.99 * base
    }
    result = {
        "model": f"DiT-{options.scale}/2, latents of {options.latent} x {options.latent}",
        "batch": options.batch,
        "dtype": options.dtype,
        "share": options.share,
        "machine": describe_machine(device),
        "ms": {name: round(value, 2) for name, value in ms.items()},
        "quartiles": {n: [round(v.low, 2), round(v.high, 2)] for n, v in times.items()},
        "gflops": {name: round(value / 1e9, 3) for name, value in flops.items()},
        "time saved / FLOPs saved": {name: round(value, 3) for name, value in saved.items()},
    }
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def make_model(scale: str, latent: int) -> DiT:
    """Return a DiT whose blocks do something: fresh ones are gated to nothing."""
    model = DiT(DiTConfig(scale=scale, latent_size=latent, patch_size=2))
    for parameter in model.blocks.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def set_widths(stage: DynamicWidth, share: float) -> None:
    """Let a share of the heads and channel groups of each block run, the first ones among them."""
    gates = stage.gates
    assert gates is not None
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        gates.step.weight.zero_()
        gates.step.bias.fill_(-1.0)
        for row in gates.step.bias:
            heads = gates.shape.heads - 1
            for part in (row[:heads], row[heads:]):
                on = round(share * (len(part) + 1)) - 1
                part[torch.randperm(len(part), generator=generator)[:on]] = 1.0


def bind(model: DiT, *inputs: Tensor) -> Callable[[], object]:
    """Return a call of a model."""
    return lambda: model(*inputs)


def count(model: DiT, *inputs: Tensor) -> int:
    """Return the operations of a call."""
    with count_operations() as counter:
        model(*inputs)
    return int(counter.get_total_flops())


if __name__ == "__main__":
    main()
