"""A model that takes turns with itself: under several budgets, without a stage, without all."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from adaptok.blocks import PARTS, AdaptiveBlocks, find_adaptive
from adaptok.budgeted import Budgeted, Settings, find_budgeted
from adaptok.budgets import Budget
from adaptok.calls import BlockCall
from adaptok.compiling import is_compiled
from adaptok.dc.model import DCDiT
from adaptok.errors import ConfigError
from adaptok.hosts import HostInputs, device_of
from adaptok.measure.budget_search import Round
from adaptok.measure.latency import Candidate, Timing, measure_interleaved
from adaptok.observers import Observer
from adaptok.stages import Stage
from adaptok.time_curves import CallShape, show_ms
from adaptok.tracing import observe

WARMUP = 2  # rounds; compiled models make their graphs in the first one
PLAIN, ALL = "plain model", "every stage"  # no stage is called so: names of stages have no blanks


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage of a wrap saves or costs, measured by leaving it out.

    Args:
        name: of the stage.
        saved_ms: milliseconds of a call without it, less those with it; below 0 it costs time.
        noise_ms: how far two such measurements may lie apart by chance.

    Example:
        >>> str(StageCost("dc", 12.3, 0.5)), StageCost("dc", -3.1, 0.5).loses
        ('dc saves 12.3 ms', True)
    """

    name: str
    saved_ms: float
    noise_ms: float

    @property
    def loses(self) -> bool:
        """Whether it costs more time than it saves, beyond the noise."""
        return self.saved_ms < -self.noise_ms

    def __str__(self) -> str:
        if abs(self.saved_ms) <= self.noise_ms:
            return f"{self.name} makes no difference that could be measured"
        verb = "costs" if self.saved_ms < 0 else "saves"
        return f"{self.name} {verb} {show_ms(abs(self.saved_ms))}"


class ShapeSeen(Observer):
    """Reads what a measured time depends on from a call."""

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        self.shape: CallShape | None = None

    def note_entry(self, call: BlockCall) -> None:
        """Take in the whole call, before any stage."""
        x = call.x
        self.shape = CallShape.of(x.shape[0], call.num_cells, x.dtype, x.device, self.compiled)


