"""Nearest kept cell of every cell, exactly, without comparing all pairs."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from adaptok.tokens import Grid, check_grid

# Larger than any key of a grid, and far from overflow when squared offsets are added to it.
FAR = 1 << 60


def find_nearest(
    keep_mask: Bool[Tensor, "b n"], grid: Grid, reach: int | None = None
) -> Int[Tensor, "b n"]:
    """Find the nearest kept cell of every cell (Euclidean; a tie goes to the lower index).

    One pass along each axis: the last axis by running maxima and minima, the others by a
    window of `reach` cells to both sides. Distance and index are one integer key, so that
    the smallest key is the nearest cell with ties resolved.

    Args:
        keep_mask: the kept cells, at least one per sample, `(b n)`.
        grid: lengths of the grid axes; any number of them.
        reach: a bound on the distance to the nearest kept cell, such as `reach_of` gives;
            None looks along whole axes.

    Returns:
        Flat index of the nearest kept cell, `(b n)`.

    Raises:
        ShapeError: the mask does not fit the grid.

    Example:
        >>> mask = torch.tensor([[True, False, False, False, False, True]])
        >>> find_nearest(mask, (2, 3))
        tensor([[0, 0, 5, 0, 5, 5]])
    """
    b, n = keep_mask.shape
    check_grid(grid, n)
    key = find_nearest_in_rows(keep_mask, grid)
    for axis in range(1, len(grid)):  # all axes of the grid but its last, after the batch
        length = grid[axis - 1]
        side = length - 1 if reach is None else min(reach, length - 1)
        if side > 0:
            key = take_smallest_along(key, axis, side, n)
    return (key % n).reshape(b, n)


def find_nearest_in_rows(keep_mask: Bool[Tensor, "b n"], grid: Grid) -> Int[Tensor, "b ..."]:
    """Return the key (squared distance * n + flat index) of the nearest kept cell in its row."""
    b, n = keep_mask.shape
    width = grid[-1]
    mask = keep_mask.reshape(b, *grid)
    columns = torch.arange(width, device=mask.device)
    left = torch.where(mask, columns, -n).cummax(-1).values
    right = torch.where(mask, columns, 2 * n).flip(-1).cummin(-1).values.flip(-1)
    to_left, to_right = columns - left, right - columns
    nearest = torch.where(to_left <= to_right, left, right)
    distance = torch.minimum(to_left, to_right)
    starts = torch.arange(0, n, width, device=mask.device).reshape(*grid[:-1], 1)
    return torch.where(distance < n, distance.square() * n + starts + nearest, FAR)


def take_smallest_along(
    key: Int[Tensor, "b ..."], axis: int, side: int, n: int
) -> Int[Tensor, "b ..."]:
    """Return the smallest key within a window along an axis, squared offsets added."""
    offsets = torch.arange(-side, side + 1, device=key.device).square() * n
    padding = [0, 0] * (key.ndim - 1 - axis) + [side, side]
    padded = torch.nn.functional.pad(key, padding, value=FAR)
    return (padded.unfold(axis, 2 * side + 1, 1) + offsets).amin(-1)


def reach_of(keep_mask: Bool[Tensor, "b n"], grid: Grid) -> Int[Tensor, ""]:
    """Bound the distance from any cell to its nearest kept cell, in time linear in the cells.

    The bound is the largest city-block distance, which running minima give exactly.

    Args:
        keep_mask: the kept cells, at least one per sample, `(b n)`.
        grid: lengths of the grid axes.

    Returns:
        The bound, one number on the device of the mask.

    Example:
        >>> reach_of(torch.tensor([[True, False, False, False, False, False]]), (2, 3))
        tensor(3)
    """
    far = sum(grid)
    distance = torch.where(keep_mask.reshape(-1, *grid), 0, far)
    for axis, length in enumerate(grid, start=1):
        shape = [1] * distance.ndim
        shape[axis] = length
        steps = torch.arange(length, device=distance.device).reshape(shape)
        before = (distance - steps).cummin(axis).values + steps
        behind = (distance + steps).flip(axis).cummin(axis).values.flip(axis) - steps
        distance = torch.minimum(before, behind)
    return distance.amax()
