"""TeaCache: a step is reused while what goes into the blocks has hardly moved since they ran."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from adaptok import BlockCall, BlockRange
from adaptok.calibrated import CalibrationRecord, Fitted, Row, RunBatch, read_setting, read_wanted
from adaptok.errors import ConfigError, HandOverError
from adaptok_cache.book import CacheState
from adaptok_cache.distances import relative_change
from adaptok_cache.fitting import DEGREE, PairLog, check_degree, fit_steps
from adaptok_cache.history import spread_cells
from adaptok_cache.runs import SampleRun
from adaptok_cache.stage import StepCache, Verdict

Signal = Literal["input", "condition"]
IDENTITY = (0.0, 0.0, 0.0, 1.0, 0.0)


class TeaCache(StepCache):
    """Reuses what the blocks added to their input while the input moves little.

    From step to step, the distance of a signal is `mean|m_t - m_{t-1}| / mean|m_{t-1}|` of each
    sample. A polynomial turns it into the distance that the output is expected to move; these are
    summed up from the last computed step on, and a sample is computed again when the sum reaches
    the threshold.

    Args:
        threshold: sum up to which a sample is reused; 0 computes every step, and so does a
            distance that is no number.
        coefficients: of the polynomial, highest power first; its values below 0 count as 0.
        signal: `"input"`: the grid tokens in front of the first block; `"condition"`: the
            conditioning vector, which moves with the step only.
        steps: see `StepCache`; the last step is always computed.
        warmup: see `StepCache`. With less than 2, a run of one step and the run after it cannot
            always be told apart where both have one name.
        max_requests: see `StepCache`.
        agree: see `StepCache`.

    Raises:
        ConfigError: an option is out of range.
        HandOverError: (when called) there is no step, or no conditioning vector.

    Example:
        >>> import adaptok, torch
        >>> from adaptok.dc.baseline import DiT
        >>> from adaptok.dc.config import DiTConfig
        >>> dit = DiT(DiTConfig(hidden_size=64, depth=3, num_heads=4, latent_size=8)).eval()
        >>> cache = TeaCache(threshold=10.0)
        >>> _ = adaptok.wrap(dit, stack=[cache])
        >>> x, y = torch.randn(1, 4, 8, 8), torch.tensor([1])
        >>> with torch.no_grad(), adaptok.request(dit, "one"):
        ...     for t in (900.0, 800.0, 700.0, 600.0):
        ...         out = dit(x, torch.tensor([t]), y)
        >>> cache.computed, cache.reused
        (2, 2)

    Paper: Liu et al., Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model,
    arXiv 2411.19108.
    """

    name = "teacache"
    advice = ", or fit the polynomial to this model by `adaptok.calibrate`"

    def __init__(
        self,
        threshold: float = 0.06,
        coefficients: tuple[float, ...] = IDENTITY,
        signal: Signal = "input",
        steps: int | None = None,
        warmup: int = 2,
        max_requests: int = 4,
        agree: bool = False,
    ) -> None:
        check_threshold(self.name, threshold)
        self.check_coefficients(coefficients)
        if signal not in ("input", "condition"):
            raise ConfigError(f"signal of {self.name!r} is 'input' or 'condition', got {signal!r}")
        super().__init__(steps=steps, warmup=warmup, max_requests=max_requests, agree=agree)
        self.threshold: float = threshold
        self.coefficients = tuple(coefficients)
        self.signal = signal
        self.log: PairLog | None = None  # the caller's, while a batch is measured

    @classmethod
    def check_coefficients(cls, coefficients: Sequence[float]) -> None:
        """Raise a `ConfigError` unless there is at least one finite coefficient."""
        if not coefficients or not all(math.isfinite(value) for value in coefficients):
            raise ConfigError(
                f"coefficients of {cls.name!r} are finite numbers, the highest power first, such "
                f"as {IDENTITY}, got {coefficients!r}"
            )

    def describe_options(self) -> dict[str, object]:
        """Return threshold and signal."""
        return {"threshold": self.threshold, "signal": self.signal}

    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run the inner blocks on the samples that cannot be reused (see `StepCache.forward`)."""
        if self.log is None or call.timestep is None:
            return super().forward(inner, call)
        return self.log.run(inner, call, self.find_signal(call))

    def plan_calibration(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Fit a polynomial of the wanted `degree`, up to 4 (see `adaptok.calibrate`)."""
        plan = read_wanted(self.name, wanted, {"degree": DEGREE})
        check_degree(plan["degree"])
        return {**plan, "signal": self.signal}

    def measure_batch(self, run: RunBatch, wanted: Mapping[str, Any]) -> Sequence[Row]:
        """Note how far input and output move, with every step computed and nothing kept."""
        self.log = PairLog()
        try:
            run()
            return self.log.list_rows()
        finally:
            self.log = None

    @classmethod
    def fit_settings(
        cls, chosen: CalibrationRecord, held_out: CalibrationRecord, wanted: Mapping[str, Any]
    ) -> Fitted:
        """Fit the polynomial (see `fit_steps`)."""
        return fit_steps(chosen, held_out, wanted)

    def read_settings(self) -> dict[str, Any]:
        """Return coefficients, signal and threshold."""
        fitted = {"coefficients": list(self.coefficients), "signal": self.signal}
        return {**fitted, "threshold": self.threshold}

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Run with other coefficients, and begin all runs anew; a fit leaves the threshold."""
        given = {"threshold": self.threshold, **settings}
        names = ("coefficients", "signal", "threshold")
        coefficients, signal, threshold = read_setting(self.name, given, names)
        check_threshold(self.name, threshold)
        if signal != self.signal:
            raise ConfigError(
                f"the polynomial was fitted to signal={signal!r}, and this {self.name!r} has "
                f"signal={self.signal!r}"
            )
        self.check_coefficients(coefficients)
        self.coefficients, self.threshold = tuple(coefficients), threshold
        self.forget()

    def judge(
        self, inner: BlockRange, call: BlockCall, state: CacheState, runs: Sequence[SampleRun]
    ) -> Verdict:
        """Sum up how far the signal moved (see `StepCache.judge`)."""
        signal = self.find_signal(call)
        before = signal if state.signal is None else state.signal
        moved = []
        for run, distance in zip(runs, relative_change(signal, before), strict=True):
            step = evaluate_polynomial(self.coefficients, distance)
            moved.append(replace(run, distance=run.distance + (0.0 if step < 0 else step)))
        fits = [run.distance < self.threshold for run in moved]
        distances = [run.distance for run in moved]
        return Verdict(call, inner, fits, moved, signal.clone(), distances)

    def find_signal(self, call: BlockCall) -> Float[Tensor, "b ..."]:
        """Return what is compared from step to step."""
        if self.signal == "input":
            return spread_cells(call, call.cell_x)
        if call.condition is None:
            raise HandOverError(
                f"{self.name!r} with signal='condition' needs a conditioning vector of each "
                "sample, and this host hands none over: give signal='input'"
            )
        return call.condition


def evaluate_polynomial(coefficients: Sequence[float], x: float) -> float:
    """Return the value of a polynomial, highest power first.

    Args:
        coefficients: the coefficients.
        x: where.

    Example:
        >>> evaluate_polynomial((2.0, 0.0, 1.0), 3.0)
        19.0
    """
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def check_threshold(stage: str, threshold: object) -> None:
    """Raise a `ConfigError` unless a threshold is a number of at least 0."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0:
        raise ConfigError(
            f"threshold of {stage!r} is a number of at least 0, which computes every step, got "
            f"{threshold!r}"
        )
