"""Destinations: one token in each cell of a coarse grid, and all others merged into them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from adaptok.float32 import without_autocast
from adaptok.tokens import Grid
from adaptok_merge.matching import Merge, pick_places, take_rows

MASK = 0xFFFFFFFF


def count_cells(grid: Grid, sizes: Sequence[int]) -> int:
    """Return how many cells of some size a grid has; those at its end may be smaller.

    Args:
        grid: lengths of the grid axes.
        sizes: lengths of a cell.

    Example:
        >>> count_cells((5, 8), (2, 2))
        12
    """
    number = 1
    for length, size in zip(grid, sizes, strict=True):  # no generator: a graph cannot hold one
        number *= -(-length // size)
    return number


def fit_cells(grid: Grid, sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Return the size of cells of which there are at most `count`: as given, or larger.

    Args:
        grid: lengths of the grid axes.
        sizes: lengths of a cell to begin with.
        count: how many cells there may be, at least 1.

    Returns:
        Lengths of a cell; the last two axes grow in turn, then those in front of them.

    Example:
        >>> fit_cells((4, 6), (2, 2), 12), fit_cells((4, 6), (2, 2), 5)
        ((2, 2), (3, 3))
    """
    grown = list(sizes)
    while count_cells(grid, grown) > count:
        axes = [axis for axis in range(len(grid)) if grown[axis] < grid[axis]]
        picture = [axis for axis in axes if axis >= len(grid) - 2]
        grown[min(picture or axes, key=lambda axis: grown[axis])] += 1
    return tuple(grown)


def choose_destinations(
    grid: Grid, sizes: Sequence[int], key: int | None, device: torch.device
) -> Int[Tensor, " c"]:
    """Return one token of each cell.

    Numbers are mixed from the key and the number of the cell alone: no generator is moved, and all
    samples, devices and calls get the same.

    Args:
        grid: lengths of the grid axes.
        sizes: lengths of a cell.
        key: which choice; None takes the first token of each cell.
        device: where the answer lies.

    Returns:
        Flat indices, cell by cell.

    Example:
        >>> choose_destinations((4, 6), (2, 2), None, torch.device("cpu"))
        tensor([ 0,  2,  4, 12, 14, 16])
    """
    numbers = [-(-length // size) for length, size in zip(grid, sizes, strict=True)]
    rest = torch.arange(count_cells(grid, sizes), device=device)
    draw = torch.zeros_like(rest) if key is None else mix_numbers(rest, key)
    place, stride = torch.zeros_like(rest), 1
    for axis in reversed(range(len(grid))):
        first = rest % numbers[axis] * sizes[axis]
        room = (grid[axis] - first).clamp(max=sizes[axis])
        place = place + stride * (first + draw % room)
        rest, draw, stride = rest // numbers[axis], draw // room, stride * grid[axis]
    return place


def mix_numbers(index: Int[Tensor, " c"], key: int) -> Int[Tensor, " c"]:
    """Return numbers below 2 ** 32 that look random, a fixed one for each index and key."""
    mixed = ((index + 1) * 0x9E3779B1 + (key + 1) * 0x85EBCA77 % (MASK + 1)) & MASK
    for factor in (0x7FEB352D, 0x846CA68B):
        mixed = ((mixed ^ (mixed >> 15)) * factor) & MASK
    return mixed ^ (mixed >> 16)


def merge_into(x: Float[Tensor, "b n d"], destinations: Int[Tensor, " c"], count: int) -> Merge:
    """Merge the tokens that are most similar to a destination into it.

    Args:
        x: features, which say by their cosine how alike tokens are; no gradient flows through it.
        destinations: tokens that others merge into, and that never merge themselves.
        count: how many tokens to leave, at least as many as destinations.

    Returns:
        What becomes of the tokens, which stay in order.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.6]]])
        >>> merge_into(x, torch.tensor([0]), 3).owner
        tensor([[0, 0, 1, 2]])
    """
    b, n, _ = x.shape
    c = destinations.shape[0]
    there = torch.zeros(n, dtype=torch.long, device=x.device).scatter(0, destinations, 1)
    sources = there.argsort(stable=True)[: n - c]
    with torch.no_grad(), without_autocast(x):
        unit = F.normalize(x.detach().float(), dim=-1)
        scores = unit.index_select(1, sources) @ unit.index_select(1, destinations).mT
        best, target = scores.max(dim=-1)
        chosen = best.argsort(dim=-1, descending=True, stable=True)[:, : n - count]
    source = sources[chosen]
    gone = torch.zeros(b, n, dtype=torch.bool, device=x.device).scatter(1, source, True)
    position = (~gone).cumsum(1) - 1
    into = position.gather(1, destinations[target.gather(1, chosen)])
    places = pick_places(torch.where(gone, count, position), count)
    return Merge(places, position.scatter(1, source, into), source, into)


def spread(
    x: Float[Tensor, "b n d"], moved: Float[Tensor, "b k d"], owner: Int[Tensor, "b n"]
) -> Float[Tensor, "b n d"]:
    """Add to each token how far the one that it is part of has moved."""
    return x + take_rows(moved, owner)
