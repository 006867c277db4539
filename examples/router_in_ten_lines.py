"""Write a router in ten lines, check it, and see what it keeps of a real image.

Usage: python examples/router_in_ten_lines.py [--output FOLDER] [--keep 0.25] [--size 64]

The ViT has random weights, since no download is needed here; the router needs none.
"""

import argparse
from pathlib import Path

import timm
import torch

import adaptok
from adaptok.see import save_figure, show_tokens
from adaptok.testing import check_router
from adaptok.train.data import load_emoji
from adaptok.train.pixels import to_latent

PATCH = 4
CHECKS = ["shape", "range", "batch", "identity", "unwrap"]  # a few; leave only= out for all


@adaptok.register_router("contrast")
class ContrastRouter(adaptok.Router):
    """A cell deserves a token where it differs from the mean of its 3 x 3 neighbours."""

    def forward(self, tokens: adaptok.Tokens, context: adaptok.Context) -> adaptok.Routing:
        """Judge the cells."""
        maps = tokens.x.mT.unflatten(-1, tokens.grid)
        around = torch.nn.functional.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
        contrast = (maps - around).norm(dim=1).flatten(1)
        return adaptok.Routing(contrast / (contrast.amax(1, keepdim=True) + 1e-9), threshold=None)


def main() -> None:
    """Check the router, wrap a model with it, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the cells to keep")
    parser.add_argument("--size", type=int, default=64, help="edge of an image in pixels")
    parser.add_argument("--image", type=int, default=20, help="which emoji")
    options = parser.parse_args()

    report = check_router("contrast", only=CHECKS)
    report.raise_failed()
    print(f"{len(report.passed)} checks passed: {', '.join(report.passed)}")

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=options.size, patch_size=PATCH).eval()
    adaptok.wrap(vit, chunker="dc", router="contrast", budget=options.keep)
    emoji = load_emoji(size=options.size, categories=["Food & Drink"], skin_variants=False)
    pixels = emoji.take([options.image])
    with torch.inference_mode(), adaptok.trace(vit) as trace:
        vit(to_latent(pixels))
    step = trace.steps[0]
    picture = save_figure(show_tokens(trace, pixels), options.output / "router.png")
    print(f"{step.kept.tolist()} of {step.provenance.token.shape[1]} cells kept; see {picture}")


if __name__ == "__main__":
    main()
