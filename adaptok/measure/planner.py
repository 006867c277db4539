"""Budgets in milliseconds: measured on this device, with these inputs."""

from dataclasses import dataclass

import torch
from torch import nn

from adaptok.blocks import find_adaptive
from adaptok.budgeted import describe_miss, set_budget
from adaptok.budgets import Budget, check_amount, check_target
from adaptok.errors import BudgetError, UnknownNameError
from adaptok.measure.budget_search import Measured, search_budgets
from adaptok.measure.machine import describe_machine
from adaptok.measure.subjects import Inputs, read_inputs
from adaptok.measure.turns import StageCost, Turns, named_stages
from adaptok.probing import undisturbed
from adaptok.time_curves import CallShape, CurvePoint, TimeCurve, show_ms
from adaptok.tracing import require_adaptive


@dataclass(frozen=True, slots=True)
class Applied:
    """What `Plan.apply` changed in a model.

    Args:
        budget: the budget that is set now; None if it was left as it was.
        aside: the stages that have stepped aside.

    Example:
        >>> print(Applied(Budget(keep=0.43), ("dc",)))
        keep=0.43; dc stepped aside, adaptok.set_aside(model) brings every stage back
    """

    budget: Budget | None
    aside: tuple[str, ...]

    def __str__(self) -> str:
        text = "the budget stays as it was" if self.budget is None else self.budget.describe()
        if not self.aside:
            return f"{text}; every stage takes part"
        names = ", ".join(self.aside)
        return f"{text}; {names} stepped aside, adaptok.set_aside(model) brings every stage back"


@dataclass(frozen=True, slots=True)
class Plan:
    """What was measured, and the budget that follows from it; print it for one sentence.

    Args:
        curve: milliseconds over the share of kept cells, with the shape of the measured call.
        plain: the model without adaptive parts; None if there is none to compare with.
        target_ms: the time that was asked for.
        budget: the budget that meets it, or the one asked for; None if nothing was.
        stages: what each stage saves or costs with that budget, or else with the one that was set.
        repeats: measured calls behind each figure, per round.
        machine: where.

    Example:
        >>> shape = CallShape(8, 100, "float32", "cpu", 2)
        >>> curve = TimeCurve(shape, (CurvePoint(0.1, 20.0), CurvePoint(1.0, 80.0)))
        >>> plan = Plan(curve, CurvePoint(1.0, 74.0), 41.8, Budget(keep=0.42))
        >>> print(str(plan).splitlines()[0])
        keep=0.42 runs in 41.3 ms (plain 74.0 ms); below keep=0.91 it is faster than the plain model
    """

    curve: TimeCurve
    plain: CurvePoint | None
    target_ms: float | None = None
    budget: Budget | None = None
    stages: tuple[StageCost, ...] = ()
    repeats: int = 0
    machine: str = ""

    @property
    def points(self) -> tuple[CurvePoint, ...]:
        """The measured budgets, by rising `keep`."""
        return self.curve.points

    @property
    def shape(self) -> CallShape:
        """Which calls were measured."""
        return self.curve.shape

    @property
    def keep(self) -> float | None:
        """Share of the cells that the budget keeps."""
        if self.budget is None:
            return None
        n = self.shape.num_cells
        return self.budget.count(n) / n

    @property
    def expected_ms(self) -> float | None:
        """Milliseconds of a call with the budget."""
        return None if self.keep is None else self.curve.ms_at(self.keep)

    @property
    def spread(self) -> float | None:
        """From the first to the third quartile around the budget, as a fraction of the median."""
        return None if self.keep is None else self.curve.spread_at(self.keep)

    @property
    def plain_ms(self) -> float | None:
        """Milliseconds of the plain model; None if there is none to compare with."""
        return None if self.plain is None else self.plain.ms

    @property
    def overhead_ms(self) -> float | None:
        """Milliseconds that every cell kept takes more than the plain model."""
        return None if self.plain is None else self.curve.full_ms - self.plain.ms

    @property
    def break_even(self) -> float | None:
        """The share of kept cells up to which it is faster than the plain model; None if never."""
        return Measured(self.curve, self.plain).break_even

    @property
    def pays(self) -> bool | None:
        """Whether the budget (or any, if none was asked for) is faster than the plain model.

        None if there is no plain model to compare with.
        """
        if self.plain is None:
            return None
        if self.expected_ms is None:
            return self.break_even is not None
        return self.expected_ms < self.plain.ms

    @property
    def losing(self) -> tuple[str, ...]:
        """Names of the stages that cost more time than they save."""
        return tuple(stage.name for stage in self.stages if stage.loses)

    def apply(self, model: nn.Module) -> Applied:
        """Set the budget of a model, and let the stages that lose step aside; all others run.

        `adaptok.set_aside(model)` brings every stage back, and `adaptok.set_budget` those that
        take a budget.

        Args:
            model: the model that was measured, or a copy of it.

        Returns:
            What changed.

        Raises:
            BudgetError: the model has no adaptive part.
            UnknownNameError: the model has no such stage.
        """
        if find_adaptive(model) is not None:
            set_aside(model, *self.losing)
        if self.keep is not None:
            set_budget(model, keep=self.keep)
        if self.losing:  # setting a budget brought them back
            set_aside(model, *self.losing)
        return Applied(self.budget, self.losing)

    def __str__(self) -> str:
        lines = [describe_answer(self), f"  {self.shape.describe()}; {describe_curve(self.curve)}"]
        if self.stages:
            lines.append("  " + "; ".join(map(str, self.stages)))
        if self.machine:
            lines.append(f"  medians of {self.repeats} calls in turns; {self.machine}")
        return "\n".join(lines)


