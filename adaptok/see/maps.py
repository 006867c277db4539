"""Maps of the router's decisions, over the images that they were made for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
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
from adaptok.see.cells import shade_cells
from adaptok.tokens import check_grid

if TYPE_CHECKING:
    import matplotlib.figure

MARGIN, GAP, LONGEST, LABELS = 28, 10, 192, 172


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One step of a trajectory, of one image.

    Args:
        noise: fraction of the diffusion time, 1 is pure noise and 0 a clean image.
        noisy: what the model is given, RGB pixels, `(3 h w)`.
        clean: the clean image that the model sees in it, RGB pixels, `(3 h w)`.
        keep_prob: keep probability of each cell, `(n)`.
        keep_mask: cells that are kept, `(n)`.
        grid: height and width in cells.

    Raises:
        ShapeError: the parts do not fit each other.
    """

    noise: float
    noisy: UInt8[Tensor, "3 h w"]
    clean: UInt8[Tensor, "3 h w"]
    keep_prob: Float[Tensor, " n"]
    keep_mask: Bool[Tensor, " n"]
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        check_grid(self.grid, self.keep_prob.shape[0])
        check_grid(self.grid, self.keep_mask.shape[0])

    @property
    def kept(self) -> float:
        """Fraction of the cells that are kept."""
        return float(self.keep_mask.float().mean())


@dataclass(frozen=True, slots=True, eq=False)
class Denoised:
    """A real image that was noised and denoised.

    Args:
        name: what it shows.
        original: RGB pixels, `(3 h w)`.
        result: the denoised image, RGB pixels, `(3 h w)`.
        first: the step in which denoising began.
        last: the last step.
    """

    name: str
    original: UInt8[Tensor, "3 h w"]
    result: UInt8[Tensor, "3 h w"]
    first: Frame
    last: Frame


