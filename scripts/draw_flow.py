"""Draw the flow of a wrapped model, from an image to the host's head, on a real emoji.

Usage: python scripts/draw_flow.py [--output docs/pictures/flow.png] [--name parrot]

What the boxes show was computed: a ViT of random weights is wrapped, and its trace is drawn.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from matplotlib.patches import FancyBboxPatch

import adaptok
from adaptok.errors import AdaptokError
from adaptok.see.canvas import (
    COLOURS,
    INK,
    LINE,
    QUIET,
    SMALL,
    TEXT,
    TITLE,
    Canvas,
    make_canvas,
    save_figure,
)
from adaptok.see.cells import paint_groups, read_image, shade_cells
from adaptok.see.panels import draw_borders
from adaptok.train.emoji import decode_emoji, read_emoji_index
from adaptok.train.pixels import to_latent

SIZE, PATCH, KEEP, BLOCKS = 64, 4, 0.3, 12
BOX, GAP, MARGIN, TOP, WORDS = 128, 106, 28, 196, 4
STAGES = (
    ("time", "reuse a step"),
    ("depth", "leave early"),
    ("tokens", "chunk, merge, prune"),
    ("width", "fewer heads, channels"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What one pass of a wrapped model decided.

    Args:
        pixels: the image.
        prob: keep probability of each cell, `(h w)`.
        keep: kept cells, `(h w)`.
        token: the token of each cell, `(h w)`.
    """

    pixels: np.ndarray
    prob: np.ndarray
    keep: np.ndarray
    token: np.ndarray


def look(name: str) -> Seen:
    """Wrap a ViT, run it on a shipped emoji, and return what it decided."""
    index = read_emoji_index()
    pixels = torch.from_numpy(
        decode_emoji(index)[[entry.name for entry in index.entries].index(name)]
    )
    image = pixels.permute(2, 0, 1)[None]
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, patch_size=PATCH).eval()
    adaptok.wrap(vit, chunker="dc", router="predictability", budget=KEEP)
    with torch.inference_mode(), adaptok.trace(vit) as trace:
        vit(to_latent(image))
    step = trace.steps[0]
    maps = (step.routings[0].keep_prob, step.plans[0].keep_mask, step.provenance.token)
    return Seen(read_image(image, 0), *(one[0].view(*step.grid).numpy() for one in maps))


def draw_frame(canvas: Canvas, axes: object, box: tuple[float, ...], colour: str) -> None:
    """Draw a box with round corners, pale inside."""
    left, top, width, height = box
    for face, alpha in ((colour, 0.07), ("none", 1.0)):
        axes.add_patch(  # type: ignore[attr-defined]
            FancyBboxPatch(
                (left, top),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=9",
                facecolor=face,
                edgecolor=colour,
                alpha=alpha,
                linewidth=1.2,
            )
        )


