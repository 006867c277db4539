"""Idle walks: all their steps were computed though some might have been reused."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adaptok_cache.runs import SampleRun

LEAST = 8  # a walk that ended with fewer steps has hardly any to reuse
PATIENCE = 24  # steps after which the end of a walk is not waited for, where it is not known


class IdleCacheWarning(UserWarning):
    """A step cache computes every step; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class IdleWalk:
    """A walk whose steps were all computed.

    Args:
        steps: how many it had.
        tried: whether one of them might have been reused.
        nearest: the smallest distance of those that might have been.
    """

    steps: int
    tried: bool
    nearest: float


def find_ended(
    latest: Sequence[SampleRun | None], now: Sequence[SampleRun | None], limit: int | None
) -> list[SampleRun]:
    """Return samples whose walk is over, or so long that its end is not waited for.

    Args:
        latest: where samples were before a step.
        now: where they are.
        limit: how many steps a walk has, where that is known.
    """
    left = [old for old, new in zip(latest, now, strict=True) if new is not None and new.step == 0]
    ended = [old for old in left if old is not None]
    return ended + [run for run in now if run is not None and run.step + 1 == (limit or PATIENCE)]


def find_idle(ended: Sequence[SampleRun], others: Iterable[SampleRun]) -> IdleWalk | None:
    """Return what came of a walk in which nothing was reused.

    Args:
        ended: samples whose walk is over.
        others: the other samples of the request, of each guidance branch.

    Returns:
        The walk; None if a sample was reused, or none has at least 8 steps.

    Example:
        >>> find_idle([SampleRun(1.0, step=9, tried=7, nearest=0.2)], [])
        IdleWalk(steps=10, tried=True, nearest=0.2)
        >>> find_idle([SampleRun(1.0, step=9, tried=7, reused=1)], []) is None
        True
    """
    steps = max((run.step + 1 for run in ended), default=0)
    if steps < LEAST or any(run.reused for run in (*ended, *others)):
        return None
    return IdleWalk(steps, any(run.tried for run in ended), min(run.nearest for run in ended))


def explain_distance(nearest: float, threshold: float, advice: str) -> str:
    """Say why no distance was below a threshold, and what to do.

    Args:
        nearest: the smallest distance that was seen.
        threshold: the threshold.
        advice: what else may be done.

    Example:
        >>> explain_distance(0.0712, 0.06, "").partition(":")[0]
        'the smallest distance was 0.0712, and threshold=0.06 reuses what is below it'
    """
    if nearest < threshold:
        return "with agree=True other processes had to compute"
    if not math.isfinite(nearest):
        return "no distance was a finite number: look at what goes into the blocks"
    return (
        f"the smallest distance was {nearest:.3g}, and threshold={threshold:g} reuses what is "
        f"below it: give a larger one{advice}. threshold=0 computes every step in silence"
    )
