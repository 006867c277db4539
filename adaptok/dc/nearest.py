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

    One pass along each axis: the last axis by running maxima and minima, the others by
    comparing the places within `reach`. Distance and index are one integer key, so that the
    smallest key is the nearest cell with ties resolved.

    Args:
        keep_mask: the kept cells, at least one per sample, `(b n)`.
        grid: lengths of the grid axes; any number of them.
        reach: a bound on the distance to the nearest kept cell, such as `reach_of` gives;
            None looks along whole axes, without a loop (for compiled graphs).

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
        if length > 1 and reach is None:
            key = take_smallest_along(key, axis, n)
        elif length > 1 and reach is not None:
            key = take_smallest_near(key, axis, min(reach, length - 1), n)
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


def take_smallest_along(key: Int[Tensor, "b ..."], axis: int, n: int) -> Int[Tensor, "b ..."]:
    """Return the smallest key along a whole axis, squared offsets added: one fused operation."""
    length = key.shape[axis]
    at = torch.arange(length, device=key.device)
    offsets = (at[:, None] - at).square() * n  # from each place to each other
    offsets = offsets.reshape(length, length, *[1] * (key.ndim - 1 - axis))
    return (key.unsqueeze(axis) + offsets).amin(axis + 1)


def take_smallest_near(
    key: Int[Tensor, "b ..."], axis: int, reach: int, n: int
) -> Int[Tensor, "b ..."]:
    """Return the smallest key within reach along an axis, squared offsets added.

    One shifted slice after the other: the work per cell follows the reach, not the axis.
    """
    smallest, length = key.clone(), key.shape[axis]
    for offset in range(1, reach + 1):
        cost, rest = offset * offset * n, length - offset
        low, high = (smallest.narrow(axis, start, rest) for start in (0, offset))
        torch.minimum(low, key.narrow(axis, offset, rest) + cost, out=low)
        torch.minimum(high, key.narrow(axis, 0, rest) + cost, out=high)
    return smallest


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