def describe_answer(plan: Plan) -> str:
    """Say in one sentence what a plan found."""
    keep = 1.0 if plan.keep is None else plan.keep
    text = f"keep={keep:.3g} runs in {show_ms(plan.curve.ms_at(keep))}"
    if plan.target_ms is not None and keep == plan.curve.points[-1].keep:
        text = f"the full budget meets {plan.target_ms:g} ms already: {text}"
    if plan.plain is None:
        return f"{text}; there is no plain model to compare with"
    text += f" (plain {show_ms(plan.plain.ms)})"
    if plan.target_ms is not None and plan.plain.ms <= plan.target_ms < plan.curve.full_ms:
        text += f"; the plain model meets {plan.target_ms:g} ms with every cell"
    if plan.break_even is None:
        return f"{text}; no budget is faster than the plain model"
    if plan.break_even == plan.curve.points[-1].keep:
        return f"{text}; no budget is slower than the plain model"
    return f"{text}; below keep={plan.break_even:.3g} it is faster than the plain model"


def describe_curve(curve: TimeCurve) -> str:
    """List the points of a curve."""
    return ", ".join(f"keep={point.keep:.3g} {show_ms(point.ms)}" for point in curve.points)


def plan(
    model: nn.Module,
    inputs: Inputs,
    *,
    target_ms: float | None = None,
    keep: float | None = None,
    plain: nn.Module | None = None,
    repeats: int = 7,
    points: int = 5,
) -> Plan:
    """Measure a model with some budgets here and now, and find the one that meets a time.

    The plain model and the budgets take turns, so that what the machine does meanwhile hits all
    alike; a second round looks closer at the answer. The model is measured as it will run: under
    the autocast, the threads and the compilation that are on, in eval mode and without gradients.
    It remembers the curve, for `adaptok.budget(model, target_ms=...)`, and stays as it was.

    Args:
        model: a wrapped model, or a `DCDiT`.
        inputs: what it is called with: one tensor, several, a mapping of arguments by name, or
            `adaptok.HostInputs`.
        target_ms: milliseconds of a call that must not be exceeded.
        keep: share of the cells whose time is asked for, instead of a target.
        plain: what to compare a `DCDiT` with, called with the same inputs: `adaptok.dc.DiT`, say.
            A wrapped model is compared with itself, without its stages.
        repeats: measured calls of each budget in each of the two rounds.
        points: budgets of the first round.

    Returns:
        The plan.

    Raises:
        BudgetError: the target is out of reach, both `target_ms` and `keep` came, a value is out
            of range, or the model takes no budget.
        ConfigError: `repeats` or `points` is too small, or the model cannot be measured.
        ShapeError: there are no inputs.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> found = plan(vit, torch.randn(2, 3, 32, 48), keep=0.5, repeats=1, points=2)
        >>> found.shape.batch, found.shape.num_cells, found.budget.describe()
        (2, 24, 'keep=0.5')
    """
    if target_ms is not None and keep is not None:
        raise BudgetError("target_ms and keep exclude each other: give one of them")
    if target_ms is not None:
        check_target(target_ms)
    if keep is not None:
        check_amount("keep", keep)
    turns = Turns.of(model, read_inputs(inputs), plain, repeats)
    with undisturbed(model), torch.no_grad(), turns.restoring():
        shape = turns.look()
        found = search_budgets(turns.measure, shape, points=points, target_ms=target_ms, keep=keep)
        for part in turns.parts:
            part.take_curve(found.curve)
        chosen = choose_budget(found.curve, target_ms, keep)
        stages = turns.measure_stages(chosen)
    machine = str(describe_machine(turns.device))
    return Plan(found.curve, found.plain, target_ms, chosen, stages, repeats, machine)


def choose_budget(curve: TimeCurve, target_ms: float | None, keep: float | None) -> Budget | None:
    """Return the budget that was asked for, by its time or by itself."""
    if target_ms is None:
        return None if keep is None else Budget(keep=keep)
    found = curve.find_keep(target_ms)
    if found is None:
        raise BudgetError(describe_miss(target_ms, curve))
    return Budget(keep=found)


def set_aside(model: nn.Module, *names: str) -> None:
    """Let some stages of a wrapped model step aside, and all others take part.

    A stage that stepped aside is not run, as if it was not there; nothing of it is lost.

    Args:
        model: a wrapped model.
        names: of the stages, as `adaptok.plan` reports them; none brings every stage back.

    Raises:
        NotWrappedError: the model is not wrapped.
        UnknownNameError: there is no such stage.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit, image = make_vit(), torch.randn(2, 3, 32, 48)
        >>> before = vit(image)
        >>> set_aside(adaptok.wrap(vit, chunker="dc", budget=0.5), "dc")
        >>> torch.equal(vit(image), before)
        True
    """
    stages = named_stages(require_adaptive(model))
    for name in names:
        if name not in stages:
            raise UnknownNameError(
                f"there is no stage {name!r}: this model has {', '.join(stages)}"
            )
    for name, stage in stages.items():
        stage.aside = name in names
