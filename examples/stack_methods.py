"""Stack two methods: learned chunking on the grid, then merging between the blocks.

Usage: python examples/stack_methods.py [--output FOLDER] [--keep 0.6] [--size 64]

The ViT has random weights, since no download is needed here: the router is one without weights,
and ToMe merges by keys of attention, which still are alike where patches are alike.
"""

import argparse
from pathlib import Path

import timm
import torch

import adaptok
from adaptok.errors import StackError
from adaptok.see import save_figure, show_tokens
from adaptok.train.data import load_emoji
from adaptok.train.pixels import to_latent

PATCH = 4


def main() -> None:
    """Stack, say in which order and why, draw, and show what is refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder")
    parser.add_argument("--keep", type=float, default=0.6, help="share that each method keeps")
    parser.add_argument("--size", type=int, default=64, help="edge of an image in pixels")
    parser.add_argument("--image", type=int, default=12, help="which emoji")
    options = parser.parse_args()

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=options.size, patch_size=PATCH).eval()
    # the solver finds the order: "dc" needs every grid cell, and stands outside of "tome"
    adaptok.wrap(vit, chunker="dc", router="predictability", stack=["tome"], budget=options.keep)
    order = [stage.name for stage in adaptok.explain(vit).stages]

    emoji = load_emoji(size=options.size, categories=["Animals & Nature"], skin_variants=False)
    pixels = emoji.take([options.image])
    with torch.inference_mode(), adaptok.trace(vit) as trace:
        vit(to_latent(pixels))
    step = trace.steps[0]
    print(f"order {order}: {step.kept.tolist()} of {step.provenance.token.shape[1]} tokens left")
    picture = save_figure(show_tokens(trace, pixels), options.output / "stack.png")
    print(f"see {picture}")

    try:
        adaptok.wrap(adaptok.unwrap(vit), stack=["dc", "hnet", "tome"], budget=options.keep)
    except StackError as refused:
        print(f"refused: {str(refused).splitlines()[0]}")


if __name__ == "__main__":
    main()
