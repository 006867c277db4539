"""Milliseconds, measured: on a GPU the clock waits for the device."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from adaptok.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Timing:
    """How long something took.

    Args:
        median_ms: median over the repeats, milliseconds.
        spread: from the first to the third quartile, as a fraction of the median.
    """

    median_ms: float
    spread: float


def measure_ms(fn: Callable[[], object], *, repeats: int = 10, warmup: int = 2) -> Timing:
    """Measure how long a call takes.

    Args:
        fn: what to call; its result is dropped.
        repeats: measured calls, at least 1.
        warmup: calls before the clock runs.

    Returns:
        Median and spread of the measured calls.

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
    candidates: Mapping[str, Callable[[], object]], *, repeats: int = 10, warmup: int = 2
) -> dict[str, Timing]:
    """Measure several calls in turn, so that what the machine does meanwhile hits all alike.

    Args:
        candidates: what to call, by name; results are dropped.
        repeats: measured rounds, at least 1; in each round every candidate is called once.
        warmup: rounds before the clock runs.

    Returns:
        Median and spread of each candidate, by name.

    Raises:
        ConfigError: `repeats` is less than 1 or `warmup` less than 0.

    Example:
        >>> timings = measure_interleaved({"sum": lambda: sum(range(9)), "nothing": int}, repeats=3)
        >>> list(timings)
        ['sum', 'nothing']
    """
    check_repeats(repeats, warmup)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(warmup + repeats):
        for name, fn in candidates.items():
            ms = time_call(fn)
            if round_ >= warmup:
                times[name].append(ms)
    return {name: summarise(values) for name, values in times.items()}


def check_repeats(repeats: int, warmup: int) -> None:
    """Raise a `ConfigError` unless there is something to measure."""
    if repeats < 1 or warmup < 0:
        raise ConfigError(
            f"measuring needs repeats >= 1 and warmup >= 0, got repeats={repeats} and "
            f"warmup={warmup}"
        )


def time_call(fn: Callable[[], object]) -> float:
    """Return the milliseconds of one call; a GPU is waited for."""
    wait_for_device()
    start = time.perf_counter()
    fn()
    wait_for_device()
    return 1000 * (time.perf_counter() - start)


def summarise(times: list[float]) -> Timing:
    """Return median and relative quartile distance of some times in milliseconds."""
    median = statistics.median(times)
    if len(times) < 2 or median == 0:
        return Timing(median, 0.0)
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, (third - first) / median)


def wait_for_device() -> None:
    """Wait until a GPU that is in use has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
