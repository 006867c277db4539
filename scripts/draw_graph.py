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
from matplotlib import cbook
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from PIL import Image
from torch import Tensor

from adaptok import Budget, ChunkPlan, Routing, Tokens
from adaptok.errors import AdaptokError, DataError
from adaptok.see.canvas import INK, QUIET, SMALL, TITLE, Canvas, make_canvas, save_figure
from adaptok.train.emoji import decode_emoji, read_emoji_index

Pixels = npt.NDArray[np.uint8]

KEEPS = (0.5, 0.25, 0.1)
BOX = 320  # screen pixels of a picture
MARGIN, GAP, HEAD, LABEL = 28, 20, 52, 30
PHOTOGRAPH = (0, 20, 512, 532)  # left, upper, right, lower: the square around the face


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


def load_emoji(name: str) -> Pixels:
    """Return the shipped emoji of a name, `(h w 3)`."""
    index = read_emoji_index()
    names = [entry.name for entry in index.entries]
    if name not in names:
        raise DataError(f"no shipped emoji is called {name!r}: names are in adaptok/zoo/emoji.json")
    picture: Pixels = decode_emoji(index)[names.index(name)]
    return picture


def load_photograph() -> Pixels:
    """Return the photograph that comes with Matplotlib, `(512 512 3)`."""
    with cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        return np.asarray(image.convert("RGB").crop(PHOTOGRAPH))


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


def paint_segments(scene: Scene, plan: ChunkPlan) -> Pixels:
    """Give each pixel the mean colour of its segment."""
    cells = rearrange(scene.pixels, "(h p) (w q) c -> (h w) (p q) c", h=scene.side, w=scene.side)
    token = plan.provenance.token[0].numpy()
    sums = np.zeros((token.max() + 1, 3))
    np.add.at(sums, token, cells.mean(1))
    colours = (sums / np.bincount(token)[:, None]).round().astype(np.uint8)[token]
    painted = rearrange(colours, "(h w) c -> h w c", h=scene.side)
    zoom = len(scene.pixels) // scene.side
    return painted.repeat(zoom, axis=0).repeat(zoom, axis=1)


def draw_borders(axes: Axes, scene: Scene, plan: ChunkPlan) -> None:
    """Draw a line between cells of different segments."""
    token = plan.provenance.token[0].numpy().reshape(scene.side, scene.side)
    edges = []
    for row, column in zip(*np.nonzero(token[:, 1:] != token[:, :-1]), strict=True):
        edges.append([(column + 1, row), (column + 1, row + 1)])
    for row, column in zip(*np.nonzero(token[1:] != token[:-1]), strict=True):
        edges.append([(column, row + 1), (column + 1, row + 1)])
    zoom = len(scene.pixels) / scene.side
    lines = np.array(edges) * zoom - 0.5
    axes.add_collection(LineCollection(list(lines), colors="white", linewidths=1.3))
    axes.add_collection(LineCollection(list(lines), colors=INK, linewidths=0.6))


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
        axes = canvas.image(left, top + LABEL, (BOX, BOX), paint_segments(scene, plan))
        draw_borders(axes, scene, plan)


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
            Scene(f"the emoji: {options.name}", load_emoji(options.name), 16),
            Scene("a photograph", load_photograph(), 32),
        ]
        save_figure(draw(scenes).figure, options.output)
    except AdaptokError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
