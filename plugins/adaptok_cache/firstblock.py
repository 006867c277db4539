"""First-block cache: the first block always runs, and says whether the others have to."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptok import BlockCall, BlockRange
from adaptok.calibrated import read_setting
from adaptok.errors import StackError
from adaptok_cache.book import CacheState
from adaptok_cache.distances import relative_change
from adaptok_cache.history import put_rows, spread_cells
from adaptok_cache.runs import SampleRun
from adaptok_cache.stage import StepCache, Verdict
from adaptok_cache.teacache import check_threshold


class FirstBlockCache(StepCache):
    """Reuses what all blocks but the first added, while the first one adds nearly the same.

    What the first block adds to the grid tokens is compared with what it added in the step that was
    computed last, sample by sample: `mean|r_t - r_c| / mean|r_c|`. Below the threshold, what the
    other blocks added in that step is added again.

    Stages inside run twice in a computed step: around the first block, and around the others. One
    that chooses tokens chooses them for both by itself.

    Args:
        threshold: distance below which a sample is reused; 0 computes every step.
        steps: see `StepCache`; the last step is always computed.
        warmup: see `StepCache`.
        max_requests: see `StepCache`.
        agree: see `StepCache`.

    Raises:
        ConfigError: an option is out of range.
        HandOverError: (when called) there is no step.
        StackError: (when called) there is one block only, so that nothing is left to reuse.

    Example:
        >>> FirstBlockCache(threshold=0.05).effects.axis
        'time'

    Described by ParaAttention and by diffusers; written from the description.
    """

    name = "firstblock"

    def __init__(
        self,
        threshold: float = 0.08,
        steps: int | None = None,
        warmup: int = 2,
        max_requests: int = 4,
        agree: bool = False,
    ) -> None:
        check_threshold(self.name, threshold)
        super().__init__(steps=steps, warmup=warmup, max_requests=max_requests, agree=agree)
        self.threshold: float = threshold

    def describe_options(self) -> dict[str, object]:
        """Return the threshold."""
        return {"threshold": self.threshold}

    def read_settings(self) -> dict[str, Any]:
        """Return the threshold, which may be assigned at any time (see `adaptok.save`)."""
        return {"threshold": self.threshold}

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Run with another threshold, and begin all runs anew."""
        (threshold,) = read_setting(self.name, settings, ("threshold",))
        check_threshold(self.name, threshold)
        self.threshold = threshold
        self.forget()

    def check_blocks(self, inner: BlockRange) -> None:
        """Raise a `StackError` if there is one block only."""
        if inner.last - inner.first < 2:
            raise StackError(
                f"{self.name!r} reuses what the blocks behind the first one add, and its span has "
                "one block only: give a longer span, or 'teacache'"
            )

    def judge(
        self, inner: BlockRange, call: BlockCall, state: CacheState, runs: Sequence[SampleRun]
    ) -> Verdict:
        """Run the first block and compare what it adds (see `StepCache.judge`)."""
        middle = inner.first + 1
        front = inner.run(call, inner.first, middle)
        added = spread_cells(call, front.cell_x - call.cell_x)
        before = added if state.signal is None else state.signal
        distances = relative_change(added, before)
        fits = [distance < self.threshold for distance in distances]

        def run_others(some: BlockCall) -> BlockCall:
            return inner.run(some, middle, inner.last)

        return Verdict(front, run_others, fits, runs, added, distances)

    def keep_signal(
        self, before: Tensor | None, signal: Tensor | None, rows: Tensor | None
    ) -> Tensor | None:
        """Keep what the first block added where the others ran too (see `StepCache`)."""
        if before is None or signal is None or rows is None:
            return signal
        return put_rows(before, rows, torch.index_select(signal, 0, rows))
