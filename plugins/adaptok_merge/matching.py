"""Which tokens are alike, and one token made of those that are: pure functions.

Written from the papers: Bolya et al., Token Merging: Your ViT But Faster, 2023; Bolya and Hoffman,
Token Merging for Fast Stable Diffusion, 2023.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptok.float32 import without_autocast


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """The best partner in B of each token in A.

    Args:
        first: index of the first token of A, 0 or 1; every second one from there is in A.
        m: how many tokens there are in A and B.
        target: the partner of each token of A, counted in B.
        order: tokens of A, counted in A, the most alike to their partners first.
        best: how alike each is to its partner, in the order of A.
    """

    first: int
    m: int
    target: Int[Tensor, "b a"]
    order: Int[Tensor, "b a"]
    best: Float[Tensor, "b a"]


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """Which tokens become one.

    Args:
        places: the token that each new token has the place of; padding where a sample has fewer.
        owner: the new token that each token becomes part of.
        source: tokens that go into another one, those of sample with fewer filled up.
        into: the new token that each of `source` goes into.
        counts: which of `source` are none of a sample, False there; None where all samples merge
            as many.
    """

    places: Int[Tensor, "b k"]
    owner: Int[Tensor, "b m"]
    source: Int[Tensor, "b r"]
    into: Int[Tensor, "b r"]
    counts: Bool[Tensor, "b r"] | None = None


def match_alternately(metric: Float[Tensor, "b m e"], start: int) -> Match:
    """Find for each token in an even row of the sequence the most similar one in an odd row.

    Rows are those of the whole sequence: of a ViT with a class token in row 0 the first grid token
    stands in row 1. No gradient flows through it.

    Args:
        metric: what tells how alike tokens are, by the cosine.
        start: row of the first token.

    Returns:
        The partners.

    Example:
        >>> keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.2, 0.9]]])
        >>> found = match_alternately(keys, start=0)  # A: tokens 0 and 2, B: 1 and 3
        >>> found.target, found.order
        (tensor([[1, 1]]), tensor([[1, 0]]))
    """
    m = metric.shape[1]
    first = start % 2
    with torch.no_grad(), without_autocast(metric):
        unit = F.normalize(metric.detach().float(), dim=-1)
        scores = unit[:, first::2] @ unit[:, 1 - first :: 2].mT
        best, target = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
    return Match(first, m, target, order, best)


def merge_best(match: Match, r: int) -> Merge:
    """Merge the tokens of A that are most alike to their partners; the others come first, then B.

    Args:
        match: the partners.
        r: how many tokens of A go into their partners.

    Returns:
        What becomes of the tokens.

    Example:
        >>> keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.2, 0.9]]])
        >>> merge = merge_best(match_alternately(keys, start=0), r=1)
        >>> merge.places, merge.owner
        (tensor([[0, 1, 3]]), tensor([[0, 1, 2, 2]]))
    """
    b, a = match.target.shape
    chosen = match.order[:, :r]
    merged = torch.zeros_like(match.target, dtype=torch.bool).scatter(1, chosen, True)
    position = torch.where(merged, a - r, (~merged).cumsum(1) - 1)  # those merged behind the end
    left = pick_places(position, a - r)
    others = torch.arange(match.m - a, device=left.device).expand(b, -1)
    places = torch.cat([2 * left + match.first, 2 * others + 1 - match.first], dim=1)
    owner = weave(torch.where(merged, a - r + match.target, position), a - r + others, match.first)
    into = a - r + match.target.gather(1, chosen)
    return Merge(places, owner, 2 * chosen + match.first, into)


def merge_unevenly(match: Match, r: Sequence[int]) -> Merge:
    """Merge another number of tokens in each sample (see `merge_best`).

    A sample of which none merge keeps its order, as it would alone.

    Args:
        match: the partners.
        r: how many tokens of A go into their partners, per sample.

    Returns:
        What becomes of the tokens; `places` is as long as the longest sample.

    Example:
        >>> keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.2, 0.9]]])
        >>> merge_unevenly(match_alternately(keys.expand(2, -1, -1), start=0), [1, 2]).owner
        tensor([[0, 1, 2, 2],
                [1, 0, 1, 1]])
    """
    b, a = match.target.shape
    device = match.target.device
    rates = torch.tensor(r, device=device)[:, None]
    counts = torch.arange(a, device=device) < rates
    merged = torch.zeros_like(counts).scatter(1, match.order, counts)
    left = a - rates
    others = left + torch.arange(match.m - a, device=device)
    position = (~merged).cumsum(1) - 1
    longest = match.m - min(r)
    tokens = torch.arange(match.m, device=device).expand(b, -1)
    # those that go into another one stand nowhere: behind the end
    new = weave(torch.where(merged, longest, position), others, match.first)
    new = torch.where(rates == 0, tokens, new)
    owner = weave(torch.where(merged, left + match.target, position), others, match.first)
    owner = torch.where(rates == 0, tokens, owner)
    chosen = match.order[:, : max(r)]
    into = left + match.target.gather(1, chosen)
    places = pick_places(new, longest)
    return Merge(places, owner, 2 * chosen + match.first, into, counts[:, : max(r)])


def weave(of_a: Int[Tensor, "b a"], of_b: Int[Tensor, "b _"], first: int) -> Int[Tensor, "b m"]:
    """Put what belongs to A and to B in the order of the tokens."""
    joined = torch.cat([of_a, of_b], dim=1)
    index = torch.arange(joined.shape[1], device=joined.device)
    back = index // 2 + torch.where(index % 2 == first, 0, of_a.shape[1])
    return joined.index_select(1, back)


def pick_places(position: Int[Tensor, "b m"], k: int) -> Int[Tensor, "b k"]:
    """Return which token stands at each position; those at position `k` stand nowhere."""
    index = torch.arange(position.shape[1], device=position.device).expand_as(position)
    empty = torch.zeros(position.shape[0], k + 1, dtype=index.dtype, device=index.device)
    return empty.scatter(1, position, index)[:, :k]


def sum_sizes(
    sizes: Float[Tensor, "b m"], owner: Int[Tensor, "b m"], k: int
) -> Float[Tensor, "b k"]:
    """Return how many cells each new token stands for."""
    return sizes.new_zeros(sizes.shape[0], k).scatter_add(1, owner, sizes)


def average(
    x: Float[Tensor, "b s d"],
    sizes: Float[Tensor, "b m"],
    summed: Float[Tensor, "b k"],
    merge: Merge,
    start: int = 0,
) -> Float[Tensor, "b k d"]:
    """Return the mean of the tokens that become one, weighted by size.

    Only rows that go into another one are touched: y + (x - y) s / S, with S the new size.

    Args:
        x: features of the tokens, and perhaps of others in front of them and behind.
        sizes: weights of the tokens.
        summed: weights of the new tokens.
        merge: which become one.
        start: row of the first token.

    Returns:
        Features of the new tokens.

    Example:
        >>> x = torch.tensor([[[1.0], [4.0]]])
        >>> merge = merge_best(match_alternately(x, start=0), 1)
        >>> average(x, torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0]]), merge)
        tensor([[[2.]]])
    """
    kept = take_rows(x, merge.places + start)
    share = sizes.gather(1, merge.source) / summed.gather(1, merge.into)
    if merge.counts is not None:
        share = share * merge.counts
    moved = take_rows(x, merge.source + start) - take_rows(kept, merge.into)
    weighted = (moved * share[..., None].to(x.dtype)).flatten(0, 1)
    # in place: nobody else has `kept`
    kept.flatten(0, 1).index_add_(0, flatten_rows(merge.into, kept.shape[1]), weighted)
    return kept


def take_rows(x: Float[Tensor, "b s d"], rows: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
    """Return some rows of each sample; whole rows are copied, ten times faster than by `gather`."""
    b, s, d = x.shape
    return x.flatten(0, 1).index_select(0, flatten_rows(rows, s)).view(b, -1, d)


def flatten_rows(rows: Int[Tensor, "b k"], s: int) -> Int[Tensor, " bk"]:
    """Return rows of samples as rows of the whole batch, with `s` rows in each sample."""
    return (rows + s * torch.arange(rows.shape[0], device=rows.device)[:, None]).flatten()
