"""Draw the segments of `adaptok_graph` on a shipped emoji and on a photograph.

Usage: python scripts/draw_graph.py [--output docs/pictures/graph.png] [--name parrot]

The photograph is Matplotlib's sample image, Grace Hopper (US Navy, public domain). No model is
needed: the features of a cell are its pixels, each colour value written as an angle, so that
white and grey differ after the normalisation that tokens get.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from adaptok_graph.chunker import GraphChunker
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from adaptok import Budget, ChunkPlan, Routing, Tokens
from adaptok.errors import AdaptokError
from adaptok.see.canvas import QUIET, SMALL, TITLE, Canvas, make_canvas, save_figure
from adaptok.see.cells import paint_groups
from adaptok.see.panels import draw_borders
from adaptok.see.specimens import load_emoji, load_photograph

Pixels = npt.NDArray[np.uint8]

KEEPS = (0.5, 0.25, 0.1)
BOX = 320  # screen pixels of a picture
MARGIN, GAP, HEAD, LABEL = 28, 20, 52, 30


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A picture with its grid.

    Args:
        title: what it is.
        pixels: the picture, square, `(s s 3)`.
        side: cells along each side.
    """

    title: str
    pixels: Pixels
    side: int


def write_angles(scene: Scene) -> Float[Tensor, "1 n d"]:
    """Return the features of the cells: colour values as angles of a quarter turn."""
    cells = rearrange(
        torch.from_numpy(scene.pixels.copy()).float() / 255,
        "(h p) (w q) c -> 1 (h w) (p q c)",
        h=scene.side,
        w=scene.side,
    )
    angle = cells * (math.pi / 2)
    return torch.cat([angle.cos(), angle.sin(), -angle.cos(), -angle.sin()], dim=-1)


def chunk_scene(scene: Scene, keep: float) -> ChunkPlan:
    """Contract the edges of a picture, without a word of a router."""
    tokens = Tokens(write_angles(scene), (scene.side, scene.side))
    routing = Routing(torch.full(tokens.x.shape[:2], 0.5))
    _, plan = GraphChunker()(tokens, routing, Budget(keep=keep))
    return plan


def draw_row(canvas: Canvas, top: int, scene: Scene) -> None:
    """Draw one picture and its segments at each budget."""
    n = scene.side**2
    canvas.text(MARGIN, top, f"{scene.title}, {n} cells", bold=True)
    canvas.image(MARGIN, top + LABEL, (BOX, BOX), scene.pixels)
    for number, keep in enumerate(KEEPS, start=1):
        left = MARGIN + number * (BOX + GAP)
        plan = chunk_scene(scene, keep)
        count, sizes = int(plan.computed[0]), torch.bincount(plan.provenance.token[0])
        canvas.text(left, top, f"{count} segments", bold=True)
        said = f"largest: {int(sizes.max())} cells"
        canvas.text(left + BOX, top + 3, said, size=SMALL, colour=QUIET, align="right")
        token = plan.provenance.token[0].numpy().reshape(scene.side, scene.side)
        painted = paint_groups(scene.pixels, token)
        axes = canvas.image(left, top + LABEL, (BOX, BOX), painted)
        draw_borders(axes, painted.shape[:2], token)


def draw(scenes: list[Scene]) -> Canvas:
    """Draw one row for each picture."""
    row = LABEL + BOX + GAP
    columns = 1 + len(KEEPS)
    canvas = make_canvas(
        2 * MARGIN + columns * BOX + (columns - 1) * GAP, HEAD + len(scenes) * row + MARGIN - GAP
    )
    title = "Contracted edges: lines are borders of segments, each in its mean colour"
    canvas.text(MARGIN, 16, title, size=TITLE, bold=True)
    for number, scene in enumerate(scenes):
        draw_row(canvas, HEAD + number * row, scene)
    return canvas


def main() -> int:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/graph.png"))
    parser.add_argument("--name", default="parrot", help="name of a shipped emoji")
    options = parser.parse_args()
    try:
        scenes = [
            Scene(f"the emoji: {options.name}", load_emoji([options.name])[0], 16),
            Scene("a photograph", load_photograph(), 32),
        ]
        save_figure(draw(scenes).figure, options.output)
    except AdaptokError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
