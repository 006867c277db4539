"""ToMe: between attention and MLP of each block, the most similar tokens become one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok import BlockRange, Budget, Effects, Moment, ReduceStage, Reduction, Site
from adaptok.calibrated import CalibrationRecord, Fitted, Row, RunBatch, read_setting
from adaptok.errors import ConfigError, StackError
from adaptok.reductions import Restore, schedule_evenly
from adaptok_merge.fitting import fit_merging, measure_merging, plan_merging
from adaptok_merge.matching import match_alternately
from adaptok_merge.rates import (
    USUAL,
    Rates,
    check_rate,
    check_rates,
    count_left,
    is_schedule,
    limit_rate,
    list_rates,
    schedule_by_rates,
)
from adaptok_merge.rounds import Merged, merge_apart, merge_down, merge_each

Where = Literal["auto", "between", "boundary"]
SITES: tuple[Where, ...] = ("auto", "between", "boundary")
SPARE = 2  # a graph is made for lengths 0 and 1, and for all others together


class ToMe(ReduceStage):
    """Merges similar tokens at every block.

    Tokens in even rows of the sequence (A) look for the most similar token in an odd row (B), by
    the cosine of their keys; the `r` most similar ones of A go into their partners, as a mean
    weighted by size. Class, register and text tokens never merge. Merged tokens count by their size
    in the attention of later blocks.

    Args:
        r: tokens that merge at each block: a number, a list with one for each block, or
            `(r, inflect)`, a line from `r (1 - inflect)` to `r (1 + inflect)` with a float from
            -1.0 to 1.0. Where fewer than `2 r` are left, half of them merge. None means 8. May be
            assigned at any time; a budget (`keep=`, `tokens=`) stands above it.
        threshold: merge those more similar than this cosine instead, as many as there are.
        site: `"between"` attention and MLP, by keys; `"boundary"`: in front of each block, by
            features; `"auto"`: between, where the host's blocks can be split, else boundary.
        proportional: add the logarithm of its size to each key's logits, in all blocks that can
            be split.
        multiple: with `threshold`, leave a multiple of this many tokens, so that more samples can
            run together.
        restore: see `adaptok.ReduceStage`.

    Raises:
        ConfigError: an option has no such value, `r` and `threshold` came together, or (when
            called) a list has not one number for each block.
        BudgetError: (when called) `r` is more than there are tokens.
        StackError: (when called) blocks cannot be split, and `site` is `"between"`.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=[ToMe(r=4)])  # 24 cells, 3 blocks
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(torch.randn(2, 3, 32, 48))
        >>> seen.steps[0].kept, [event.counts for event in seen.steps[0].plans[0].events]
        (tensor([12, 12]), [(20, 20), (16, 16), (12, 12)])

    Paper: Bolya et al., Token Merging: Your ViT But Faster, 2023.
    """

    effects: ClassVar[Effects] = Effects(
        "tokens", changes_count=True, needs_keys=True, compilable=True
    )
    reads_keys: ClassVar[bool] = True

    def __init__(
        self,
        r: Rates | None = None,
        threshold: float | None = None,
        site: Where = "auto",
        proportional: bool = True,
        multiple: int = 1,
        restore: Restore = "copy",
    ) -> None:
        super().__init__("tome", restore)
        if site not in SITES:
            raise ConfigError(f"site is one of {', '.join(SITES)}, got {site!r}")
        if multiple < 1:
            raise ConfigError(f"multiple is at least 1, got {multiple}")
        if threshold is None and multiple != 1:
            raise ConfigError(f"multiple={multiple} is for threshold=, and r leaves exact counts")
        check_threshold(threshold)
        self.threshold = threshold
        self.site: Where = site
        self.proportional = proportional
        self.multiple = multiple
        # By device and number of blocks: a compiled graph sees the length of a tensor, which may
        # change, and no number that it is made for (`Budget.carried`).
        self.carried_rates: dict[tuple[str, int], tuple[Budget, ...]] = {}
        self.r = r
        self.watching: list[Moment] | None = None  # the caller's, while a batch is measured

    @property
    def r(self) -> int | list[int | float] | None:
        """Tokens that merge at each block."""
        return self.given_r

    @r.setter
    def r(self, r: Rates | None) -> None:
        if r is not None and self.threshold is not None:
            raise ConfigError("r and threshold exclude each other: give one of them")
        self.given_r = None if r is None else check_rates(r)
        self.carried_rates = {
            (device, steps): carry_rates(list_rates(self.rates, steps), device)
            for device, steps in self.carried_rates
            if isinstance(self.rates, int) or is_schedule(self.rates) or len(self.rates) == steps
        }

    @property
    def rates(self) -> int | list[int | float]:
        """Tokens that merge at each block, unless a threshold or a budget says otherwise."""
        return USUAL if self.given_r is None else self.given_r

    def change_merging(self, r: Rates | None, threshold: float | None) -> None:
        """Merge by other numbers or another threshold from now on."""
        check_threshold(threshold)
        if threshold is not None and r is not None:
            raise ConfigError("r and threshold exclude each other: give one of them")
        rates = None if r is None else check_rates(r)
        self.threshold = threshold
        self.r = rates
        self.cuts = self.must_cut()

    def plan_calibration(self, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
        """Fit a threshold or `r` (see `plan_merging` and `adaptok.calibrate`)."""
        return plan_merging(self, wanted)

    def measure_batch(self, run: RunBatch, wanted: Mapping[str, Any]) -> Sequence[Row]:
        """Note what thresholds leave, or how alike pairs are."""
        return measure_merging(self, run, wanted)

    @classmethod
    def fit_settings(
        cls, chosen: CalibrationRecord, held_out: CalibrationRecord, wanted: Mapping[str, Any]
    ) -> Fitted:
        """Fit a threshold or `r`."""
        return fit_merging(chosen, held_out, wanted)

    def read_settings(self) -> dict[str, Any]:
        """Return threshold and `r`."""
        return {"threshold": self.threshold, "r": self.given_r}

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Merge by what was fitted."""
        threshold, r = read_setting(self.name, settings, ("threshold", "r"))
        self.change_merging(r, threshold)

    def describe(self) -> dict[str, str]:
        """Return what merges, where, and the budget in words."""
        natural = (
            {"r": str(self.rates)} if self.threshold is None else {"threshold": f"{self.threshold}"}
        )
        return {**super().describe(), **natural, "site": repr(self.site)}

    def find_first(self, first: int, last: int) -> int:
        """Return the first block: it acts at each."""
        return first

    def find_sites(self, inner: BlockRange) -> Sequence[Site]:
        """Return one site per block (see `ReduceStage.find_sites`)."""
        if self.site == "between" and not inner.can_split:
            raise StackError(
                f'site="between" merges between attention and MLP, and here it cannot: '
                f'{inner.whole}. Take site="boundary", which merges in front of each block by '
                'features, as site="auto" does here'
            )
        between = inner.can_split and self.site != "boundary"
        blocks = range(inner.first, inner.last)
        return tuple(Site(block, "between" if between else "before") for block in blocks)

    def biases_keys(self, sites: Sequence[Site], block: int) -> bool:
        """Say whether tokens may have merged in front of a block's attention."""
        return self.proportional and any(
            site.block < block or (site.block == block and site.where == "before") for site in sites
        )

    def bias_keys(self, moment: Moment) -> Float[Tensor, "b m"] | None:
        """Return the logarithm of the sizes, once tokens are fewer."""
        if moment.sizes.shape[1] == moment.owner.shape[1]:
            return None
        return moment.sizes.log()

    def waits_for_device(self, budget: Budget) -> bool:
        """Say whether counts depend on the image: with a threshold only."""
        if budget.is_natural:
            return self.threshold is not None
        return super().waits_for_device(budget)

    def must_cut(self) -> bool:
        """Say whether one graph cannot hold it: not before `r` has become lengths, too."""
        natural = self.budget_setting.is_natural and self.threshold is None
        return (natural and not self.carried_rates) or super().must_cut()

    def count_naturally(self, n: int, steps: int) -> int | None:
        """Return how many tokens `r` leaves; a threshold does not say."""
        if self.threshold is not None:
            return None
        return count_left(list_rates(self.rates, steps), n)

    def schedule(self, n: int, final: int, steps: int) -> tuple[int, ...]:
        """Spread a budget over the blocks as `r` does."""
        rates = self.rates
        if isinstance(rates, int) or (len(rates) != steps and not is_schedule(rates)):
            return schedule_evenly(n, final, steps)
        return schedule_by_rates(list_rates(rates, steps), n, final)

    def reduce(self, moment: Moment) -> Reduction | None:
        """Merge at one site (see `ReduceStage.reduce`)."""
        if self.watching is not None:
            self.watching.append(moment)
        m = moment.sizes.shape[1]
        if moment.counts is None and self.threshold is not None:
            return self.merge_similar(moment, self.threshold)
        if moment.counts is None:
            r = self.find_rate(moment)
            if is_whole(moment):
                check_rate(r, moment.owner.shape[1])
            return merge_down(moment, m - limit_rate(r, m))
        if moment.count is not None:
            return merge_down(moment, moment.count)
        rates = tuple(m - count for count in moment.counts)
        if max(rates) <= m // 2:
            return merge_apart(moment, Merged.of(moment), None, rates)
        return merge_each(moment, moment.counts)

    def find_rate(self, moment: Moment) -> int:
        """Return how many tokens `r` wants to merge at a site."""
        key = (str(moment.sizes.device), moment.steps)
        if torch.compiler.is_compiling() and key in self.carried_rates:
            return self.carried_rates[key][moment.step].count(0) - SPARE
        rates = list_rates(self.rates, moment.steps)
        if not torch.compiler.is_compiling() and key not in self.carried_rates:
            self.carried_rates[key] = carry_rates(rates, key[0])
            self.cuts = self.must_cut()
        return rates[moment.step]

    def merge_similar(self, moment: Moment, threshold: float) -> Reduction | None:
        """Merge what is more similar than a threshold, another number in each sample."""
        m = moment.sizes.shape[1]
        if m < 2:
            return None
        start = Merged.of(moment)
        match = match_alternately(start.metric, moment.call.start)
        wanted = (match.best > threshold).sum(1).clamp(max=m // 2).tolist()
        left = (-(-(m - r) // self.multiple) * self.multiple for r in wanted)
        return merge_apart(moment, start, match, tuple(m - min(m, k) for k in left))


def is_whole(moment: Moment) -> bool:
    """Say whether the tokens in front of the first block were the host's own grid.

    Behind a chunker, or in a model that chooses its own tokens, their number depends on the image,
    and what is too much for one image is no mistake of the user's.
    """
    numbers = moment.call.numbers
    chosen = numbers is not None and numbers.cells is not None
    return not chosen and moment.owner.shape[1] == math.prod(moment.call.grid)


def check_threshold(threshold: float | None) -> None:
    """Raise a `ConfigError` unless a threshold is a cosine."""
    if threshold is not None and not -1.0 <= threshold <= 1.0:
        raise ConfigError(f"threshold is a cosine from -1 to 1, got {threshold:g}")


def carry_rates(rates: Sequence[int], device: str) -> tuple[Budget, ...]:
    """Return numbers as lengths of tensors; equal ones share a tensor, and so a length."""
    carried = {r: Budget(places=torch.zeros(r + SPARE, device=device)) for r in set(rates)}
    return tuple(carried[r] for r in rates)
