"""Segments of a grid: connected cells that share one token."""

from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptok import ChunkPlan
from adaptok.tokens import Grid
from adaptok_graph.geometric import import_geometric

LEAST_PROB = 1e-3  # a cell that nobody asks for still counts a little
EQUAL = 1e-3  # relative difference of squared distances that counts as none

Represent = Literal["mean", "member"]


@dataclass(frozen=True, slots=True, eq=False)
class SegmentPlan(ChunkPlan):
    """A plan whose tokens need not be the features of a cell.

    Args:
        entered: the tokens as they went into the blocks, row by row, `(t d)`; what the blocks
            made of a token is its difference to these.
    """

    entered: Float[Tensor, "t d"] | None = None


def choose_members(v: Float[Tensor, "b n k"], segment: Int[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
    """Choose the member of each segment that lies nearest to its mean.

    Args:
        v: vectors of the cells: positions, or features.
        segment: a number below n for each cell, the same for the cells of a segment.

    Returns:
        True at one cell of each segment, the first one of equally near ones.

    Example:
        >>> v = torch.tensor([[[0.0], [1.0], [2.0], [7.0]]])
        >>> choose_members(v, torch.tensor([[0, 0, 0, 3]]))
        tensor([[False,  True, False,  True]])
    """
    b, n, _ = v.shape
    scatter = import_geometric("utils").scatter
    index = number_segments(segment)
    flat = rearrange(v.float(), "b n k -> (b n) k")
    mean = scatter(flat, index, dim_size=b * n, reduce="mean").index_select(0, index)
    distance = (flat - mean).square().sum(1)
    least = scatter(distance, index, dim_size=b * n, reduce="min").index_select(0, index)
    # two cells are equally far from their mean, and rounding must not choose between them
    near = distance <= least * (1.0 + EQUAL) + EQUAL**2
    places = torch.arange(b * n, device=v.device)
    place = torch.where(near, places, b * n)
    first = scatter(place, index, dim_size=b * n, reduce="min").index_select(0, index)
    chosen: Tensor = first == places
    return chosen.view(b, n)


def number_segments(segment: Int[Tensor, "b n"]) -> Int[Tensor, " bn"]:
    """Return segments of all samples in one run, those of sample i counted from `i * n`."""
    b, n = segment.shape
    return (segment + torch.arange(b, device=segment.device)[:, None] * n).flatten()


def share_cells(prob: Float[Tensor, "b n"], index: Int[Tensor, " bn"]) -> Float[Tensor, " bn"]:
    """Return each cell's share in the token of its segment: its probability over their sum.

    Args:
        prob: keep probability of each cell.
        index: segment of each cell of the batch.

    Returns:
        Shares that sum to one over a segment; exactly one where a cell is alone.

    Example:
        >>> share_cells(torch.tensor([[0.2, 0.6, 0.5]]), torch.tensor([0, 0, 1]))
        tensor([0.2500, 0.7500, 1.0000])
    """
    softmax = import_geometric("utils").softmax
    log = prob.float().clamp(min=LEAST_PROB).log().flatten()
    share: Tensor = softmax(log, index, num_nodes=len(index))
    return share


def pool_cells(
    x: Float[Tensor, "b n d"], share: Float[Tensor, " bn"], row: Int[Tensor, " bn"], t: int
) -> Float[Tensor, "t d"]:
    """Return the mean of the cells of each token, weighted by their shares.

    Args:
        x: features of the cells.
        share: share of each cell in its token.
        row: row of the token of each cell of the batch.
        t: number of tokens.

    Returns:
        Features of the tokens, in the precision of the cells.
    """
    scatter = import_geometric("utils").scatter
    flat = rearrange(x.float(), "b n d -> (b n) d")
    pooled: Tensor = scatter(flat * share[:, None], row, dim_size=t)
    return pooled.to(x.dtype)


def place_cells(grid: Grid, device: torch.device) -> Float[Tensor, "n axes"]:
    """Return the coordinates of all cells of a grid, row by row."""
    axes = [torch.arange(length, device=device, dtype=torch.float32) for length in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
