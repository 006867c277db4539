"""Draw what ToMe and ToMe-SD merge in a CLIP ViT-B/16, on a photograph and on a shipped emoji.

Usage: python scripts/draw_tome.py tome --weights FOLDER [--output docs/pictures/tome.png]
       python scripts/draw_tome.py tomesd --weights FOLDER [--output docs/pictures/tomesd.png]

FOLDER holds the weights of the image tower. The photograph is Matplotlib's sample image, Grace
Hopper (US Navy, public domain).
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from adaptok_merge.cells import choose_destinations
from adaptok_merge.tomesd import ToMeSD
from draw_prune import Subject, load_clip, load_emoji, load_photograph, run
from einops import rearrange
from matplotlib.collections import LineCollection

import adaptok
from adaptok.errors import AdaptokError
from adaptok.see.canvas import INK, QUIET, SMALL, TITLE, Canvas, make_canvas, save_figure

Pixels = npt.NDArray[np.uint8]
Groups = npt.NDArray[np.int64]

BOX, MARGIN, GAP, HEAD, LABEL = 300, 28, 20, 78, 30
RATE = 13
RATIOS = ((0.5, 5), (0.75, 5), (0.75, 6))  # and the block
TITLES = {
    "tome": f"ToMe with r={RATE} in CLIP ViT-B/16: cells that one token stands for",
    "tomesd": "ToMe-SD in CLIP ViT-B/16: cells that one token stands for inside a block",
}
NOTES = {
    "tome": "Each token has the mean colour of its cells; lines are the borders between tokens. "
    "A token may stand for cells that do not touch.",
    "tomesd": "White dots: destinations, one in each 2 x 2 cells; the most similar of the others "
    "merge into them. Every block chooses anew.",
}


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """What one picture shows.

    Args:
        title: where it is.
        groups: the token of each cell, `(h w)`.
        destinations: flat cells with a dot.
    """

    title: str
    groups: Groups
    destinations: tuple[int, ...] = ()


def find_groups(owner: torch.Tensor) -> Groups:
    """Return the token of each cell of one sample."""
    side = round(owner.shape[-1] ** 0.5)
    groups: Groups = owner.view(side, side).numpy()
    return groups


def follow_tome(subject: Subject, picture: Pixels) -> list[Panel]:
    """Merge, and return what tokens stand for behind three of the blocks."""
    adaptok.wrap(subject.model, stack=[{"name": "tome", "r": RATE}])
    events = run(subject, picture)
    adaptok.unwrap(subject.model)
    shown = [events[len(events) * part // 3 - 1] for part in (1, 2, 3)]
    return [Panel(f"behind block {e.site.block}", find_groups(e.owner)) for e in shown]


def follow_tomesd(subject: Subject, picture: Pixels) -> list[Panel]:
    """Merge with some ratios, and return what tokens stand for inside some blocks."""
    panels = []
    for ratio, block in RATIOS:
        adaptok.wrap(subject.model, stack=[ToMeSD(ratio)])
        groups = find_groups(run(subject, picture)[block].owner)
        adaptok.unwrap(subject.model)
        h, w = groups.shape
        places = choose_destinations((h, w), (2, 2), block, torch.device("cpu")).tolist()
        panels.append(Panel(f"ratio {ratio}, block {block}", groups, tuple(places)))
    return panels


def paint(picture: Pixels, groups: Groups) -> Pixels:
    """Give each cell the mean colour of all cells of its token."""
    h, w = groups.shape
    cells = rearrange(picture.astype(np.float64), "(h p) (w q) c -> h w (p q) c", h=h, w=w)
    means = cells.mean(2).reshape(h * w, 3)
    flat = groups.flatten()
    sums = np.zeros((flat.max() + 1, 3))
    np.add.at(sums, flat, means)
    colours = (sums / np.bincount(flat)[:, None])[groups].round().astype(np.uint8)
    side = len(picture) // h
    return colours.repeat(side, axis=0).repeat(side, axis=1)


def draw_panel(canvas: Canvas, left: int, top: int, picture: Pixels, panel: Panel) -> None:
    """Draw the tokens of one place."""
    groups = panel.groups
    canvas.text(left, top, panel.title, bold=True)
    said = f"{len(np.unique(groups))} tokens"
    canvas.text(left + BOX, top + 3, said, size=SMALL, colour=QUIET, align="right")
    axes = canvas.image(left, top + LABEL, (BOX, BOX), paint(picture, groups))
    edges = []
    for row, column in zip(*np.nonzero(groups[:, 1:] != groups[:, :-1]), strict=True):
        edges.append([(column + 1, row), (column + 1, row + 1)])
    for row, column in zip(*np.nonzero(groups[1:] != groups[:-1]), strict=True):
        edges.append([(column, row + 1), (column + 1, row + 1)])
    side = len(picture) / len(groups)
    axes.add_collection(
        LineCollection(list(np.array(edges) * side - 0.5), colors=INK, linewidths=0.7)
    )
    if panel.destinations:
        rows, columns = np.unravel_index(np.array(panel.destinations), groups.shape)
        axes.plot(
            (columns + 0.5) * side - 0.5,
            (rows + 0.5) * side - 0.5,
            "o",
            color="white",
            markersize=4.0,
            markeredgecolor=INK,
            markeredgewidth=0.8,
        )


def draw(subject: Subject, method: str, pictures: dict[str, Pixels]) -> Canvas:
    """Draw one row for each picture: as it is, and its tokens at three places."""
    follow = follow_tome if method == "tome" else follow_tomesd
    row = LABEL + BOX + GAP
    canvas = make_canvas(2 * MARGIN + 4 * BOX + 3 * GAP, HEAD + len(pictures) * row + MARGIN - GAP)
    canvas.text(MARGIN, 14, TITLES[method], size=TITLE, bold=True)
    canvas.text(MARGIN, 44, NOTES[method], size=SMALL, colour=QUIET)
    for number, (name, picture) in enumerate(pictures.items()):
        top = HEAD + number * row
        panels = follow(subject, picture)
        canvas.text(MARGIN, top, f"{name}, {panels[0].groups.size} cells", bold=True)
        canvas.image(MARGIN, top + LABEL, (BOX, BOX), picture)
        for place, panel in enumerate(panels, start=1):
            draw_panel(canvas, MARGIN + place * (BOX + GAP), top, picture, panel)
    return canvas


def main() -> int:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=tuple(TITLES))
    parser.add_argument("--weights", type=Path, required=True, help="folder of the real weights")
    parser.add_argument("--output", type=Path, help="docs/pictures/METHOD.png unless given")
    parser.add_argument("--name", default="parrot", help="name of a shipped emoji")
    options = parser.parse_args()
    try:
        pictures = {"a photograph": load_photograph(), options.name: load_emoji(options.name)}
        canvas = draw(load_clip(options.weights), options.method, pictures)
        output = options.output or Path("docs/pictures") / f"{options.method}.png"
        save_figure(canvas.figure, output)
    except AdaptokError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
