"""Panels: an image with the borders of its tokens, or a map of values, in rows with titles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from adaptok.errors import ShapeError
from adaptok.optional import import_optional
from adaptok.see.canvas import INK, QUIET, SMALL, TITLE, Canvas, fit_box, make_canvas
from adaptok.see.cells import find_borders
from adaptok.see.samples import shorten, wrap_lines

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

BOX, MARGIN, GAP, LABEL, NOTE = 300, 28, 20, 30, 23
NARROWEST = 760  # a headline needs so much
HATCHED = "Hatched: no token stands for these cells."


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """One picture of a row.

    Args:
        title: what it shows, over it on the left.
        pixels: the image, or what became of it.
        note: a figure, over it on the right.
        token: the token of each cell, -1 for none: draws borders between tokens, and hatches
            cells without one.
        values: a number in [0, 1] for each cell; drawn as colours instead of the pixels.
        dots: flat cells with a white dot.
    """

    title: str
    pixels: UInt8[np.ndarray, "h w 3"]
    note: str = ""
    token: Int[np.ndarray, "gh gw"] | None = None
    values: Float[np.ndarray, "gh gw"] | None = None
    dots: tuple[int, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether there are cells that no token stands for."""
        return self.token is not None and bool((self.token < 0).any())


@dataclass(frozen=True, slots=True, eq=False)
class PanelRow:
    """Panels side by side.

    Args:
        panels: from left to right.
        name: over the row; empty where the titles of the panels say it all.
    """

    panels: tuple[Panel, ...]
    name: str = ""


def draw_panel_rows(
    rows: Sequence[PanelRow], *, title: str, note: str = "", size: int = BOX
) -> "matplotlib.figure.Figure":
    """Draw rows of panels below a headline.

    Args:
        rows: the rows.
        title: headline.
        note: how to read it, in small letters below; what hatching means is added.
        size: the longer edge of a panel in pixels, about.

    Returns:
        The figure: one axes per panel, row by row, then a colour bar if there is a map of values.

    Raises:
        ShapeError: there is no panel.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> panel = Panel("the image", np.zeros((8, 8, 3), np.uint8), token=np.eye(2, dtype=int))
        >>> len(draw_panel_rows([PanelRow((panel, panel))], title="Tokens").axes)
        2
    """
    if not rows or not all(row.panels for row in rows):
        raise ShapeError("a picture of panels needs at least one row with at least one panel")
    if any(panel.lost for row in rows for panel in row.panels):
        note = f"{note} {HATCHED}".strip()
    h, w = rows[0].panels[0].pixels.shape[:2]
    box = fit_box(h, w, size)
    columns = max(len(row.panels) for row in rows)
    valued = any(panel.values is not None for row in rows for panel in row.panels)
    inner = columns * (box[0] + GAP) - GAP
    width = max(NARROWEST, 2 * MARGIN + inner + (76 if valued else 0))
    words = wrap_lines(note, width - 2 * MARGIN)
    head = 54 + (NOTE * (words.count("\n") + 1) + 8 if words else 0)
    deep = [LABEL * (1 + bool(row.name)) + box[1] + GAP for row in rows]
    canvas = make_canvas(width, head + sum(deep) + MARGIN - GAP)
    canvas.text(MARGIN, 16, title, size=TITLE, bold=True)
    canvas.text(MARGIN, 50, words, size=SMALL, colour=QUIET)
    shown: tuple[Any, int] | None = None
    for number, row in enumerate(rows):
        top = head + sum(deep[:number])
        if row.name:
            canvas.text(MARGIN, top, row.name, bold=True)
            top += LABEL
        for place, panel in enumerate(row.panels):
            drawn = draw_panel(canvas, (MARGIN + place * (box[0] + GAP), top), box, panel)
            if panel.values is not None and shown is None:
                shown = (drawn, top + LABEL)
    if shown is not None:
        canvas.colour_bar(MARGIN + inner + 16, shown[1], (14, box[1]), shown[0], "keep probability")
    return canvas.figure


def draw_panel(canvas: Canvas, place: tuple[int, int], box: tuple[int, int], panel: Panel) -> Any:  # noqa: ANN401
    """Draw one panel with its title and note.

    Args:
        canvas: where.
        place: left and upper edge of its title.
        box: width and height of the picture.
        panel: what.

    Returns:
        What a colour bar is made from, if it is a map of values, else the axes.
    """
    left, top = place
    room = box[0] - 10 * len(panel.note) - 16  # beside the note
    canvas.text(left, top, shorten(panel.title, room * 5 // 6), bold=True)
    canvas.text(left + box[0], top + 3, panel.note, size=SMALL, colour=QUIET, align="right")
    return draw_cells(canvas, (left, top + LABEL), box, panel)


def draw_cells(canvas: Canvas, place: tuple[int, int], box: tuple[int, int], panel: Panel) -> Any:  # noqa: ANN401
    """Draw the picture of a panel (see `draw_panel`), its upper left corner at a place."""
    if panel.values is not None:
        return canvas.map(*place, box, panel.values)
    axes = canvas.image(*place, box, panel.pixels)
    if panel.token is not None:
        draw_borders(axes, panel.pixels.shape[:2], panel.token, thin=box[0] < 200)
    if panel.dots and panel.token is not None:
        draw_dots(axes, panel.pixels.shape[:2], panel.token.shape, panel.dots)
    return axes


def draw_borders(
    axes: "matplotlib.axes.Axes",
    pixels: tuple[int, ...],
    token: Int[np.ndarray, "gh gw"],
    *,
    thin: bool = False,
) -> None:
    """Draw lines between the cells of different tokens, and hatch cells without one.

    Args:
        axes: shows the image.
        pixels: height and width of the image.
        token: the token of each cell, -1 for none.
        thin: draw finer lines, for small pictures.
    """
    collections = import_optional("matplotlib.collections", extra="see")
    scale = np.array([pixels[1] / token.shape[1], pixels[0] / token.shape[0]])
    lines = list(find_borders(token) * scale - 0.5)
    for colour, width in (("white", 1.3), (INK, 0.6)):
        axes.add_collection(
            collections.LineCollection(
                lines, colors=colour, linewidths=width * (0.6 if thin else 1.0)
            )
        )
    rows, columns = np.nonzero(token < 0)
    corners = np.stack([columns, rows], axis=1)[:, None] + np.array(
        [[0, 0], [1, 0], [1, 1], [0, 1]]
    )
    if len(corners):
        axes.add_collection(
            collections.PolyCollection(
                list(corners * scale - 0.5),
                facecolors="none",
                edgecolors=QUIET,
                hatch="//////",
                linewidths=0,
                hatch_linewidth=0.5,
            )
        )


def draw_dots(
    axes: "matplotlib.axes.Axes",
    pixels: tuple[int, ...],
    grid: tuple[int, ...],
    dots: Sequence[int],
) -> None:
    """Draw a white dot in the middle of some cells."""
    rows, columns = np.unravel_index(np.array(dots), grid)
    axes.plot(
        (columns + 0.5) * pixels[1] / grid[1] - 0.5,
        (rows + 0.5) * pixels[0] / grid[0] - 0.5,
        "o",
        color="white",
        markersize=3.8,
        markeredgecolor=INK,
        markeredgewidth=0.8,
    )
