"""Draw what merging makes of the tokens that the shipped model chose, early and late on the way.

Usage: python scripts/draw_combination.py [--output docs/pictures/combination.png]
"""

import argparse
import sys
from pathlib import Path

import torch

import adaptok
from adaptok.see import show_tokens
from adaptok.train.data import load_emoji
from adaptok.train.pixels import to_latent
from adaptok.zoo.models import load_zoo_model

EMOJI = 5  # a tree: leaves that are alike, and ornaments that are not
MERGED = 16  # tokens at each block
TIME = 50.0  # of 1000: nearly clean


def main() -> int:
    """Trace one call of the shipped model with ToMe around its blocks, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/combination.png"))
    options = parser.parse_args()
    model = load_zoo_model("dcdit-emoji32").model
    adaptok.wrap(model, stack=[{"name": "tome", "r": MERGED, "restore": "update"}])
    data = load_emoji(size=32)
    image, label = data.images[[EMOJI]], data.labels[[EMOJI]]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    share = TIME / 1000
    with torch.no_grad(), adaptok.trace(model) as seen:
        model((1 - share) * to_latent(image) + share * noise, torch.tensor([TIME]), label)
    figure = show_tokens(seen, image, title="The shipped model, and ToMe around its blocks")
    figure.savefig(options.output, dpi=140)
    return 0


if __name__ == "__main__":
    sys.exit(main())
