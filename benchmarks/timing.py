"""Interleaved timing for the scripts of this folder, in the form of their result files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from adaptok import measure

WARMUP = 2


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
    timings = measure.measure_interleaved(candidates, repeats=rounds, warmup=WARMUP, device=device)
    return {name: Timing(t.median_ms, t.first_ms, t.third_ms) for name, t in timings.items()}


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return what a reader must know about the machine."""
    machine = measure.describe_machine(device)
    return {
        "device": f"{device.type}: {machine.name}",
        "threads": str(machine.threads),
        "torch": machine.torch,
    }
