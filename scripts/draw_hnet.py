"""Draw the scans of `adaptok_hnet` and the runs that its tokens stand for, on a real emoji.

Usage: python scripts/draw_hnet.py [--output docs/pictures/hnet.png] [--name parrot] [--keep 0.2]

The features of a cell are its pixels minus one half, so that no model is needed: the fresh router
(both projections are the identity) compares each cell with the one before it.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from adaptok_hnet.chunker import HNetChunker
from adaptok_hnet.router import HNetRouter
from adaptok_hnet.scan import SCANS, Scan, order_cells
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from adaptok import Budget, ChunkPlan, Context, Tokens
from adaptok.errors import AdaptokError
from adaptok.see.canvas import (
    INK,
    MAP_COLOURS,
    QUIET,
    SMALL,
    TITLE,
    Canvas,
    make_canvas,
    save_figure,
)
from adaptok.see.panels import draw_borders, draw_dots
from adaptok.see.specimens import load_emoji

Pixels = npt.NDArray[np.uint8]

GRID = (16, 16)
ZOOM = 5  # screen pixels of an emoji pixel
MARGIN, GAP, HEAD, LIFT = 28, 24, 92, 10
SAYINGS = {
    "raster": "row by row",
    "snake": "every second row backwards",
    "hilbert": "any h x w, no diagonal step",
}
EXPLANATION = """\
Above: the walk through all cells,
from the dot (dark) to the square
(light).

Below: a cell is kept (white dot)
where it differs most from the one
before it in the walk, and stands for
the cells that follow, up to the next
kept one. Lines are the borders of
these runs; each has the mean colour
of its kept cell.

Runs of snake and hilbert hang
together. A run of raster is torn
where a row ends."""


def chunk_picture(picture: Pixels, scan: Scan, keep: float) -> ChunkPlan:
    """Route and chunk the cells of a picture."""
    h, w = GRID
    x = torch.from_numpy(picture).float() / 255 - 0.5
    cells = rearrange(x, "(h p) (w q) c -> 1 (h w) (p q c)", h=h, w=w)
    tokens = Tokens(cells, GRID)
    routing = HNetRouter(tokens.width, scan)(tokens, Context())
    _, plan = HNetChunker(scan)(tokens, routing, Budget(keep=keep))
    return plan


def paint_tokens(picture: Pixels, plan: ChunkPlan) -> Pixels:
    """Give each cell the mean colour of the cell whose token stands for it."""
    h, w = GRID
    patches = rearrange(picture, "(h p) (w q) c -> (h w) (p q) c", h=h, w=w)
    token = plan.provenance.token[0].numpy()
    colours = patches.mean(1)[plan.cells[0].numpy()][token]
    painted = rearrange(colours.round().astype(np.uint8), "(h w) c -> h w c", h=h)
    side = len(picture) // h
    return painted.repeat(side, axis=0).repeat(side, axis=1)


def draw_path(axes: Axes, scan: Scan, side: int) -> None:
    """Draw the walk through all cells, dark where it begins and light where it ends."""
    rows, columns = np.unravel_index(order_cells(GRID, scan), GRID)
    points = (np.stack([columns, rows], axis=1) + 0.5) * side - 0.5
    steps = np.stack([points[:-1], points[1:]], axis=1)
    lines = LineCollection(list(steps), cmap=MAP_COLOURS, linewidths=1.8, capstyle="round")
    lines.set_array(np.arange(len(steps)))
    axes.add_collection(lines)
    axes.plot(*points[0], "o", color=INK, markersize=4.5)
    axes.plot(*points[-1], "s", color=INK, markersize=4.5)


def draw_column(canvas: Canvas, left: int, scan: Scan, picture: Pixels, keep: float) -> None:
    """Draw one scan: the walk above, its runs below."""
    box = len(picture) * ZOOM
    side = len(picture) // GRID[0]
    plan = chunk_picture(picture, scan, keep)
    faded = (255 - (255 - picture.astype(np.float64)) * 0.45).astype(np.uint8)
    canvas.text(left, HEAD - LIFT, scan, bold=True, anchor="baseline")
    canvas.text(
        left + box,
        HEAD - LIFT,
        SAYINGS[scan],
        size=SMALL,
        colour=QUIET,
        align="right",
        anchor="baseline",
    )
    draw_path(canvas.image(left, HEAD, (box, box), faded), scan, side)
    below = HEAD + box + GAP
    axes = canvas.image(left, below, (box, box), paint_tokens(picture, plan))
    draw_borders(axes, picture.shape[:2], plan.provenance.token[0].numpy().reshape(GRID))
    draw_dots(axes, picture.shape[:2], GRID, plan.cells[0].tolist())


def draw(picture: Pixels, name: str, keep: float) -> Canvas:
    """Draw the emoji, and for each scan its walk and its runs."""
    box = len(picture) * ZOOM
    width = 2 * MARGIN + 4 * box + 3 * GAP
    canvas = make_canvas(width, HEAD + 2 * box + GAP + MARGIN)
    count = Budget(keep=keep).count(GRID[0] * GRID[1])
    cells = GRID[0] * GRID[1]
    title = f"H-Net's chunking along three scans: {count} of {cells} cells are kept"
    canvas.text(MARGIN, 18, title, size=TITLE, bold=True)
    canvas.text(MARGIN, HEAD - LIFT, f"the emoji: {name}", bold=True, anchor="baseline")
    canvas.image(MARGIN, HEAD, (box, box), picture)
    canvas.text(MARGIN, HEAD + box + GAP, EXPLANATION, size=SMALL)
    for number, scan in enumerate(SCANS, start=1):
        draw_column(canvas, MARGIN + number * (box + GAP), scan, picture, keep)
    return canvas


def main() -> int:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/hnet.png"))
    parser.add_argument("--name", default="parrot", help="name of a shipped emoji")
    parser.add_argument("--keep", type=float, default=0.2, help="share of the cells to keep")
    options = parser.parse_args()
    try:
        canvas = draw(load_emoji([options.name])[0], options.name, options.keep)
        save_figure(canvas.figure, options.output)
    except AdaptokError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
