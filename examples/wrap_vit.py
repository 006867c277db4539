"""Wrap a Vision Transformer, see which tokens were kept, and unwrap it again.

Usage: python examples/wrap_vit.py [--output FOLDER] [--keep 0.3] [--size 64]

The weights of this ViT are random, since no download is needed here. A router without weights
(`predictability`: keep what the neighbours do not predict) works on them all the same, because a
random embedding of pixels keeps what differs between patches. With `pretrained=True` the rest of
this file stays as it is.
"""

import argparse
from pathlib import Path

import timm
import torch

import adaptok
from adaptok.see import save_figure, show_tokens
from adaptok.train.data import load_emoji
from adaptok.train.pixels import to_latent

PATCH = 4
SHOWN = "Animals & Nature"


def main() -> None:
    """Wrap, run, draw, unwrap."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder")
    parser.add_argument("--keep", type=float, default=0.3, help="share of the cells to keep")
    parser.add_argument("--size", type=int, default=64, help="edge of an image in pixels")
    parser.add_argument("--image", type=int, default=8, help="which emoji")
    options = parser.parse_args()

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=options.size, patch_size=PATCH).eval()
    emoji = load_emoji(size=options.size, split="test", categories=[SHOWN], skin_variants=False)
    pixels = emoji.take([options.image, options.image + 1])
    images = to_latent(pixels)  # floats in [-1, 1]

    with torch.inference_mode():
        before = vit(images)
        adaptok.wrap(vit, chunker="dc", router="predictability", budget=options.keep)
        with adaptok.trace(vit) as trace:
            vit(images)
    report = adaptok.benchmark(vit, images, budgets=[options.keep], repeats=3, warmup=1)
    (row,), base = report.rows, report.base
    print(f"{trace.steps[0].kept.tolist()} of {report.cells} cells ran")
    print(f"{base.gflops:.2f} -> {row.gflops:.2f} GFLOPs, {base.ms:.0f} -> {row.ms:.0f} ms here")

    picture = save_figure(show_tokens(trace, pixels), options.output / "wrap_vit.png")
    with torch.inference_mode():
        same = torch.equal(adaptok.unwrap(vit)(images), before)
    print(f"unwrapped, it computes the same bits: {same}; see {picture}")


if __name__ == "__main__":
    main()
