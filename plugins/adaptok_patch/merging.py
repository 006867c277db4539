"""In which order the cells of a grid lose their tokens, so that what is left tiles it."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptok_patch.blocks import gather_children, lay_blocks, widen


@dataclass(frozen=True, slots=True, eq=False)
class MergeOrder:
    """The merges of every sample, from the first one to the whole grid as one token.

    Args:
        cells: all cells in the order in which their tokens stay, the last one to stay first,
            `(b n)`.
        winners: for each level above the cells, and each cell, the cell that stands for its
            block, `(l b n)`.

    Example:
        >>> order = order_merges(torch.tensor([[0.1, 0.2, 0.9, 0.8]]), (1, 1, 4))
        >>> order.cells  # the left pair is merged first, then the right one, then both
        tensor([[2, 1, 3, 0]])
    """

    cells: Int[Tensor, "b n"]
    winners: Int[Tensor, "l b n"]

    def places(self) -> Int[Tensor, "b n"]:
        """Return how long each cell stays: 0 for the one that stays longest."""
        places = torch.arange(self.cells.shape[1], device=self.cells.device)
        return torch.empty_like(self.cells).scatter(1, self.cells, places.expand_as(self.cells))

    def find_tokens(self, kept: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        """Return for each cell the token that stands for it.

        Args:
            kept: the cells that stay.

        Returns:
            Index of the token in its sample, tokens being in the order of their cells: that of
            the smallest block around the cell that still has one.
        """
        cell = torch.arange(kept.shape[1], device=kept.device).expand_as(self.cells)
        found = cell
        for winner in self.winners.flip(0).unbind():
            found = torch.where(kept.gather(1, winner), winner, found)
        found = torch.where(kept, cell, found)
        return (kept.cumsum(1) - 1).gather(1, found)


def order_merges(prob: Float[Tensor, "b n"], grid: tuple[int, int, int]) -> MergeOrder:
    """Return the order in which blocks of cells merge into their representatives.

    The cell with the highest keep probability stands for a block. A block merges when all that it
    holds is merged, and blocks merge in the order of the second highest probability in them: the
    most that is lost. All cells of a block that lose their tokens do so one after the other, so
    that a count in between leaves one block merged in part. The order is total: a smaller count
    merges all that a larger one does, and more.

    Args:
        prob: keep probability of each cell; among equal ones, fine blocks come before coarse
            ones, and higher indices before lower ones.
        grid: frames, height and width; frames merge when each of them is one token.

    Returns:
        The order.
    """
    frames, h, w = grid
    b, n = prob.shape
    blocks = lay_blocks(h, w, prob.device)
    rank, cell_of = rank_stays(prob, blocks.order, frames)
    own = rearrange(rank, "b (f h w) -> (b f) h w", h=h, w=w)
    best, cost = own, torch.full_like(own, -1)
    stays = torch.ones_like(own, dtype=torch.bool)
    price, level_left = torch.full_like(own, n), torch.full_like(own, blocks.levels + 2)
    winners = []
    for level in range(1, blocks.levels + 2):
        if level <= blocks.levels:
            rivals = gather_children(best, -1).sort(-1).values
            cost = torch.maximum(gather_children(cost, -1).amax(-1), rivals[..., -2])
            best = rivals[..., -1]
            top, lost = widen(best, level, blocks), widen(cost, level, blocks)
        elif frames > 1:
            whole = rearrange(best, "(b f) 1 1 -> b f", f=frames).sort(1).values
            dearest = torch.maximum(whole[:, -2], cost.view(b, frames).amax(1))
            top = whole[:, -1].repeat_interleave(frames)[:, None, None].expand_as(own)
            lost = dearest.repeat_interleave(frames)[:, None, None].expand_as(own)
        else:
            break
        leaves = stays & (top != own)
        price, level_left = (
            torch.where(leaves, lost, price),
            torch.where(leaves, level, level_left),
        )
        stays = stays & ~leaves
        winners.append(cell_of.gather(1, top.reshape(b, n)))
    key = (price * (blocks.levels + 3) + level_left) * n + own
    cells = key.view(b, n).argsort(1, descending=True)
    none = cell_of.new_empty(0, b, n)
    return MergeOrder(cells, torch.stack(winners) if winners else none)


def rank_stays(
    prob: Float[Tensor, "b n"], order: Int[Tensor, " hw"], frames: int
) -> tuple[Int[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Return the rank of each cell by probability, the highest last, and the cell of each rank.

    Args:
        prob: keep probability.
        order: the cells of a frame, for those that are equally probable.
        frames: how many there are; of equal cells, those of later frames come first.
    """
    b, n = prob.shape
    starts = torch.arange(frames - 1, -1, -1, device=prob.device) * (n // frames)
    every = (order[:, None] + starts).flatten()
    places = prob.index_select(1, every).argsort(dim=1, stable=True)
    cells = every[places]
    ranks = torch.arange(n, device=prob.device).expand(b, n)
    return torch.empty_like(cells).scatter(1, cells, ranks), cells