@dataclass(frozen=True, slots=True, eq=False)
class Turns:
    """A model that is measured, and what it is called with.

    Args:
        model: the model as it is called; a compiled one, say.
        blocks: its block list if it is wrapped.
        inputs: what it is called with.
        plain: another model to compare with; None means itself without stages, if it is wrapped.
        repeats: measured calls of each candidate.
    """

    model: nn.Module
    blocks: AdaptiveBlocks | None
    inputs: HostInputs
    plain: nn.Module | None
    repeats: int

    @classmethod
    def of(
        cls, model: nn.Module, inputs: HostInputs, plain: nn.Module | None, repeats: int
    ) -> "Turns":
        """Look whether a model can be measured.

        Raises:
            BudgetError: it has no part that takes a budget.
            ConfigError: it is neither wrapped nor a `DCDiT`, or it is wrapped and something else to
                compare with came.
        """
        find_budgeted(model)
        blocks = find_adaptive(model)
        if blocks is None and not isinstance(uncompiled(model), DCDiT):
            raise ConfigError(
                f"a wrapped model or a DCDiT can be measured, got a {type(model).__name__}"
            )
        if blocks is not None and plain is not None:
            raise ConfigError(
                "plain= is for a DCDiT: a wrapped model is compared with itself, without its stages"
            )
        return cls(model, blocks, inputs, plain, repeats)

    @property
    def parts(self) -> list[Budgeted]:
        """The parts that take a budget."""
        return find_budgeted(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return device_of(self.model)

    def call(self) -> object:
        """Run the model once."""
        return self.model(*self.inputs.args, **self.inputs.kwargs)

    def call_plain(self) -> object:
        """Run what it is compared with once."""
        assert self.plain is not None
        return self.plain(*self.inputs.args, **self.inputs.kwargs)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Leave budgets and stages as they are; inside, every stage takes part."""
        before = [Settings.of(part) for part in self.parts]
        stages = named_stages(self.blocks)
        aside = {name: stage.aside for name, stage in stages.items()}
        modes = {} if self.plain is None else {m: m.training for m in self.plain.modules()}
        try:
            for stage in stages.values():
                stage.aside = False
            if self.plain is not None:
                self.plain.eval()
            yield
        finally:
            for settings in before:
                settings.restore()
            for name, stage in stages.items():
                stage.aside = aside[name]
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def with_keep(self, keep: float) -> Iterator[None]:
        """Run with a share of the cells."""
        before = [Settings.of(part) for part in self.parts]
        try:
            for settings in before:
                settings.part.take_budget(Budget(keep=keep), None)
            yield
        finally:
            for settings in before:
                settings.restore()

    @contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Run without some stages."""
        stages = [stage for name, stage in named_stages(self.blocks).items() if name in names]
        try:
            for stage in stages:
                stage.aside = True
            yield
        finally:
            for stage in stages:
                stage.aside = False

    @contextmanager
    def without_all(self) -> Iterator[None]:
        """Run as the host would by itself (see `adaptok.tracing.plain`)."""
        assert self.blocks is not None
        try:
            self.blocks.plain = True
            yield
        finally:
            self.blocks.plain = False

    def look(self) -> CallShape:
        """Run the model once, and return what its time depends on beside the budget."""
        with self.with_keep(1.0):
            if self.blocks is None:
                self.call()
                return self.read_latents()
            seen = ShapeSeen(is_compiled(self.model))
            # looking on makes other graphs: none of them for one call
            with torch.compiler.set_stance("force_eager"), observe(self.model, seen):
                self.call()
        assert seen.shape is not None
        return seen.shape

    def read_latents(self) -> CallShape:
        """Return the same of a `DCDiT`, whose latents tell it."""
        model = uncompiled(self.model)
        assert isinstance(model, DCDiT)
        x = self.inputs.args[0] if self.inputs.args else self.inputs.kwargs["x"]
        weight = model.embed.weight
        compiled = bool(model.compiled_regions)
        n = x.shape[2] * x.shape[3]
        return CallShape.of(x.shape[0], n, weight.dtype, weight.device, compiled)

    def measure(self, keeps: Sequence[float]) -> Round:
        """Measure some budgets and the plain model, in turns."""
        candidates: dict[str, Candidate] = {}
        if self.plain is not None:
            candidates[PLAIN] = Candidate(self.call_plain)
        elif self.blocks is not None:
            candidates[PLAIN] = Candidate(self.call, self.without_all)
        names = {keep: f"keep={keep!r}" for keep in keeps}
        for keep, name in names.items():
            candidates[name] = Candidate(self.call, lambda keep=keep: self.with_keep(keep))  # type: ignore[misc]
        found = self.take_turns(candidates)
        return Round({keep: found[name] for keep, name in names.items()}, found.get(PLAIN))

    def take_turns(self, candidates: Mapping[str, Candidate]) -> dict[str, Timing]:
        """Time candidates, interleaved."""
        return measure_interleaved(
            candidates, repeats=self.repeats, warmup=WARMUP, device=self.device
        )

    def measure_stages(self, budget: Budget | None) -> tuple[StageCost, ...]:
        """Measure what each stage saves, by leaving it out, in turns.

        Args:
            budget: the budget meanwhile; None leaves the one that is set.

        Returns:
            One figure per stage, outermost first; none for a model that has no stages.
        """
        names = list(named_stages(self.blocks))
        if not names:
            return ()
        candidates = {ALL: Candidate(self.call)}
        for name in names:
            candidates[name] = Candidate(self.call, lambda name=name: self.without(name))  # type: ignore[misc]
        if budget is not None:
            for part in self.parts:
                part.take_budget(budget, None)  # the caller restores it
        found = self.take_turns(candidates)
        whole = found[ALL]
        return tuple(
            StageCost(
                name,
                found[name].median_ms - whole.median_ms,
                max(t.spread * t.median_ms for t in (whole, found[name])),
            )
            for name in names
        )


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that `torch.compile` was given, or the model itself."""
    original = getattr(model, "_orig_mod", model)
    assert isinstance(original, nn.Module)
    return original


def named_stages(blocks: AdaptiveBlocks | None) -> dict[str, Stage]:
    """Return the stages of a wrap by name, outermost first."""
    if blocks is None:
        return {}
    children = blocks.get_submodule(PARTS).named_children()
    return {name: stage for name, stage in children if isinstance(stage, Stage)}
