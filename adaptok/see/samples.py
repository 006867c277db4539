"""Samples side by side: one row per budget, with what it costs."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import UInt8
from torch import Tensor

from adaptok.errors import ShapeError
from adaptok.see.canvas import (
    QUIET,
    SMALL,
    TEXT,
    TITLE,
    Canvas,
    fit_box,
    make_canvas,
    to_array,
)

if TYPE_CHECKING:
    import matplotlib.figure

MARGIN, GAP, LONGEST = 28, 12, 192
NARROWEST = 960  # the headline needs so much
ABOVE, BELOW, LINE = 46, 36, 23


@dataclass(frozen=True, slots=True, eq=False)
class SampleRow:
    """Images that were drawn under one budget, and what a step costs for one image.

    Args:
        name: the budget in words.
        images: RGB pixels, `(b 3 h w)`.
        tokens: tokens that ran for each image, mean over steps, `b` numbers; a model that
            runs twice for guidance counts both runs.
        gflops: GFLOPs of one step for one image.
        ms: measured milliseconds of one step for one image.
        names: what each image shows, where the columns have no common names.

    Raises:
        ShapeError: images and token counts differ in number.
    """

    name: str
    images: UInt8[Tensor, "b 3 h w"]
    tokens: tuple[float, ...]
    gflops: float
    ms: float
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.shape[0] != len(self.tokens) or not self.tokens:
            raise ShapeError(
                f"a row needs one token count per image, got {len(self.tokens)} counts for "
                f"{self.images.shape[0]} images"
            )
        if self.names and len(self.names) != len(self.tokens):
            raise ShapeError(
                f"a row needs one name per image, got {len(self.names)} for {len(self.tokens)}"
            )

    def describe_cost(self) -> str:
        """Say what a step costs."""
        mean = sum(self.tokens) / len(self.tokens)
        return f"{mean:,.0f} tokens  ·  {self.gflops:.2f} GFLOPs  ·  {self.ms:.1f} ms"


def draw_sample_grid(
    rows: Sequence[SampleRow],
    columns: Sequence[str] = (),
    *,
    title: str = "The same seeds under different budgets",
    note: str = "per image and sampling step; a guided step runs the model twice",
) -> "matplotlib.figure.Figure":
    """Draw samples by budget, with tokens, GFLOPs and measured milliseconds.

    Args:
        rows: one per budget.
        columns: what each column shows, such as class names; without them a row names its
            own images.
        title: headline.
        note: what the costs refer to.

    Returns:
        The figure: one axes per image, row by row.

    Raises:
        ShapeError: there is no row, or a row has not one image per column.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
        >>> row = SampleRow("drop 0.3", images, tokens=(10.0, 14.0), gflops=0.31, ms=2.4)
        >>> len(draw_sample_grid([row], ["cat", "dog"]).axes)
        2
    """
    if not rows:
        raise ShapeError("a grid of samples needs at least one row")
    for row in rows:
        if columns and row.images.shape[0] != len(columns):
            raise ShapeError(
                f"the row {row.name!r} has {row.images.shape[0]} images for {len(columns)} columns"
            )
    _, _, h, w = rows[0].images.shape
    box = fit_box(h, w, LONGEST)
    most = max(len(row.tokens) for row in rows)
    full = max(NARROWEST, MARGIN * 2 + most * (box[0] + GAP) - GAP)
    lines = 1 if columns else 2
    words = wrap_lines(note, full - 2 * MARGIN)
    head = 67 + words.count("\n") * LINE + (56 if columns else LINE)
    deep = ABOVE + box[1] + BELOW + (lines - 1) * LINE
    canvas = make_canvas(full, head + len(rows) * deep + MARGIN // 2)
    canvas.text(MARGIN, 22, title, size=TITLE, bold=True)
    canvas.text(MARGIN, 59, words, size=SMALL, colour=QUIET)
    for index, column in enumerate(columns):
        middle = MARGIN + index * (box[0] + GAP) + box[0] / 2
        canvas.text(middle, head - 6, shorten(column, box[0]), align="center", anchor="baseline")
    for place, row in enumerate(rows):
        draw_row(canvas, row, head + place * deep, box)
    return canvas.figure


def draw_row(canvas: Canvas, row: SampleRow, top: int, box: tuple[int, int]) -> None:
    """Draw one row: its name, its cost, and its images with their tokens."""
    canvas.text(MARGIN, top + 32, row.name, size=TEXT + 1, bold=True, anchor="baseline")
    canvas.text(
        canvas.width - MARGIN, top + 32, row.describe_cost(), align="right", anchor="baseline"
    )
    for index, (image, tokens) in enumerate(zip(row.images, row.tokens, strict=True)):
        left = MARGIN + index * (box[0] + GAP)
        canvas.image(left, top + ABOVE, box, to_array(image))
        captions = [f"{tokens:,.0f} tokens"]
        if row.names:
            captions.insert(0, shorten(row.names[index], box[0]))
        for line, caption in enumerate(captions, start=1):
            canvas.text(
                left + box[0] / 2,
                top + ABOVE + box[1] + line * LINE - 1,
                caption,
                size=SMALL,
                colour=QUIET,
                align="center",
                anchor="baseline",
            )


def wrap_lines(text: str, width: int) -> str:
    """Break small text into lines of so many pixels, about."""
    room = width // 9
    return "\n".join(part for line in text.splitlines() for part in textwrap.wrap(line, room))


def shorten(name: str, width: int) -> str:
    """Cut a name to what fits over a column of so many pixels."""
    room = max(6, width // 10)
    return name if len(name) <= room else name[: room - 1].rstrip(" &-") + "…"
