"""A diagram of a stack: the stages of a wrapped model around its blocks, and why they stand so."""

import textwrap
from typing import TYPE_CHECKING

from torch import nn

from adaptok.explaining import Explanation, StageReason, explain
from adaptok.optional import import_optional
from adaptok.see.canvas import COLOURS, INK, QUIET, SMALL, TEXT, TITLE, Canvas, make_canvas
from adaptok.stages import AXES

if TYPE_CHECKING:
    import matplotlib.figure

WIDTH, MARGIN, INDENT, PAD, HEAD, FOOT = 1000, 28, 30, 14, 96, 24
LINE_HEIGHT, NAME = 23, 32
BLOCKS = 64
LETTER = 8.6  # pixels of a small letter, about
SAVES = {"time": "steps", "depth": "blocks", "tokens": "tokens", "width": "heads and channels"}


def show_stack(model: nn.Module | Explanation, *, title: str = "") -> "matplotlib.figure.Figure":
    """Draw the stages of a wrapped model around its blocks, the outermost first, with reasons.

    Args:
        model: a wrapped model, or what `adaptok.explain` said of one.
        title: headline; empty names the model.

    Returns:
        The figure, with one axes: a box for each stage, inside the one around it.

    Raises:
        NotWrappedError: the model is not wrapped.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> figure = show_stack(adaptok.wrap(make_vit(), stack=["tome", "exit"], budget=0.5))
        >>> [text.get_text() for text in figure.texts if text.get_fontweight() == "bold"][1:]
        ['exit', 'tome', 'blocks 0 to 2']
    """
    found = explain(model) if isinstance(model, nn.Module) else model
    words = [describe(stage, depth) for depth, stage in enumerate(found.stages)]
    deep = [2 * PAD + NAME + LINE_HEIGHT * (text.count("\n") + 1) for text in words]
    body = sum(deep) + BLOCKS + PAD * (len(words) + 1)
    canvas = make_canvas(WIDTH, HEAD + body + FOOT)
    count = len(found.stages)
    title = title or (
        f"{found.model} ({found.backbone}): {count} stage{'s' if count != 1 else ''} "
        "around its blocks"
    )
    canvas.text(MARGIN, 16, title, size=TITLE, bold=True)
    canvas.text(
        MARGIN, 54, "A stage decides what the boxes inside it run on. The solver found this order.",
        size=SMALL, colour=QUIET,
    )  # fmt: skip
    axes = canvas.axes(0, 0, canvas.width, canvas.height)
    axes.set_xlim(0, canvas.width)
    axes.set_ylim(canvas.height, 0)
    axes.set_axis_off()
    top, bottom = HEAD, HEAD + body
    for depth, (stage, text) in enumerate(zip(found.stages, words, strict=True)):
        left = MARGIN + depth * INDENT
        colour = COLOURS[AXES.index(stage.axis)]
        add_box(axes, (left, top, WIDTH - MARGIN - depth * INDENT - left, bottom - top), colour)
        canvas.text(left + PAD + 6, top + PAD, stage.name, size=TEXT + 1.5, bold=True)
        canvas.text(
            WIDTH - MARGIN - depth * INDENT - PAD, top + PAD + 3,
            f"saves {SAVES[stage.axis]}", size=SMALL, colour=colour, align="right",
        )  # fmt: skip
        canvas.text(left + PAD + 6, top + PAD + NAME, text, size=SMALL, colour=INK)
        top += deep[depth]
        bottom -= PAD
    draw_blocks(canvas, axes, found, (MARGIN + count * INDENT, top, bottom))
    return canvas.figure


def describe(stage: StageReason, depth: int) -> str:
    """Return why a stage stands where it stands, and how it is set, in lines that fit its box."""
    room = int((WIDTH - 2 * MARGIN - 2 * depth * INDENT - 2 * PAD - 12) / LETTER)
    settings = ", ".join(f"{key}={value}" for key, value in stage.settings.items())
    parts = [stage.why, *stage.notes, settings]
    return "\n".join(line for part in parts if part for line in textwrap.wrap(part, room))


def add_box(axes: object, place: tuple[float, float, float, float], colour: str) -> None:
    """Draw a box with round corners, pale inside."""
    patches = import_optional("matplotlib.patches", extra="see")
    left, top, width, height = place
    for face, alpha in ((colour, 0.08), ("none", 1.0)):
        axes.add_patch(  # type: ignore[attr-defined]
            patches.FancyBboxPatch(
                (left, top),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=10",
                facecolor=face,
                edgecolor=colour,
                alpha=alpha,
                linewidth=1.4,
            )
        )


def draw_blocks(
    canvas: Canvas, axes: object, found: Explanation, place: tuple[float, float, float]
) -> None:
    """Draw the blocks in the innermost box, one small box each."""
    patches = import_optional("matplotlib.patches", extra="see")
    left, top, _ = place
    first, last = found.span
    canvas.text(left + 6, top + 6, f"blocks {first} to {last - 1}", size=TEXT, bold=True)
    outside = [number for number in range(found.blocks) if not first <= number < last]
    if outside:
        said = f"{len(outside)} more outside all stages"
        canvas.text(WIDTH - left - 6, top + 8, said, size=SMALL, colour=QUIET, align="right")
    count, room = last - first, WIDTH - 2 * left - 12
    pitch = min(48.0, room / count)
    for number in range(count):
        axes.add_patch(  # type: ignore[attr-defined]
            patches.Rectangle(
                (left + 6 + number * pitch, top + 36),
                0.82 * pitch,
                20,
                facecolor=QUIET,
                edgecolor="none",
            )
        )
