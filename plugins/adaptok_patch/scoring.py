"""Entropies as keep probabilities: how long each cell keeps a token of its own."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from adaptok_patch.blocks import BlockGrid, gather_children, widen

FORCED = 0.9  # probabilities from here on: merged by a budget only, never by a threshold


def score_cells(
    excess: Mapping[int, Float[Tensor, "b _h _w"]], blocks: BlockGrid
) -> tuple[Float[Tensor, "b h w"], Bool[Tensor, "b h w"]]:
    """Turn what blocks have above their threshold into a keep probability per cell.

    A coarse block that merges takes all finer ones in it along, so that a cell loses its token at
    the smallest excess v of all blocks, from the level at which another cell stands for it
    upwards. Its probability is sigmoid(v) below the threshold and rises to 0.9 above it. Blocks
    that no threshold can merge (the border cuts them, or they are coarser than the coarsest scale)
    lie between 0.9 and 1, fine ones first, and among those of a level the ones with the lowest
    mean excess inside first. What keeps `prob >= 0.5` are exactly the patches of `quadtree`.

    Args:
        excess: by level (1 for blocks of two by two), entropy less threshold, `(b, ceil(h / 2^l),
            ceil(w / 2^l))`.
        blocks: the grid.

    Returns:
        Probabilities, and which cells keep a token of themselves, each `(b h w)`.
    """
    h, w = blocks.height, blocks.width
    first = excess[min(excess)]
    b = first.shape[0]
    leaves_at = blocks.leaves_at.view(1, h, w)
    infinite = first.new_full((), torch.inf)
    value = infinite.expand(b, h, w)
    lowest = value
    for level in range(max(excess), 0, -1):
        if level in excess:
            edge = 1 << level
            found = widen(excess[level], level, blocks)
            whole = widen_whole(h, edge, first)[:, None] & widen_whole(w, edge, first)
            lowest = torch.where(whole, torch.minimum(lowest, found), lowest)
        value = torch.where(leaves_at == level, lowest, value)
    natural = value >= 0
    prob = torch.where(natural, 0.5 + (FORCED - 0.5) * (2 * value.sigmoid() - 1), value.sigmoid())
    forced = score_forced(widen(first, min(excess), blocks), blocks)
    return torch.where(value == torch.inf, forced, prob), natural


def widen_whole(length: int, edge: int, like: Tensor) -> Bool[Tensor, " n"]:
    """Return which cells of an axis lie in a block that the border does not cut."""
    return torch.arange(length, device=like.device) < length // edge * edge


def score_forced(excess: Float[Tensor, "b h w"], blocks: BlockGrid) -> Float[Tensor, "b h w"]:
    """Return the probability of cells whose block only a budget merges (see `score_cells`)."""
    levels = blocks.levels
    finite = excess.isfinite()
    total, count = torch.where(finite, excess, 0.0), finite.to(excess.dtype)
    leaves_at = blocks.leaves_at.view(1, *excess.shape[1:])
    forced = torch.ones_like(excess)
    for level in range(1, levels + 1):
        total, count = gather_children(total, 0).sum(-1), gather_children(count, 0).sum(-1)
        share = (level - 1 + (total / count.clamp(min=1)).sigmoid()) / levels
        here = widen(FORCED + (1 - FORCED) * share, level, blocks)
        forced = torch.where(leaves_at == level, here, forced)
    return forced
