"""Cells of an image: which pixels belong to which, and what a token makes of them."""

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from adaptok.errors import DtypeError, ShapeError
from adaptok.tokens import Grid

SHADE = np.array([26.0, 32.0, 48.0])  # what dropped cells fade to
FADE = 0.78
GONE = np.array([214.0, 218.0, 226.0])  # cells that no token stands for


def read_image(image: Shaped[Tensor, "*b 3 h w"], sample: int = 0) -> UInt8[np.ndarray, "h w 3"]:
    """Return one image as pixels.

    Args:
        image: one image or a batch; uint8, or floats in [0, 1].
        sample: which image of a batch.

    Returns:
        RGB pixels, a copy.

    Raises:
        ShapeError: it is no image, or the batch has no such sample.
        DtypeError: floats are outside [0, 1], or it has another dtype.

    Example:
        >>> import torch
        >>> read_image(torch.ones(2, 3, 4, 6), sample=1).shape
        (4, 6, 3)
    """
    if image.ndim == 4:
        if not -image.shape[0] <= sample < image.shape[0]:
            raise ShapeError(f"there is no image {sample} in a batch of {image.shape[0]}")
        image = image[sample]
    if image.ndim != 3 or image.shape[0] != 3:
        raise ShapeError(f"an image needs the shape (3, h, w), got {tuple(image.shape)}")
    pixels: np.ndarray = image.detach().cpu().permute(1, 2, 0).float().numpy()
    if image.is_floating_point():
        if not (pixels.min() >= 0.0 and pixels.max() <= 1.0):
            raise DtypeError(
                f"pixels as floats lie in [0, 1], got {pixels.min():g} to {pixels.max():g}: give "
                "the picture as it was before it was normalised, or uint8"
            )
        pixels = 255.0 * pixels
    elif str(image.dtype) != "torch.uint8":
        raise DtypeError(f"pixels are uint8 or floats in [0, 1], got {image.dtype}")
    return pixels.round().astype(np.uint8)


def locate_cells(height: int, width: int, grid: tuple[int, int]) -> Int[np.ndarray, "h w"]:
    """Return the flat cell of each pixel; cells need not have a whole number of pixels.

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        grid: height and width in cells.

    Raises:
        ShapeError: the image has fewer pixels than the grid has cells along an axis.

    Example:
        >>> locate_cells(2, 5, (1, 2))
        array([[0, 0, 0, 1, 1],
               [0, 0, 0, 1, 1]])
    """
    if height < grid[0] or width < grid[1]:
        raise ShapeError(
            f"an image of {height} x {width} pixels is too small for {grid[0]} x {grid[1]} cells"
        )
    rows = np.arange(height) * grid[0] // height
    columns = np.arange(width) * grid[1] // width
    cells: Int[np.ndarray, "h w"] = rows[:, None] * grid[1] + columns
    return cells


def flat_grid(grid: Grid) -> tuple[int, int]:
    """Return height and width of a grid that can be drawn.

    Args:
        grid: lengths of the grid axes; frames of a video are drawn one by one.

    Raises:
        ShapeError: the cells lie on a line.

    Example:
        >>> flat_grid((4, 16, 24))
        (16, 24)
    """
    if len(grid) < 2:
        raise ShapeError(
            f"cells on a grid {grid} have no places in an image: a picture needs height and width. "
            "A wrapped DCDiT shows only the tokens behind its own chunker"
        )
    return grid[-2], grid[-1]


def shade_cells(
    pixels: UInt8[np.ndarray, "h w 3"],
    keep: Bool[np.ndarray, "gh gw"],
    shade: Float[np.ndarray, " 3"] = SHADE,
    fade: float = FADE,
) -> UInt8[np.ndarray, "h w 3"]:
    """Fade the cells of an image that are not kept.

    Args:
        pixels: the image.
        keep: cells that stay as they are.
        shade: colour that the others fade to.
        fade: how far, in [0, 1].

    Example:
        >>> pixels = np.full((1, 2, 3), 200, np.uint8)
        >>> shade_cells(pixels, np.array([[True, False]]))[0, :, 0]
        array([200,  64], dtype=uint8)
    """
    mask = keep.ravel()[locate_cells(pixels.shape[0], pixels.shape[1], keep.shape)][..., None]
    faded = (1 - fade) * pixels + fade * shade
    return np.where(mask, pixels, faded.round().astype(np.uint8))


def paint_groups(
    pixels: UInt8[np.ndarray, "h w 3"], token: Int[np.ndarray, "gh gw"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Give each cell the mean colour of all cells that its token stands for.

    Args:
        pixels: the image.
        token: the token of each cell, -1 where none stands for it; those fade.

    Example:
        >>> pixels = np.array([[[0] * 3, [100] * 3, [9] * 3]], np.uint8)
        >>> paint_groups(pixels, np.array([[0, 0, 1]]))[0, :, 0]
        array([50, 50,  9], dtype=uint8)
    """
    places = locate_cells(pixels.shape[0], pixels.shape[1], token.shape)
    owner = token.ravel()[places]
    slot = np.where(owner < 0, token.max() + 1, owner).ravel()
    counts = np.maximum(1, np.bincount(slot))
    bands = [np.bincount(slot, pixels[..., band].ravel()) / counts for band in range(3)]
    painted = np.stack(bands, axis=-1)[slot].reshape(pixels.shape)
    pale = 0.2 * pixels + 0.8 * GONE
    return np.where((owner < 0)[..., None], pale, painted).round().astype(np.uint8)


def find_borders(token: Shaped[np.ndarray, "gh gw"]) -> Float[np.ndarray, "k 2 2"]:
    """Return the lines between neighbouring cells of different tokens.

    Args:
        token: the token of each cell.

    Returns:
        Both ends of each line, x before y, in cells from the upper left corner.

    Example:
        >>> find_borders(np.array([[0, 0, 1]])).tolist()
        [[[2.0, 0.0], [2.0, 1.0]]]
    """
    rows, columns = np.nonzero(token[:, 1:] != token[:, :-1])
    upright = [[columns + 1, rows], [columns + 1, rows + 1]]
    below, along = np.nonzero(token[1:] != token[:-1])
    level = [[along, below + 1], [along + 1, below + 1]]
    lines = [np.array(ends, dtype=np.float64).transpose(2, 0, 1) for ends in (upright, level)]
    return np.concatenate(lines)


def count_carried(token: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """Return for each cell how many cells its token stands for; 0 where there is no token.

    Args:
        token: the token of each cell of one sample, -1 for none.

    Example:
        >>> count_carried(np.array([0, 0, 2, -1]))
        array([2, 2, 1, 0])
    """
    slot = np.where(token < 0, token.max(initial=0) + 1, token)
    counts = np.bincount(slot.ravel())[slot]
    carried: Int[np.ndarray, "*shape"] = np.where(token < 0, 0, counts)
    return carried
