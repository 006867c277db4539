"""Runs: which calls of a model are successive steps of one sample, told by their times."""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class SampleRun:
    """Where one sample is on its way from noise to an image; plain numbers only.

    Args:
        last: time of the latest step, on the host's own scale.
        direction: sign of the steps of time; 0 after the first one.
        step: number of the latest step.
        computed: the step whose blocks ran last; None where there is nothing to reuse.
        orders: how many terms of its history are known (see `history.extend_terms`).
        distance: what a stage has summed up since that step.
        blind: its latest time came twice, so that nothing of it is kept.
        unsure: it began at a time that came twice, so that its second step is computed.
        repeats: how often the time of a later step came twice.
        tried: how many of its steps might have been reused.
        reused: how many of them were.
        nearest: the smallest distance at which one might have been; infinite if no number was.

    Example:
        >>> run = follow(follow(None, 999.0), 750.0)
        >>> run.step, run.direction
        (1, -1)
        >>> follow(run, 999.0).step  # back in time: another run
        0
    """

    last: float
    direction: int = 0
    step: int = 0
    computed: int | None = None
    orders: int = 0
    distance: float = 0.0
    blind: bool = False
    unsure: bool = False
    repeats: int = 0
    tried: int = 0
    reused: int = 0
    nearest: float = math.inf

    @property
    def age(self) -> int:
        """Steps since the blocks ran; 0 where they never did."""
        return 0 if self.computed is None else self.step - self.computed

    def after_try(self, distance: float | None) -> "SampleRun":
        """Return the run at a step that may be reused.

        Args:
            distance: how far the sample is from its last computed step, if that is measured.
        """
        near = distance is not None and distance < self.nearest  # not so for NaN
        nearest = distance if near and distance is not None else self.nearest
        return replace(self, tried=self.tried + 1, nearest=nearest)

    def after_reuse(self) -> "SampleRun":
        """Return the run after its latest step was reused."""
        return replace(self, reused=self.reused + 1)

    def after_compute(self, orders: int) -> "SampleRun":
        """Return the run after the blocks ran in its latest step.

        Args:
            orders: how many terms are kept at most.
        """
        if self.blind:
            return self
        known = min(self.orders + 1, orders) if self.computed is not None else 1
        return replace(self, computed=self.step, orders=known, distance=0.0)


def follow(run: SampleRun | None, time: float, steps: int | None = None) -> SampleRun:
    """Return where a sample is after one more call.

    A call belongs to the same run as long as time goes on in one direction. The time of the start
    once more begins another run. The time of a later step once more may be a second evaluation
    of that step, or another guidance branch that nobody named: nothing is reused in such a call,
    nor from it. Since a repeated start may be such a branch too, the step after it is computed.

    Args:
        run: where the sample was; None before the first call.
        time: diffusion time of the call.
        steps: how many steps a run has, where that is known; the next call begins another one.

    Returns:
        Where it is now; `computed` is None where nothing of before may be reused.
    """
    if run is None or not math.isfinite(time) or not math.isfinite(run.last):
        return SampleRun(time)
    if time == run.last:
        start = run.step == 0 and not run.blind
        repeats = run.repeats + (not start)
        return SampleRun(time, blind=not start, unsure=start, repeats=repeats)
    sign = 1 if time > run.last else -1
    if run.blind:
        return SampleRun(time, repeats=run.repeats)
    ended = steps is not None and run.step + 1 >= steps
    if ended or sign == -run.direction:
        return SampleRun(time)
    return replace(run, last=time, direction=sign, step=run.step + 1)
