"""Interleaved timing: every candidate once per round, medians over the rounds."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and spread of one candidate, in milliseconds.

    Args:
        median: median over the rounds.
        low: first quartile.
        high: third quartile.
    """

    median: float
    low: float
    high: float


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Time candidates in turn, so that what the machine does meanwhile hits all alike.

    Args:
        candidates: what to run, by name.
        rounds: how often each is run, after two rounds that are not counted.
        device: where they run; a GPU is waited for.

    Returns:
        Timings by name.
    """
    seen: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 2):
        for name, run in candidates.items():
            wait_for(device)
            start = time.perf_counter()
            run()
            wait_for(device)
            if round_ >= 2:
                seen[name].append(1e3 * (time.perf_counter() - start))
    return {name: summarise(values) for name, values in seen.items()}


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarise(values: list[float]) -> Timing:
    """Return median and quartiles."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(quartiles[1], quartiles[0], quartiles[2])


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return what a reader must know about the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = str(torch.get_num_threads())
    return {"device": f"{device.type}: {name}", "threads": threads, "torch": torch.__version__}
