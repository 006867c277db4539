"""Confidence exit: a sample leaves as soon as a small head is sure that it may."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from adaptok import BlockCall, BlockRange, Effects, Stage
from adaptok.calibrated import CalibrationRecord, Fitted, Row, RunBatch, read_setting
from adaptok.errors import ConfigError, StackError
from adaptok_exit.judging import ExitJudge
from adaptok_exit.leaving import ExitAdapter, adapt, join_samples, select_samples, tell_depths
from adaptok_exit.places import QUARTERS, check_blocks, find_places

Threshold = float | tuple[float, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class ExitRecord:
    """What one call of a model had at its exits, when nobody left.

    Args:
        exits: the tokens at each exit.
        last: the tokens behind the last block.
    """

    exits: tuple[BlockCall, ...]
    last: BlockCall


class ConfidenceExit(Stage):
    """Lets a sample leave in front of some blocks when a head is sure of it.

    A head at each exit reads the class token (or the mean of the grid tokens, where there is none)
    and gives a confidence. Samples above the threshold leave: an adapter maps their features into
    the space behind the last block, where the host's own norm and head read them. The others go on
    by themselves, so that blocks compute nothing for who has left.

    Fresh heads are sure of nothing, so that nobody leaves. `adaptok_exit.training.train_exits`
    trains heads and adapters, `adaptok_exit.calibration.calibrate_thresholds` finds thresholds. In
    training mode nobody leaves.

    Args:
        width: features of a token; filled by the host.
        blocks: the blocks in front of which samples may leave; None takes a half and three
            quarters of the span: `(6, 9)` of 12.
        threshold: confidence above which a sample leaves, in (0, 1], for all exits or one per
            exit; None: nobody leaves, and the heads are evaluated.

    Raises:
        ConfigError: an option is out of range.
        StackError: (when wrapped or called) there is no such block, or the host is a diffusion
            transformer.

    Example:
        >>> import torch, adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=[{"name": "exit", "threshold": 0.9}])
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(torch.randn(2, 3, 32, 48))
        >>> seen.steps[0].depths
        tensor([3, 3])

    Paper: Teerapittayanon et al., BranchyNet: Fast Inference via Early Exiting, 2016.
    """

    effects: ClassVar[Effects] = Effects("depth")
    name = "exit"

    def __init__(
        self, width: int, blocks: tuple[int, ...] | None = None, threshold: Threshold = None
    ) -> None:
        super().__init__()
        self.blocks = check_blocks(blocks)
        count = len(QUARTERS if self.blocks is None else self.blocks)
        self.judges = nn.ModuleList(ExitJudge(width) for _ in range(count))
        self.adapters = nn.ModuleList(ExitAdapter(width) for _ in range(count))
        self.records: list[ExitRecord] | None = None  # the caller's, inside `record`
        self.answer: BlockCall | None = None  # the caller's, inside `replay`
        self.threshold: Threshold = None
        self.set_threshold(threshold)

    @property
    def num_exits(self) -> int:
        """How many exits there are."""
        return len(self.judges)

    @property
    def limits(self) -> tuple[float, ...]:
        """The threshold of each exit; infinity: nobody leaves there."""
        return tuple(float(self.judge(number).limit) for number in range(self.num_exits))

    def judge(self, number: int) -> ExitJudge:
        """Return the head of an exit."""
        judge = self.judges[number]
        assert isinstance(judge, ExitJudge)
        return judge

    def set_threshold(self, threshold: Threshold | Sequence[float]) -> None:
        """Let samples leave above other confidences from now on.

        Args:
            threshold: see `ConfidenceExit`.

        Raises:
            ConfigError: it is out of range, or there is not one per exit.
        """
        limits = spread_threshold(threshold, self.num_exits)
        many = isinstance(threshold, Sequence)
        self.threshold = tuple(threshold) if many else threshold  # type: ignore[arg-type, assignment]
        for number, limit in enumerate(limits):
            self.judge(number).limit.fill_(limit)

    def describe(self) -> Mapping[str, str]:
        """Return what `repr` of a wrapped model shows."""
        where = "1/2, 3/4" if self.blocks is None else ", ".join(map(str, self.blocks))
        limits = ", ".join("none" if math.isinf(x) else f"{x:.4g}" for x in self.limits)
        return {"exit": f"blocks {where}, thresholds {limits}"}

    def find_first(self, first: int, last: int) -> int:
        """Return the block before the first exit (see `Stage.find_first`)."""
        places = find_places(self.blocks, first, last, short=0)
        if not places:
            raise StackError(
                f"an exit lies between two blocks, and the span ({first}, {last}) has one: give a "
                "longer span"
            )
        return places[0][1] - 1

    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run blocks for those who have not left (see `Stage.forward`)."""
        if call.timestep is not None and not call.has_class:
            raise StackError(
                "'exit' judges what a picture shows, and this host is a diffusion transformer, "
                "where the step says how deep to go: use stack=['schedule']"
            )
        if self.answer is not None:
            return replace(call, x=self.answer.x, streams=self.answer.streams)
        if self.records is not None or self.training:
            return self.run_all(inner, call)
        staying, group, at = list(range(call.x.shape[0])), call, inner.first
        depths = [inner.last] * len(staying)
        parts: list[BlockCall] = []
        samples: list[list[int]] = []
        for number, block in find_places(self.blocks, inner.first, inner.last):
            group, at = inner.run(group, at, block), block
            leaves = self.judge(number).choose_leavers(group)
            if not any(leaves):
                continue
            out = [place for place, left in enumerate(leaves) if left]
            parts.append(adapt(select_samples(group, out), self.adapters[number]))
            samples.append([staying[place] for place in out])
            for sample in samples[-1]:
                depths[sample] = block
            rest = [place for place, left in enumerate(leaves) if not left]
            staying = [staying[place] for place in rest]
            if not rest:
                break
            group = select_samples(group, rest)
        if staying or not parts:  # also where no sample came at all
            parts.append(inner.run(group, at, inner.last))
            samples.append(staying)
        tell_depths(call, self.name, depths)
        return join_samples(call, parts, samples)

    def run_all(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run all blocks in the same pieces, for everybody, and note what the exits see."""
        exits, at, group = [], inner.first, call
        for _, block in find_places(self.blocks, inner.first, inner.last):
            group, at = inner.run(group, at, block), block
            exits.append(replace(group, observers=()))
        group = inner.run(group, at, inner.last)
        if self.records is not None:
            self.records.append(ExitRecord(tuple(exits), replace(group, observers=())))
        tell_depths(call, self.name, [inner.last] * call.x.shape[0])
        return replace(call, x=group.x, streams=group.streams)

    def plan_calibration(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Fit thresholds to the wanted `agreement` (see `adaptok.calibrate`)."""
        from adaptok_exit.fitting import plan_exits  # which knows this class

        return plan_exits(self, wanted)

    def measure_batch(self, run: RunBatch, wanted: Mapping[str, Any]) -> Sequence[Row]:
        """Note how sure each exit is, and who agrees."""
        from adaptok_exit.fitting import measure_exits

        return measure_exits(self, run, wanted)

    @classmethod
    def fit_settings(
        cls, chosen: CalibrationRecord, held_out: CalibrationRecord, wanted: Mapping[str, Any]
    ) -> Fitted:
        """Choose thresholds."""
        from adaptok_exit.fitting import fit_exits

        return fit_exits(chosen, held_out, wanted)

    def read_settings(self) -> dict[str, Any]:
        """Return the thresholds."""
        return {"threshold": self.threshold}

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Let samples leave above other confidences."""
        self.set_threshold(*read_setting(self.name, settings, ("threshold",)))

    @contextmanager
    def record(self) -> Iterator[list[ExitRecord]]:
        """Collect the tokens at the exits of the calls inside a `with` block; nobody leaves.

        Yields:
            A list that gets one record per call.
        """
        before, self.records = self.records, []
        try:
            yield self.records
        finally:
            self.records = before

    @contextmanager
    def replay(self, number: int, record: ExitRecord) -> Iterator[None]:
        """Let all samples of a call that was recorded leave at one exit, without any block.

        Args:
            number: the exit.
            record: of a call with the same inputs.

        Yields:
            Nothing.
        """
        before, self.answer = self.answer, adapt(record.exits[number], self.adapters[number])
        try:
            yield
        finally:
            self.answer = before


def spread_threshold(threshold: Threshold | Sequence[float], count: int) -> tuple[float, ...]:
    """Return the threshold of each exit, infinity where nobody leaves.

    Args:
        threshold: see `ConfidenceExit`.
        count: how many exits there are.

    Raises:
        ConfigError: it is out of range, or there is not one per exit.

    Example:
        >>> spread_threshold(0.9, 2), spread_threshold(None, 1)
        ((0.9, 0.9), (inf,))
    """
    if threshold is None:
        return (math.inf,) * count
    values = tuple(threshold) if isinstance(threshold, Sequence) else (threshold,) * count
    if len(values) != count:
        raise ConfigError(
            f"threshold has one confidence for each of the {count} exits, or one for all, got "
            f"{len(values)}"
        )
    for value in values:
        if type(value) not in (int, float) or not (0.0 < value <= 1.0 or value == math.inf):
            raise ConfigError(
                f"threshold is a confidence in (0, 1] (at 1 nobody leaves), got {value!r}"
            )
    return tuple(float(value) for value in values)
