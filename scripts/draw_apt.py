"""Draw the patches of three sizes that `adaptok_patch` finds on a shipped emoji and a photograph.

Usage: python scripts/draw_apt.py [--output docs/pictures/apt.png] [--name parrot]

The photograph is Matplotlib's sample image, Grace Hopper (US Navy, public domain). No model is
needed: patches follow the entropy of the pixels. The emoji is enlarged to 512 pixels.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from adaptok_patch import Leaves, measure_entropy, quadtree
from einops import rearrange
from matplotlib.patches import Rectangle
from PIL import Image

from adaptok.errors import AdaptokError
from adaptok.see.canvas import INK, QUIET, SMALL, TITLE, Canvas, make_canvas, save_figure
from adaptok.see.specimens import load_emoji, load_photograph

Pixels = npt.NDArray[np.uint8]

SIZE, PATCH = 512, 16
GRID = (SIZE // PATCH, SIZE // PATCH)
THRESHOLDS = ((6.0, 4.0), (6.5, 5.5))
BOX = 384  # screen pixels of a picture
MARGIN, GAP, HEAD, LABEL = 28, 20, 84, 44
# Okabe and Ito: fill and its strength of patches of one, two and four cells
FILLS = {1: ("none", 0.0), 2: ("#56B4E9", 0.35), 4: ("#E69F00", 0.45)}
LINES = {1: 0.25, 2: 0.6, 4: 1.1}


def enlarge_emoji(name: str) -> Pixels:
    """Return the shipped emoji of a name, enlarged."""
    picture = Image.fromarray(load_emoji([name])[0])
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def find_patches(picture: Pixels, thresholds: Sequence[float]) -> Leaves:
    """Return the patches of a picture."""
    images = rearrange(torch.from_numpy(picture.copy()), "h w c -> 1 c h w")
    return quadtree(measure_entropy(images, PATCH), thresholds, GRID)


def count_sizes(leaves: Leaves) -> dict[int, int]:
    """Return how many patches of each size there are."""
    return {edge: int((leaves.scale == edge).sum()) // edge**2 for edge in FILLS}


def draw_patches(canvas: Canvas, left: int, top: int, picture: Pixels, leaves: Leaves) -> None:
    """Draw a picture with the borders of its patches, coarse ones tinted."""
    grey = picture.mean(-1, keepdims=True).repeat(3, axis=-1)
    pale = (255 - (255 - grey) * 0.75).astype(np.uint8)
    axes = canvas.image(left, top, (BOX, BOX), pale)
    scale = leaves.scale[0].tolist()
    for y, row in enumerate(scale):
        for x, edge in enumerate(row):
            if y % edge or x % edge:
                continue
            corner = (x * PATCH - 0.5, y * PATCH - 0.5)
            fill, strength = FILLS[edge]
            if fill != "none":
                axes.add_patch(
                    Rectangle(corner, edge * PATCH, edge * PATCH, color=fill, alpha=strength, lw=0)
                )
            axes.add_patch(
                Rectangle(
                    corner, edge * PATCH, edge * PATCH, fill=False, ec=INK, lw=LINES[edge], zorder=3
                )
            )


def draw_legend(canvas: Canvas, top: int) -> None:
    """Say which patch is which."""
    left = MARGIN
    for edge, (fill, strength) in FILLS.items():
        side = 6 + 4 * edge
        axes = canvas.axes(left, top + (22 - side) / 2, side, side)
        axes.set_axis_off()
        axes.add_patch(Rectangle((0, 0), 1, 1, fc=fill, alpha=strength or None, lw=0))
        axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, ec=INK, lw=1.0, clip_on=False))
        pixels = edge * PATCH
        cells = "a cell of the host" if edge == 1 else f"{edge} by {edge} cells, one token"
        canvas.text(left + side + 8, top + 11, f"{pixels} px: {cells}", size=SMALL, anchor="center")
        left += 330


def draw(pictures: dict[str, Pixels]) -> Canvas:
    """Draw each picture by itself and with its patches at each setting."""
    columns = 1 + len(THRESHOLDS)
    width = 2 * MARGIN + columns * BOX + (columns - 1) * GAP
    canvas = make_canvas(width, HEAD + len(pictures) * (BOX + LABEL + GAP) + MARGIN // 2)
    title = f"Patches by the entropy of their pixels: {GRID[0]} x {GRID[1]} cells of {PATCH} px"
    canvas.text(MARGIN, 14, title, size=TITLE, bold=True)
    draw_legend(canvas, 50)
    for number, (name, picture) in enumerate(pictures.items()):
        label = HEAD + number * (BOX + LABEL + GAP) + 18
        top = label + LABEL - 18
        canvas.text(MARGIN, top - 8, name, bold=True, anchor="baseline")
        canvas.image(MARGIN, top, (BOX, BOX), picture)
        for column, thresholds in enumerate(THRESHOLDS, start=1):
            left = MARGIN + column * (BOX + GAP)
            leaves = find_patches(picture, thresholds)
            coarse, coarsest = (f"{bits:g}" for bits in thresholds)
            total, cells = int(leaves.counts), GRID[0] * GRID[1]
            said = f"{coarse} and {coarsest} bits: {total} of {cells} tokens"
            canvas.text(left, label, said, bold=True, anchor="baseline")
            sizes = count_sizes(leaves)
            counts = ", ".join(f"{sizes[edge]} of {edge * PATCH} px" for edge in sizes)
            canvas.text(left, top - 8, counts, size=SMALL, colour=QUIET, anchor="baseline")
            draw_patches(canvas, left, top, picture, leaves)
    return canvas


def main() -> int:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/apt.png"))
    parser.add_argument("--name", default="parrot", help="name of a shipped emoji")
    options = parser.parse_args()
    try:
        pictures = {
            f"emoji: {options.name}": enlarge_emoji(options.name),
            "photograph": load_photograph(),
        }
        save_figure(draw(pictures).figure, options.output)
    except AdaptokError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
