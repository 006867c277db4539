"""A figure measured in pixels, so that the cells of small images come out crisp."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from adaptok.errors import ShapeError, StorageError
from adaptok.optional import import_optional

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import matplotlib.text

DPI = 160
INK = "#1f2430"
QUIET = "#5b6475"
LINE = "#c9ced8"
PAPER = "white"
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MAP_COLOURS = "viridis"

TITLE, TEXT, SMALL = 11.0, 8.5, 7.5


@dataclass(frozen=True, slots=True, eq=False)
class Canvas:
    """A white figure; all places count in pixels from the upper left corner.

    Args:
        figure: the figure.
        width: pixels.
        height: pixels.
    """

    figure: "matplotlib.figure.Figure"
    width: int
    height: int

    def axes(self, left: float, top: float, width: float, height: float) -> "matplotlib.axes.Axes":
        """Add axes at a place."""
        return self.figure.add_axes(
            (
                left / self.width,
                1 - (top + height) / self.height,
                width / self.width,
                height / self.height,
            )
        )

    def text(
        self,
        left: float,
        top: float,
        text: str,
        *,
        size: float = TEXT,
        bold: bool = False,
        colour: str = INK,
        align: Literal["left", "center", "right"] = "left",
        anchor: Literal["top", "center", "baseline"] = "top",
    ) -> "matplotlib.text.Text":
        """Write text whose upper edge, middle or (last) base line is at a place."""
        return self.figure.text(
            left / self.width,
            1 - top / self.height,
            text,
            fontsize=size,
            fontweight="bold" if bold else "normal",
            color=colour,
            ha=align,
            va=anchor,
            linespacing=1.35,
        )

    def image(
        self, left: float, top: float, size: tuple[int, int], pixels: UInt8[np.ndarray, "h w 3"]
    ) -> "matplotlib.axes.Axes":
        """Show pixels as they are in a box of a width and height."""
        axes = self.axes(left, top, *size)
        axes.imshow(pixels, interpolation="nearest")
        frame_image(axes)
        return axes

    def map(
        self, left: float, top: float, size: tuple[int, int], values: Float[np.ndarray, "h w"]
    ) -> Any:  # noqa: ANN401
        """Show values between 0 and 1 as colours; returns what a colour bar is made from."""
        axes = self.axes(left, top, *size)
        shown = axes.imshow(values, vmin=0, vmax=1, cmap=MAP_COLOURS, interpolation="nearest")
        frame_image(axes)
        return shown

    def colour_bar(
        self,
        left: float,
        top: float,
        size: tuple[int, int],
        shown: Any,  # noqa: ANN401
        label: str,
    ) -> None:
        """Draw the colour bar of a map between 0 and 1."""
        axes = self.axes(left, top, *size)
        bar = self.figure.colorbar(shown, cax=axes, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["0", "0.5", "1"])
        bar.ax.tick_params(labelsize=SMALL, colors=QUIET, length=2)
        bar.set_label(label, fontsize=SMALL, color=QUIET)
        bar.outline.set_edgecolor(LINE)


def make_canvas(width: int, height: int) -> Canvas:
    """Make an empty canvas.

    Args:
        width: pixels.
        height: pixels.

    Returns:
        The canvas.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    figures = import_optional("matplotlib.figure", extra="see")
    figure = figures.Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
    return Canvas(figure, width, height)


def frame_image(axes: "matplotlib.axes.Axes") -> None:
    """Take ticks away and draw a thin frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(LINE)
        spine.set_linewidth(0.6)


def fit_box(height: int, width: int, longest: int) -> tuple[int, int]:
    """Return width and height of a box for an image, a whole multiple of it where it fits.

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        longest: the longer side of the box in pixels, about.

    Returns:
        Width and height of the box.

    Example:
        >>> fit_box(32, 32, 200), fit_box(16, 32, 200), fit_box(500, 1000, 200)
        ((192, 192), (192, 96), (200, 100))
    """
    side = max(height, width)
    if side > longest:
        return max(1, width * longest // side), max(1, height * longest // side)
    factor = longest // side
    return width * factor, height * factor


def to_array(image: UInt8[Tensor, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image as matplotlib wants it.

    Args:
        image: RGB pixels, `(3 h w)`.

    Returns:
        The same pixels, `(h w 3)`.

    Raises:
        ShapeError: the image is not RGB.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ShapeError(f"an image needs the shape (3, h, w), got {tuple(image.shape)}")
    return np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy())


def check_ending(path: str | Path) -> None:
    """Raise a `StorageError` if no picture can be written under a name, before it is drawn.

    Args:
        path: the file.
    """
    backends = import_optional("matplotlib.backend_bases", extra="see")
    known = backends.FigureCanvasBase.get_supported_filetypes()
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending and ending not in known:
        raise StorageError(
            f"cannot write the picture {path}: {ending!r} is no format of pictures, use an ending "
            "such as .png"
        )


def save_figure(figure: "matplotlib.figure.Figure", path: str | Path) -> Path:
    """Write a figure to a file; its ending (`.png`, `.svg`, `.pdf`) says the format.

    Args:
        figure: the figure.
        path: the file; folders on the way are made.

    Returns:
        The path.

    Raises:
        StorageError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot write the picture {path}: {error}. Choose another place, free some space, or "
            "use an ending such as .png"
        ) from error
    return path
