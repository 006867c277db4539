"""What the grid neighbours of a cell say about it."""

from collections.abc import Iterator
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.tokens import Grid, check_grid

Slices = tuple[slice, ...]


def mean_of_neighbours(
    x: Float[Tensor, "b n d"], grid: Grid, falloff: float = 2.0
) -> Float[Tensor, "b n d"]:
    """Return the weighted mean of the neighbours of each cell, the cell itself left out.

    Neighbours are the cells that are at most one step away along every axis: up to 2 on a line,
    8 on a plane and 26 in a video. At a border only those that exist count.

    Args:
        x: features of the cells, row by row.
        grid: lengths of one or more grid axes.
        falloff: a neighbour at the distance r (1, sqrt(2) or sqrt(3) steps) weighs
            r ** -falloff; 0 weighs all of them alike.

    Returns:
        The means. A cell without neighbours is its own mean, and so is, exactly, a cell whose
        neighbours all equal it.

    Raises:
        ShapeError: the grid does not have as many cells as there are features.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 5.0]).reshape(1, 3, 1)
        >>> mean_of_neighbours(x, (1, 3)).flatten()
        tensor([1.0000, 2.5000, 1.0000])
    """
    check_grid(grid, x.shape[1])
    field = x.unflatten(1, grid)
    excess = torch.zeros_like(field)  # over the neighbours: exactly 0 where they are all equal
    weights = field.new_zeros(1, *grid, 1)
    for here, there, weight in pair_neighbours(grid, falloff):
        difference = field[here] - field[there]
        excess[here].add_(difference, alpha=weight)
        excess[there].sub_(difference, alpha=weight)
        weights[here].add_(weight)
        weights[there].add_(weight)
    excess = excess / torch.where(weights > 0, weights, 1.0)
    return x - excess.flatten(1, -2)


def pair_neighbours(grid: Grid, falloff: float) -> Iterator[tuple[Slices, Slices, float]]:
    """Give each direction once: where it starts, where it leads, and its weight.

    The slices belong to features of the shape `(b, *grid, d)`.
    """
    for steps in product((-1, 0, 1), repeat=len(grid)):
        if steps <= (0,) * len(grid):
            continue  # the opposite direction makes the same pairs
        axes = list(zip(steps, grid, strict=True))
        here = [slice(max(0, -step), length - max(0, step)) for step, length in axes]
        there = [slice(max(0, step), length - max(0, -step)) for step, length in axes]
        weight = sum(abs(step) for step in steps) ** (-falloff / 2)
        yield (slice(None), *here), (slice(None), *there), weight
