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
from draw_prune import Subject, load_clip, load_pictures, run

import adaptok
from adaptok.errors import AdaptokError
from adaptok.see.canvas import QUIET, SMALL, TITLE, Canvas, make_canvas, save_figure
from adaptok.see.cells import paint_groups
from adaptok.see.panels import draw_borders, draw_dots

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


def draw_panel(canvas: Canvas, left: int, top: int, picture: Pixels, panel: Panel) -> None:
    """Draw the tokens of one place."""
    groups = panel.groups
    canvas.text(left, top, panel.title, bold=True)
    said = f"{len(np.unique(groups))} tokens"
    canvas.text(left + BOX, top + 3, said, size=SMALL, colour=QUIET, align="right")
    axes = canvas.image(left, top + LABEL, (BOX, BOX), paint_groups(picture, groups))
    draw_borders(axes, picture.shape[:2], groups)
    if panel.destinations:
        draw_dots(axes, picture.shape[:2], groups.shape, panel.destinations)


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
        pictures = load_pictures(options.name)
        canvas = draw(load_clip(options.weights), options.method, pictures)
        output = options.output or Path("docs/pictures") / f"{options.method}.png"
        save_figure(canvas.figure, output)
    except AdaptokError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
