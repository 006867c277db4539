"""TaylorSeer: between computed steps, what the blocks add is predicted from how it changed."""

from collections.abc import Sequence

from adaptok import BlockCall, BlockRange
from adaptok.errors import ConfigError
from adaptok_cache.book import CacheState
from adaptok_cache.runs import SampleRun
from adaptok_cache.stage import StepCache, Verdict, check_count

MOST_ORDERS = 8


class TaylorSeer(StepCache):
    """Computes every `interval`-th step, and predicts those between by a Taylor sum.

    Of what the blocks add to their input, differences are kept from computed step to computed
    step, each divided by the number of steps between; k steps later, the sum of
    `difference_j * k ** j / j!` is added. Orders that are not known yet count as 0.

    Args:
        interval: steps from one computed step to the next; 1 computes every step.
        order: highest difference; 0 adds again what was added last.
        steps: see `StepCache`; the last step is always computed.
        warmup: see `StepCache`.
        max_requests: see `StepCache`.
        agree: see `StepCache`.

    Raises:
        ConfigError: an option is out of range.
        HandOverError: (when called) there is no step.

    Example:
        >>> TaylorSeer(interval=4, order=2).orders
        3

    Paper: Liu et al., From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers,
    arXiv 2503.06923. Written from the description.
    """

    name = "taylorseer"

    def __init__(
        self,
        interval: int = 4,
        order: int = 1,
        steps: int | None = None,
        warmup: int = 2,
        max_requests: int = 4,
        agree: bool = False,
    ) -> None:
        check_count(self.name, "interval", interval)
        check_order(self.name, order)
        super().__init__(steps=steps, warmup=warmup, max_requests=max_requests, agree=agree)
        self.interval = interval
        self.order = order
        self.orders = order + 1

    def describe_options(self) -> dict[str, object]:
        """Return interval and order."""
        return {"interval": self.interval, "order": self.order}

    @property
    def wants_reuse(self) -> bool:
        """Whether a step may be reused at all."""
        return self.interval > 1

    def judge(
        self, inner: BlockRange, call: BlockCall, state: CacheState, runs: Sequence[SampleRun]
    ) -> Verdict:
        """Look at the steps since a sample was computed (see `StepCache.judge`)."""
        return Verdict(call, inner, [run.age < self.interval for run in runs], runs)


def check_order(stage: str, order: object) -> None:
    """Raise a `ConfigError` unless an order is a whole number that is not too large."""
    if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order <= MOST_ORDERS:
        raise ConfigError(
            f"order of {stage!r} is a whole number from 0 to {MOST_ORDERS}, got {order!r}"
        )
