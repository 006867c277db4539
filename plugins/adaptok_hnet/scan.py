"""Scan orders: ways to walk through all cells of a grid, one after the other."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from adaptok.errors import ConfigError, ShapeError
from adaptok.tokens import Grid, Tokens, check_grid

Scan = Literal["raster", "snake", "hilbert"]
SCANS: tuple[Scan, ...] = get_args(Scan)


def order_cells(grid: Sequence[int], scan: Scan) -> Int[np.ndarray, " n"]:
    """Return the cells of a grid in the order of a scan, which begins at cell 0.

    Along `"snake"` and `"hilbert"` two cells that follow each other are always neighbours, on any
    grid. Axes in front of the last two (frames) are walked one after the other, every second
    frame backwards, so that the next frame begins where the last one ended.

    Args:
        grid: lengths of the grid axes, such as `(h, w)` or `(f, h, w)`.
        scan: `"raster"` goes row by row, `"snake"` the same with every second row backwards,
            `"hilbert"` along a Hilbert curve made for rectangles of any size.

    Returns:
        The flat index of the cell at each place of the scan, `(n)`.

    Raises:
        ConfigError: there is no such scan.
        ShapeError: the grid has no axes, or an axis without cells.

    Example:
        >>> order_cells((3, 3), "snake")
        array([0, 1, 2, 5, 4, 3, 6, 7, 8])
        >>> order_cells((3, 3), "hilbert")
        array([0, 1, 2, 5, 8, 7, 4, 3, 6])
    """
    check_scan(scan)
    check_grid(tuple(grid), math.prod(grid))
    return _order_cells(tuple(grid), scan).copy()


@lru_cache(maxsize=64)
def _order_cells(grid: Grid, scan: Scan) -> Int[np.ndarray, " n"]:
    cells = np.arange(math.prod(grid))
    if scan == "raster":
        return cells
    h, w = (1, *grid)[-2:]
    if scan == "hilbert":
        order = np.array([int(z.imag) * w + int(z.real) for z in walk_rectangle(h, w)])
    else:
        order = turn_back(cells[: h * w].reshape(h, w)).flatten()
    for length in grid[-3::-1]:
        frames = np.arange(length)[:, None] * len(order) + order
        order = turn_back(frames).flatten()
    return order


def turn_back(rows: Int[np.ndarray, "r c"]) -> Int[np.ndarray, "r c"]:
    """Reverse every second row."""
    turned = rows.copy()
    turned[1::2] = rows[1::2, ::-1]
    return turned


def walk_rectangle(h: int, w: int) -> Iterator[complex]:
    """Walk from the corner 0 through all cells of a rectangle along a generalised Hilbert curve.

    No step is diagonal. A walk from one corner to the next along a side of `p` cells, across `q`,
    exists only where `p` is even or `q` odd (cells are black and white as on a chessboard, and a
    walk alternates). Here the last corner is free: a rectangle whose long side is odd and whose
    short side is even ends along its short side.

    Args:
        h: rows.
        w: columns.

    Returns:
        Cells as `column + 1j * row`.
    """
    (p, along), (q, across) = sorted(((h, 1j), (w, 1 + 0j)), key=lambda side: -side[0])
    if p % 2 == 0 or q % 2 == 1:
        yield from walk_to_corner(0j, along, p, across, q)
        return
    first = (p - q) // 2 * 2  # even, so that what is left is about square
    if first:
        yield from walk_to_corner(0j, along, first, across, q)
    yield from walk_to_corner(first * along, across, q, along, p - first)


def walk_to_corner(
    start: complex, along: complex, p: int, across: complex, q: int
) -> Iterator[complex]:
    """Walk through a rectangle from `start` to the corner `start + (p - 1) * along`.

    Halves are even wherever a side is cut, so that each part has its walk, too.

    Args:
        start: cell of the first corner.
        along: step towards the last corner.
        p: cells in that direction.
        across: step in the other direction.
        q: cells in the other direction; odd unless `p` is even.

    Returns:
        Cells in the order of the walk.
    """
    if q == 1:
        for i in range(p):
            yield start + i * along
    elif p == q == 2:
        yield from (start, start + across, start + across + along, start + along)
    elif q == 2 or 2 * p > 3 * q:  # long: one half after the other
        half = halve_even(p)
        yield from walk_to_corner(start, along, half, across, q)
        yield from walk_to_corner(start + half * along, along, p - half, across, q)
    else:  # up, along, and down again
        half = halve_even(q)
        yield from walk_to_corner(start, across, half, along, p // 2)
        yield from walk_to_corner(start + half * across, along, p, across, q - half)
        corner = start + (p - 1) * along
        yield from walk_to_corner(corner + (half - 1) * across, -across, half, -along, p - p // 2)


def halve_even(length: int) -> int:
    """Return an even number near half a length, at least 2."""
    return 2 * max(1, round(length / 4))


def order_on(grid: Sequence[int], scan: Scan, device: torch.device) -> Int[Tensor, " n"]:
    """Return `order_cells` as a tensor; in a compiled graph it is one operator.

    Args:
        grid: lengths of the grid axes.
        scan: the scan.
        device: where the tensor lies.

    Returns:
        The flat index of the cell at each place of the scan, `(n)`.

    Example:
        >>> order_on((2, 2), "hilbert", torch.device("cpu"))
        tensor([0, 1, 3, 2])
    """
    if scan == "raster":
        return torch.arange(math.prod(grid), device=device)
    order: Tensor = _order_operator(list(grid), scan, device)
    return order


@torch.library.custom_op("adaptok_hnet::order_cells", mutates_args=())
def _order_operator(grid: Sequence[int], scan: str, device: torch.device) -> Tensor:
    # the walk is Python, and a graph that traced it would be as long as the grid has cells;
    # copied, since a graph may write into what an operator gave it
    return _order_tensor(tuple(grid), scan, device).clone()


@_order_operator.register_fake
def _(grid: Sequence[int], scan: str, device: torch.device) -> Tensor:
    return torch.empty(math.prod(grid), dtype=torch.long, device=device)


@lru_cache(maxsize=64)
def _order_tensor(grid: Grid, scan: Scan, device: torch.device) -> Tensor:
    return torch.tensor(_order_cells(grid, scan), device=device)


def invert_order(order: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return the place of each cell in a scan.

    Args:
        order: the cell at each place of the scan, `(n)`.

    Returns:
        Places, `(n)`.

    Example:
        >>> invert_order(torch.tensor([0, 2, 3, 1]))
        tensor([0, 3, 1, 2])
    """
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))


def check_scan(scan: object) -> None:
    """Raise a `ConfigError` unless there is such a scan."""
    if scan not in SCANS:
        raise ConfigError(f"scan is one of {', '.join(SCANS)}, got {scan!r}")


def read_grid(tokens: Tokens, name: str) -> Grid:
    """Return the grid, or raise a `ShapeError` unless there is one token per cell of it."""
    if tokens.grid is None:
        raise ShapeError(f"{name} needs a grid, got tokens without one: give grid=(h, w)")
    if tokens.is_packed or tokens.cells is not None or tokens.valid is not None:
        raise ShapeError(
            f"{name} needs one dense token for each grid cell, in order: route before tokens are "
            "packed, padded or taken away"
        )
    return tokens.grid