def draw_arrow(axes: object, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow from place to place."""
    axes.annotate(  # type: ignore[attr-defined]
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.1}
    )


def draw(seen: Seen) -> Canvas:
    """Draw the flow: five pictures in a row, the values between them, and the stages around."""
    columns = 5
    width = 2 * MARGIN + columns * BOX + (columns - 1) * GAP + 2 * WORDS
    height = TOP + BOX + 262
    canvas = make_canvas(width, height)
    axes = canvas.axes(0, 0, width, height)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    n, m = seen.keep.size, int(seen.keep.sum())
    canvas.text(MARGIN, 14, "One forward pass of a wrapped model", size=TITLE, bold=True)
    canvas.text(
        MARGIN, 44, "Embedding, blocks and head are the host's own. Everything else stands where "
        "its list of blocks was.", size=SMALL, colour=QUIET,
    )  # fmt: skip
    lefts = [MARGIN + WORDS + place * (BOX + GAP) for place in range(columns)]
    frame = (lefts[1] - 14, 84, lefts[3] + BOX - lefts[1] + 28, TOP + BOX + 36)
    draw_frame(canvas, axes, frame, COLOURS[0])
    canvas.text(frame[0] + 14, 92, "AdaptiveBlocks", size=TEXT, bold=True, colour=COLOURS[0])
    canvas.text(
        frame[0] + frame[2] - 14, 93, "a Budget says how many", size=SMALL, colour=QUIET,
        align="right",
    )  # fmt: skip
    titles = ("host's embedding", "Router", "Chunker", "Dechunker", "host's head")
    for left, title in zip(lefts, titles, strict=True):
        canvas.text(left, TOP - 42, title, bold=True, anchor="baseline")
    notes = (
        f"image to {n} cells",
        "keep probabilities",
        f"{m} of {n} cells",
        "all cells again",
        "class or noise",
    )
    for left, note in zip(lefts, notes, strict=True):
        canvas.text(left, TOP - 14, note, size=SMALL, colour=QUIET, anchor="baseline")
    size = (BOX, BOX)
    canvas.image(lefts[0], TOP, size, seen.pixels)
    canvas.map(lefts[1], TOP, size, seen.prob)
    canvas.image(lefts[2], TOP, size, shade_cells(seen.pixels, seen.keep))
    painted = canvas.image(lefts[3], TOP, size, paint_groups(seen.pixels, seen.token))
    draw_borders(painted, seen.pixels.shape[:2], seen.token, thin=True)
    draw_head(canvas, axes, lefts[4])
    middle = TOP + BOX / 2
    for left, value in zip(lefts, ("Tokens", "Routing", "", "Tokens"), strict=False):
        draw_arrow(axes, (left + BOX + 5, middle), (left + BOX + GAP - 5, middle))
        canvas.text(
            left + BOX + GAP / 2, middle - 24, value, size=SMALL, colour=INK, align="center"
        )
    draw_blocks(canvas, axes, lefts, n, m)
    canvas.text(
        MARGIN, TOP + BOX + 150, "This is a stage of the axis tokens. Others stand around the same "
        "blocks, the outermost first:",
    )  # fmt: skip
    each = (width - 2 * MARGIN - 3 * 14) / len(STAGES)
    for place, (axis, words) in enumerate(STAGES):
        box = (MARGIN + place * (each + 14), TOP + BOX + 184, each, 54)
        draw_frame(canvas, axes, box, COLOURS[place])
        line = {"anchor": "baseline"}
        canvas.text(box[0] + 14, box[1] + 23, axis, bold=True, colour=COLOURS[place], **line)
        canvas.text(box[0] + 14, box[1] + 43, words, size=SMALL, colour=INK, **line)
    return canvas


def draw_head(canvas: Canvas, axes: object, left: float) -> None:
    """Draw what leaves: three bars that stand for numbers."""
    draw_frame(canvas, axes, (left, TOP, BOX, BOX), LINE)
    for row, share in enumerate((0.82, 0.34, 0.55, 0.2)):
        axes.add_patch(  # type: ignore[attr-defined]
            FancyBboxPatch(
                (left + 18, TOP + 18 + row * 26),
                share * (BOX - 36),
                12,
                boxstyle="round,pad=0,rounding_size=4",
                facecolor=QUIET,
                edgecolor="none",
            )
        )


def draw_blocks(canvas: Canvas, axes: object, lefts: list[int], n: int, m: int) -> None:
    """Draw the host's blocks below the way of the tokens, and the plan that goes beside them."""
    top = TOP + BOX + 36
    left, right = lefts[2] + 24, lefts[3] + BOX - 24
    each = (right - left) / BLOCKS
    for number in range(BLOCKS):
        axes.add_patch(  # type: ignore[attr-defined]
            FancyBboxPatch(
                (left + number * each + 2, top),
                each - 4,
                34,
                boxstyle="round,pad=0,rounding_size=3",
                facecolor=COLOURS[4],
                alpha=0.75,
                edgecolor="none",
            )
        )
    canvas.text(
        (left + right) / 2, top + 40, f"the host's blocks, on {m} tokens, not {n}",
        size=SMALL, colour=INK, align="center",
    )  # fmt: skip
    for x, start, end in ((left - 12, -30, 17), (right + 12, 17, -30)):
        draw_arrow(axes, (x, top + start), (x, top + end))
    between = (lefts[2] + BOX + GAP / 2, TOP + BOX / 2)
    canvas.text(between[0], between[1] - 46, "ChunkPlan,\nProvenance", size=SMALL, align="center")


def main() -> int:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/flow.png"))
    parser.add_argument("--name", default="parrot", help="name of a shipped emoji")
    options = parser.parse_args()
    try:
        save_figure(draw(look(options.name)).figure, options.output)
    except AdaptokError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
