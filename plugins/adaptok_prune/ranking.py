"""Which tokens stay, by a score: the best ones, in the order in which they were."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptok.budgets import rank_cells


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Which tokens stay at a site.

    Args:
        places: the tokens that stay, in order; behind them, if the rest is fused, the best one of
            the rest, and padding where samples have different counts, `(b k)`.
        owner: for each token the new one that stands for it, -1 for none, `(b m)`.
        keep: the tokens that stay as they are, `(b m)`.
        fused: which of the new tokens is the fused one, `(b k)`.
        lengths: new tokens of each sample, None where all have `k`.
    """

    places: Int[Tensor, "b k"]
    owner: Int[Tensor, "b m"]
    keep: Bool[Tensor, "b m"]
    fused: Bool[Tensor, "b k"]
    lengths: tuple[int, ...] | None


def choose_tokens(
    score: Float[Tensor, "b m"], counts: tuple[int, ...] | int, *, fuse: bool = False
) -> Choice:
    """Choose the tokens with the highest scores; of equal ones the first.

    Args:
        score: of each token.
        counts: tokens to leave, one number for all samples or one for each.
        fuse: whether the last of them stands for all that do not stay. Where nothing would go,
            nothing is fused.

    Returns:
        The choice.

    Example:
        >>> score = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
        >>> choice = choose_tokens(score, 2)
        >>> choice.places, choice.owner
        (tensor([[1, 3]]), tensor([[-1,  0, -1,  1]]))
        >>> choice = choose_tokens(score, 2, fuse=True)
        >>> choice.places, choice.owner
        (tensor([[1, 3]]), tensor([[1, 0, 1, 1]]))
    """
    m = score.shape[1]
    kept: int | Tensor
    if isinstance(counts, tuple):
        k, lengths = max(counts), counts
        stay = [count - 1 if fuse and count < m else count for count in counts]
        kept = torch.tensor(stay, device=score.device)[:, None]
    else:
        k, lengths = counts, None
        kept = k - 1 if fuse and k < m else k
    rank = rank_cells(score)
    keep = rank < kept
    index = torch.arange(m, device=score.device)
    # what stays comes first and in order, the rest behind it with the best one in front
    places = torch.where(keep, index, m + rank).argsort(1)[:, :k]
    rest = kept if fuse else -1
    owner = torch.where(keep, keep.cumsum(1) - 1, rest)
    fused = (index[:k] == kept) & torch.full_like(places, fuse, dtype=torch.bool)
    return Choice(places, owner, keep, fused, lengths)
