"""Claim: a wrapped, compiled ViT is faster than the compiled ViT that a user would otherwise run.

Times `chunker="dc"` in a timm ViT at several budgets beside the same model without it, both
compiled, interleaved in one run, and draws time and FLOPs against tokens.

    python benchmarks/vit_compiled.py --output results/vit-compiled-cpu.json
    python benchmarks/vit_compiled.py --batch 64 --device cuda --dtype bfloat16
"""

import argparse
from pathlib import Path

import timm
import torch

import adaptok


def main() -> None:
    """Measure, print, save and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--budgets", nargs="+", type=float, default=[1.0, 0.7, 0.5, 0.3])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = timm.create_model(options.model).eval().to(options.device, dtype)
    adaptok.wrap(model, chunker="dc", budget=0.5)
    size = model.patch_embed.img_size
    images = torch.randn(options.batch, 3, *size, device=options.device, dtype=dtype)
    report = adaptok.benchmark(
        model, images, options.budgets, repeats=options.repeats, compile=not options.eager
    )
    print(report)
    if options.output:
        report.save(options.output)
    if options.plot:
        figure = adaptok.see.draw_benchmark(report, title=options.model)
        figure.savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()
