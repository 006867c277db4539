"""Milliseconds, measured: on a GPU the clock waits for the device."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from adaptok.errors import ConfigError

Call = Callable[[], object]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Timing:
    """How long something took.

    Args:
        median_ms: median over the repeats, milliseconds.
        first_ms: first quartile.
        third_ms: third quartile.
    """

    median_ms: float
    first_ms: float
    third_ms: float

    @property
    def spread(self) -> float:
        """From the first to the third quartile, as a fraction of the median."""
        return (self.third_ms - self.first_ms) / self.median_ms if self.median_ms else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A call to measure, and what must hold around it.

    Args:
        call: what is measured; its result is dropped.
        around: makes a context that is entered before the clock starts and left after it has
            stopped, such as a budget.
    """

    call: Call
    around: Callable[[], AbstractContextManager[object]] = nullcontext


def measure_ms(fn: Call, *, repeats: int = 10, warmup: int = 2) -> Timing:
    """Measure how long a call takes.

    Args:
        fn: what to call; its result is dropped.
        repeats: measured calls, at least 1.
        warmup: calls before the clock runs.

    Returns:
        Median and quartiles of the measured calls.

    Raises:
        ConfigError: `repeats` is less than 1 or `warmup` less than 0.

    Example:
        >>> calls = []
        >>> timing = measure_ms(lambda: calls.append(1), repeats=5, warmup=1)
        >>> timing.median_ms >= 0, len(calls)
        (True, 6)
    """
    check_repeats(repeats, warmup)
    for _ in range(warmup):
        fn()
    return summarise([time_call(fn) for _ in range(repeats)])


def measure_interleaved(
    candidates: Mapping[str, Call | Candidate],
    *,
    repeats: int = 10,
    warmup: int = 2,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Measure several calls in turn, so that what the machine does meanwhile hits all alike.

    Args:
        candidates: what to call, by name; results are dropped.
        repeats: measured rounds, at least 1; in each round every candidate is called once.
        warmup: rounds before the clock runs.
        device: the device to wait for; None waits for a GPU that is in use.
        progress: told the rounds done and all rounds, after each round.

    Returns:
        Median and quartiles of each candidate, by name.

    Raises:
        ConfigError: `repeats` is less than 1 or `warmup` less than 0.

    Example:
        >>> timings = measure_interleaved({"sum": lambda: sum(range(9)), "nothing": int}, repeats=3)
        >>> list(timings)
        ['sum', 'nothing']
    """
    check_repeats(repeats, warmup)
    ready = {
        name: value if isinstance(value, Candidate) else Candidate(value)
        for name, value in candidates.items()
    }
    times: dict[str, list[float]] = {name: [] for name in ready}
    for round_ in range(warmup + repeats):
        for name, candidate in ready.items():
            with candidate.around():
                ms = time_call(candidate.call, device)
            if round_ >= warmup:
                times[name].append(ms)
        if progress is not None:
            progress(round_ + 1, warmup + repeats)
    return {name: summarise(values) for name, values in times.items()}


def check_repeats(repeats: int, warmup: int) -> None:
    """Raise a `ConfigError` unless there is something to measure."""
    if repeats < 1 or warmup < 0:
        raise ConfigError(
            f"measuring needs repeats >= 1 and warmup >= 0, got repeats={repeats} and "
            f"warmup={warmup}"
        )


def time_call(fn: Call, device: torch.device | None = None) -> float:
    """Return the milliseconds of one call; a GPU is waited for."""
    wait_for_device(device)
    start = time.perf_counter()
    fn()
    wait_for_device(device)
    return 1000 * (time.perf_counter() - start)


def summarise(times: list[float]) -> Timing:
    """Return median and quartiles of some times in milliseconds."""
    if len(times) < 2:
        return Timing(times[0], times[0], times[0])
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, first, third)


def wait_for_device(device: torch.device | None = None) -> None:
    """Wait until a device has done what it was given; None means a GPU that is in use."""
    if device is not None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    elif torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
