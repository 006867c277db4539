"""Rounds of merging: each takes at most half of the tokens, and some samples need several."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from adaptok import Moment, Reduction
from adaptok_merge.fitting import read_metric
from adaptok_merge.matching import (
    Match,
    Merge,
    average,
    match_alternately,
    merge_best,
    merge_unevenly,
    sum_sizes,
)


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """Tokens of one site after some rounds of merging.

    Args:
        places: which of the tokens that came each one has the place of.
        owner: which one each of the tokens that came is part of.
        metric: what tells how alike tokens are.
        x: features; in front of the first round of the whole sequence.
        sizes: how many cells each one stands for.
        start: row of the first token in `x`.
    """

    places: Int[Tensor, "b k"]
    owner: Int[Tensor, "b m"]
    metric: Float[Tensor, "b k e"]
    x: Float[Tensor, "b s d"]
    sizes: Float[Tensor, "b k"]
    start: int = 0

    @classmethod
    def of(cls, moment: Moment) -> "Merged":
        """Return the tokens that came."""
        metric = read_metric(moment)
        b, m = moment.sizes.shape
        tokens = torch.arange(m, device=moment.sizes.device).expand(b, m)
        return cls(tokens, tokens, metric, moment.call.x, moment.sizes, moment.call.start)

    def choose(self, sample: int) -> "Merged":
        """Return one sample."""
        rows = slice(sample, sample + 1)
        return Merged(
            self.places[rows],
            self.owner[rows],
            self.metric[rows],
            self.x[rows],
            self.sizes[rows],
            self.start,
        )

    def take(self, merge: Merge, *, again: bool) -> "Merged":
        """Return what is left behind one more round.

        Args:
            merge: which tokens become one.
            again: whether one more round follows.
        """
        sizes = sum_sizes(self.sizes, merge.owner, merge.places.shape[1])
        return Merged(
            self.places.gather(1, merge.places),
            merge.owner.gather(1, self.owner),
            average(self.metric.detach(), self.sizes, sizes, merge) if again else self.metric,
            average(self.x, self.sizes, sizes, merge, self.start),
            sizes,
        )


def merge_down(moment: Moment, count: int) -> Reduction | None:
    """Merge to the same count in all samples, in as many rounds as it takes.

    Args:
        moment: what there is at the site.
        count: tokens to leave.

    Returns:
        The decision; None where nothing merges.
    """
    m = moment.sizes.shape[1]
    if count >= m:
        return None
    state = merge_rounds(Merged.of(moment), count, moment.call.start)
    return Reduction(state.places, state.owner, state.x)


def merge_rounds(state: Merged, count: int, start: int) -> Merged:
    """Merge to a count in as many rounds as it takes; a round takes at most half of the tokens.

    Args:
        state: the tokens of some samples.
        count: tokens to leave, at least 1.
        start: row of the first token.
    """
    m = state.sizes.shape[1]
    while m > count:
        r = m - count if m - count <= m // 2 else m // 2  # noqa: FURB136 - as in `limit_rate`
        m = m - r
        state = state.take(merge_best(match_alternately(state.metric, start), r), again=m > count)
    return state


def merge_apart(
    moment: Moment, start: Merged, match: Match | None, rates: tuple[int, ...]
) -> Reduction | None:
    """Merge another number in each sample, in one round.

    Args:
        moment: what there is at the site.
        start: the tokens.
        match: their partners, if they are known.
        rates: how many merge, per sample.
    """
    if not any(rates):
        return None
    m = moment.sizes.shape[1]
    match = match or match_alternately(start.metric, moment.call.start)
    after = start.take(merge_unevenly(match, rates), again=False)
    return Reduction(after.places, after.owner, after.x, tuple(m - r for r in rates))


def merge_each(moment: Moment, counts: tuple[int, ...]) -> Reduction:
    """Merge sample by sample, where one of them needs several rounds."""
    start, longest = Merged.of(moment), max(counts)
    places, owners, xs = [], [], []
    for sample, count in enumerate(counts):
        state = merge_rounds(start.choose(sample), count, moment.call.start)
        # without a round it is the whole sequence still
        x = state.x if count < start.sizes.shape[1] else moment.x[sample : sample + 1]
        spare = longest - count
        places.append(F.pad(state.places, (0, spare)))
        owners.append(state.owner)
        xs.append(F.pad(x, (0, 0, 0, spare)))
    return Reduction(torch.cat(places), torch.cat(owners), torch.cat(xs), counts)