def shade_dropped(
    image: UInt8[Tensor, "3 h w"], keep_mask: Bool[Tensor, " n"], grid: tuple[int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """Darken the cells of an image that are not kept.

    Args:
        image: RGB pixels, a whole number of pixels per cell.
        keep_mask: cells that are kept, `(n)`.
        grid: height and width in cells.

    Returns:
        The image, kept cells unchanged.

    Raises:
        ShapeError: grid, mask and image do not fit each other.

    Example:
        >>> import torch
        >>> image = torch.full((3, 2, 4), 200, dtype=torch.uint8)
        >>> shade_dropped(image, torch.tensor([True, False]), (1, 2))[0, :, 0]
        array([200, 200,  64,  64], dtype=uint8)
    """
    check_grid(grid, keep_mask.shape[0])
    pixels = to_array(image)
    h, w = pixels.shape[:2]
    if h % grid[0] or w % grid[1]:
        raise ShapeError(
            f"an image of {h} x {w} pixels does not divide into {grid[0]} x {grid[1]} cells"
        )
    return shade_cells(pixels, keep_mask.cpu().numpy().reshape(grid))


def draw_trajectory(
    frames: Sequence[Frame], *, title: str = "Where the model spends its tokens"
) -> "matplotlib.figure.Figure":
    """Draw an image on its way from noise: input, prediction, keep probability, kept cells.

    Args:
        frames: the steps to show, the noisiest first.
        title: headline.

    Returns:
        The figure: four axes per step, row by row, and the colour bar.

    Raises:
        ShapeError: there is no frame.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
        >>> prob = torch.rand(64)
        >>> frame = Frame(0.5, image, image, prob, prob > 0.5, (8, 8))
        >>> len(draw_trajectory([frame, frame]).axes)
        9
    """
    if not frames:
        raise ShapeError("a trajectory needs at least one frame")
    _, h, w = frames[0].noisy.shape
    box = fit_box(h, w, LONGEST)
    head, foot = 128, 24
    step = box[1] + GAP
    canvas = make_canvas(
        MARGIN + LABELS + len(frames) * (box[0] + GAP) + 100, head + 4 * step + foot
    )
    canvas.text(MARGIN, 22, title, size=TITLE, bold=True)
    canvas.text(MARGIN, head - 54, "noise level\ncells kept", size=TEXT, colour=QUIET)
    rows = (
        "what the\nmodel is given",
        "the clean image\nit sees there",
        "keep\nprobability",
        "kept cells\n(others dark)",
    )
    for row, label in enumerate(rows):
        middle = head + row * step + box[1] / 2
        canvas.text(MARGIN, middle, label, size=TEXT, anchor="center")
    left = MARGIN + LABELS
    for row in range(4):
        for index, frame in enumerate(frames):
            place = (left + index * (box[0] + GAP), head + row * step)
            if row == 0:
                canvas.text(
                    place[0] + box[0] / 2,
                    head - 54,
                    f"{frame.noise:.0%}\n{frame.kept:.1%}",
                    size=TEXT,
                    align="center",
                )
                canvas.image(*place, box, to_array(frame.noisy))
            elif row == 1:
                canvas.image(*place, box, to_array(frame.clean))
            elif row == 2:
                shown = canvas.map(*place, box, map_of(frame))
            else:
                canvas.image(*place, box, shade_dropped(frame.clean, frame.keep_mask, frame.grid))
    right = left + len(frames) * (box[0] + GAP)
    canvas.colour_bar(right + 6, head + 2 * step, (14, box[1]), shown, "keep probability")
    return canvas.figure


def draw_denoised(
    examples: Sequence[Denoised], *, title: str = "Real images, noised and denoised"
) -> "matplotlib.figure.Figure":
    """Draw real images, their noised and denoised forms, and the maps of both ends.

    Args:
        examples: one row each.
        title: headline.

    Returns:
        The figure: six axes per example, row by row, and a colour bar.

    Raises:
        ShapeError: there is no example.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
        >>> prob = torch.rand(64)
        >>> frame = Frame(0.5, image, image, prob, prob > 0.5, (8, 8))
        >>> len(draw_denoised([Denoised("cat", image, image, frame, frame)]).axes)
        7
    """
    if not examples:
        raise ShapeError("denoised images need at least one example")
    _, h, w = examples[0].original.shape
    box = fit_box(h, w, LONGEST)
    head, below, columns = 128, 34, 6
    step = box[1] + GAP + below
    canvas = make_canvas(
        2 * MARGIN + columns * (box[0] + GAP) + 72, head + len(examples) * step + 12
    )
    canvas.text(MARGIN, 22, title, size=TITLE, bold=True)
    titles = (
        "original",
        "noised",
        "denoised",
        "keep probability\nat the start",
        "kept cells\nat the start",
        "kept cells\nat the end",
    )
    for index, label in enumerate(titles):
        middle = MARGIN + index * (box[0] + GAP) + box[0] / 2
        canvas.text(middle, head - 18, label, align="center", anchor="baseline")
    for row, example in enumerate(examples):
        top = head + row * step
        draw_example(canvas, example, top, box)
    return canvas.figure


def draw_example(canvas: Canvas, example: Denoised, top: int, box: tuple[int, int]) -> None:
    """Draw one row of `draw_denoised`."""
    first, last = example.first, example.last
    lefts = [MARGIN + index * (box[0] + GAP) for index in range(6)]
    canvas.image(lefts[0], top, box, to_array(example.original))
    canvas.image(lefts[1], top, box, to_array(first.noisy))
    canvas.image(lefts[2], top, box, to_array(example.result))
    shown = canvas.map(lefts[3], top, box, map_of(first))
    canvas.image(lefts[4], top, box, shade_dropped(first.clean, first.keep_mask, first.grid))
    canvas.image(lefts[5], top, box, shade_dropped(last.clean, last.keep_mask, last.grid))
    captions = {
        0: example.name,
        1: f"{first.noise:.0%} noise",
        4: f"{first.kept:.1%} kept",
        5: f"{last.kept:.1%} kept",
    }
    for index, caption in captions.items():
        canvas.text(
            lefts[index] + box[0] / 2,
            top + box[1] + 22,
            caption,
            size=SMALL,
            colour=QUIET,
            align="center",
            anchor="baseline",
        )
    if top < 200:  # one bar serves all rows
        canvas.colour_bar(lefts[5] + box[0] + 16, top, (14, box[1]), shown, "keep probability")


def map_of(frame: Frame) -> Float[np.ndarray, "h w"]:
    """Return the keep probabilities of a frame on their grid."""
    h, w = frame.grid
    values = frame.keep_prob.detach().float().cpu().numpy()
    return rearrange(values, "(h w) -> h w", h=h, w=w)
