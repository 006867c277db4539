"""What a wrap costs while it saves nothing: every cell kept, every part run.

`python benchmarks/overhead.py` compares a timm ViT-B/16 with the same model wrapped by
`chunker="dc"` at full budget, interleaved in one run.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
from timing import describe_machine, time_interleaved

import adaptok

LIMIT = 1.03


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    plain = timm.create_model(options.model).eval().to(device)
    wrapped = timm.create_model(options.model).eval().to(device)
    wrapped.load_state_dict(plain.state_dict())
    adaptok.wrap(wrapped, chunker="dc", budget=1.0)
    size = plain.patch_embed.img_size
    images = torch.randn(options.batch, 3, *size, device=device)
    with torch.no_grad():
        assert torch.equal(plain(images), wrapped(images))
        assert_everything_runs(wrapped, images)
        half = adaptok.Budget(keep=0.5)
        calls = {"plain": lambda: plain(images), "wrapped, all kept": lambda: wrapped(images)}

        def run_half() -> torch.Tensor:
            with adaptok.budget(wrapped, keep=half.keep):
                return wrapped(images)

        calls["wrapped, half kept"] = run_half
        times = time_interleaved(calls, options.repeats, device)
    base = times["plain"].median
    result = {
        "model": options.model,
        "batch": options.batch,
        "machine": describe_machine(device),
        "ms": {name: round(value.median, 2) for name, value in times.items()},
        "ratio": {name: round(value.median / base, 4) for name, value in times.items()},
        "limit": LIMIT,
    }
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def assert_everything_runs(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Make sure that router, chunker and dechunker run, and that no cell is left out."""
    seen: list[str] = []
    stage = model.blocks.adaptok["dc"]
    hooks = [
        getattr(stage, name).register_forward_hook(lambda *_, name=name: seen.append(name))
        for name in ("router", "chunker", "dechunker")
    ]
    with adaptok.trace(model) as trace:
        model(images)
    for hook in hooks:
        hook.remove()
    assert seen == ["router", "chunker", "dechunker"], seen
    assert trace.steps[0].kept_share == 1.0


if __name__ == "__main__":
    main()
