"""The graph of a token grid: cells are nodes, neighbours have edges."""

import functools
import math

import torch
from jaxtyping import Int
from torch import Tensor

from adaptok.errors import ConfigError
from adaptok.tokens import Grid
from adaptok_graph.geometric import import_geometric

NEIGHBOURS = (4, 8)
ORDER_SEED = 0


def check_neighbours(neighbours: int) -> int:
    """Return the number of neighbours of a cell, or raise a `ConfigError` if it is not 4 or 8."""
    if neighbours not in NEIGHBOURS:
        raise ConfigError(f"neighbours is 4 or 8, got {neighbours!r}")
    return int(neighbours)


@functools.lru_cache(maxsize=64)
def connect_cells(grid: Grid, neighbours: int = 4) -> Int[Tensor, "2 e"]:
    """Return the edges of a grid, in both directions.

    Args:
        grid: lengths of the grid axes. The last two are rows and columns; along an axis in front
            of them, such as the frames of a video, a cell is joined to the same cell before and
            after it.
        neighbours: 4, or 8 with the corners.

    Returns:
        Pairs of flat cells on the CPU, without loops; shared between calls, not to be changed.

    Example:
        >>> connect_cells((1, 3)).tolist()
        [[0, 1, 1, 2], [1, 0, 2, 1]]
    """
    utils = import_geometric("utils")
    h, w = (1, 1, *grid)[-2:]
    edges, position = utils.grid(h, w)
    edges, _ = utils.remove_self_loops(edges)
    if neighbours == 4:
        steps = (position[edges[0]] - position[edges[1]]).abs().sum(1)
        edges = edges[:, steps == 1]
    behind = h * w
    for length in grid[-3::-1]:  # from the last axis in front of the rows to the first one
        copies = torch.arange(length) * behind
        within = (edges[:, None] + copies[:, None]).reshape(2, -1)
        across = torch.arange((length - 1) * behind)
        ahead = torch.stack([across, across + behind])
        edges = torch.cat([within, ahead, ahead.flip(0)], dim=1)
        behind *= length
    joined: Tensor = utils.coalesce(edges, num_nodes=behind)
    return joined


@functools.lru_cache(maxsize=64)
def pair_cells(grid: Grid, neighbours: int = 4) -> Int[Tensor, "2 e"]:
    """Return each edge of a grid once, in a fixed order that is shuffled.

    Where edges are equally good the first one is taken; in the order of the rows that would
    contract a flat image line by line.

    Args:
        grid: lengths of the grid axes.
        neighbours: 4, or 8 with the corners.

    Returns:
        Pairs of flat cells, the lower one first, on the CPU; shared between calls.
    """
    edges = connect_cells(grid, neighbours)
    pairs = edges[:, edges[0] < edges[1]]
    generator = torch.Generator().manual_seed(ORDER_SEED)
    return pairs[:, torch.randperm(pairs.shape[1], generator=generator)]


def count_edges(grid: Grid, neighbours: int) -> int:
    """Return how many edges `connect_cells` has, without making them."""
    h, w = (1, 1, *grid)[-2:]
    edges = h * (w - 1) + w * (h - 1)
    if neighbours == 8:
        edges += 2 * (h - 1) * (w - 1)
    behind = h * w
    for length in grid[-3::-1]:
        edges = length * edges + (length - 1) * behind
        behind *= length
    return 2 * edges


@torch.library.custom_op("adaptok_graph::find_edges", mutates_args=())
def find_edges(like: Tensor, grid: list[int], neighbours: int) -> Tensor:
    """Return the edges of a grid on the device of a tensor; one node of a compiled graph."""
    return connect_cells(tuple(grid), neighbours).to(like.device, copy=True)


@find_edges.register_fake
def _(like: Tensor, grid: list[int], neighbours: int) -> Tensor:
    return like.new_empty(2, count_edges(tuple(grid), neighbours), dtype=torch.long)


def repeat_edges(like: Tensor, grid: Grid, b: int, neighbours: int = 4) -> Int[Tensor, "2 be"]:
    """Return the edges of `b` copies of a grid as one graph, as torch-geometric batches them.

    Args:
        like: a tensor on the device where they are needed.
        grid: lengths of the grid axes.
        b: number of samples.
        neighbours: 4, or 8 with the corners.

    Returns:
        Pairs of cells, those of sample i counted from `i * n`, in both directions.

    Example:
        >>> repeat_edges(torch.zeros(1), (1, 2), 2).tolist()
        [[0, 1, 2, 3], [1, 0, 3, 2]]
    """
    edges: Tensor = find_edges(like, list(grid), neighbours)
    starts = torch.arange(b, device=like.device) * math.prod(grid)
    return (edges[:, None] + starts[:, None]).reshape(2, -1)
