"""Which budget a model runs with: set for good, for a block of calls, or for one call."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from adaptok.budgets import Amount, Budget, listed, spread_amount
from adaptok.errors import BudgetError
from adaptok.time_curves import CallShape, TimeCurve, show_ms

CallKey = tuple[int, int, torch.dtype, str]  # batch, cells, dtype, device


class Budgeted(nn.Module):
    """A module whose number of kept cells `set_budget` can change.

    The setting is configuration like a module's train mode, not a result of a forward pass; so are
    the times that `adaptok.plan` measured.
    """

    budget_setting: Budget = Budget()
    uncond_setting: Budget | None = None
    aside: bool = False  # as in `Stage`: a stage that steps aside is not run
    curves: tuple[TimeCurve, ...] = ()  # one for each shape of call that was measured
    # Whether the setting is a target, and what it means for each call that was seen: a compiled
    # graph reads a length from there (`Budget.carried`), and never the target itself.
    aims: bool = False
    settled: Mapping[CallKey, Budget] = MappingProxyType({})

    @property
    def is_compiled(self) -> bool:
        """Whether `adaptok.compile` compiled it: times of the other form do not hold."""
        return bool(getattr(self, "compiled_regions", ()))

    def take_budget(self, budget: Budget, uncond: Budget | None) -> None:
        """Run with a budget from now on.

        Args:
            budget: of all samples, or of the conditional ones.
            uncond: of the unconditional ones; None means the same as the others.

        Raises:
            BudgetError: this module does not know which samples are unconditional.
        """
        if uncond is not None:
            raise BudgetError(
                f"{type(self).__name__} does not know which samples are unconditional: give "
                "uncond_drop= to its forward_with_cfg"
            )
        self.budget_setting = budget
        self.settle_again()

    def take_curve(self, curve: TimeCurve) -> None:
        """Remember how long calls of one shape take, instead of what was known of them before."""
        others = (known for known in self.curves if not known.shape.fits(curve.shape))
        self.curves = (*others, curve)
        self.settle_again()

    def settle_budget(self, budget: Budget, batch: int, num_cells: int, like: Tensor) -> Budget:
        """Return the budget of one call: a target in milliseconds becomes a share of the cells.

        Args:
            budget: any budget.
            batch: samples of the call.
            num_cells: grid cells of a sample (`n`).
            like: a tensor of the dtype and on the device that the model computes in.

        Returns:
            The largest exact budget that ran in that time; other budgets as they are.

        Raises:
            BudgetError: no such call was measured, or the fewest cells took longer.
        """
        if budget.target_ms is None:
            return budget
        key = (batch, num_cells, like.dtype, str(like.device))
        compiling = torch.compiler.is_compiling()
        if compiling and self.aims and key in self.settled:
            return self.settled[key]
        shape = CallShape.of(batch, num_cells, like.dtype, like.device, self.is_compiled)
        chosen = meet_target(budget.target_ms, self.curves, shape)
        if not compiling and self.aims and key not in self.settled:
            self.settled = {**self.settled, key: chosen.carried(num_cells, like.device)}
        return chosen

    def settle_again(self) -> None:
        """Work out what the setting means for the calls that were seen before."""
        target_ms = self.budget_setting.target_ms
        self.aims = target_ms is not None
        if target_ms is None:
            return
        known: dict[CallKey, Budget] = {}
        for key in self.settled:
            batch, n, dtype, device = key
            shape = CallShape.of(batch, n, dtype, torch.device(device), self.is_compiled)
            try:
                chosen = meet_target(target_ms, self.curves, shape)
            except BudgetError:  # said where it is used
                continue
            known[key] = chosen.carried(n, device)
        self.settled = known


@dataclass(frozen=True, slots=True)
class Settings:
    """How a part runs, to be restored.

    Args:
        part: the part.
        budget: of all samples, or of the conditional ones.
        uncond: of the unconditional ones.
        aside: whether it is not run.
    """

    part: Budgeted
    budget: Budget
    uncond: Budget | None
    aside: bool

    @classmethod
    def of(cls, part: Budgeted) -> "Settings":
        """Read how a part runs now."""
        return cls(part, part.budget_setting, part.uncond_setting, part.aside)

    def restore(self) -> None:
        """Let the part run so again."""
        self.part.take_budget(self.budget, self.uncond)
        self.part.aside = self.aside


def meet_target(target_ms: float, curves: Sequence[TimeCurve], shape: CallShape) -> Budget:
    """Return the largest budget whose measured time is at most a target.

    Args:
        target_ms: milliseconds of a call.
        curves: what was measured.
        shape: of the call.

    Returns:
        A share of the cells.

    Raises:
        BudgetError: no such call was measured, or the fewest cells took longer.

    Example:
        >>> from adaptok.time_curves import CurvePoint
        >>> shape = CallShape(8, 100, "float32", "cpu", 2)
        >>> curve = TimeCurve(shape, (CurvePoint(0.1, 20.0), CurvePoint(1.0, 80.0)))
        >>> meet_target(40.0, [curve], shape).describe()
        'keep=0.4'
    """
    curve = next((known for known in curves if known.shape.fits(shape)), None)
    if curve is None:
        raise BudgetError(
            f"target_ms={target_ms:g} came, and no time was measured for {shape.describe()} (but "
            f"for {list_shapes(curves)}): call adaptok.plan(model, inputs, "
            f"target_ms={target_ms:g}) with such inputs first"
        )
    keep = curve.find_keep(target_ms)
    if keep is None:
        raise BudgetError(describe_miss(target_ms, curve))
    return Budget(keep=keep)


def list_shapes(curves: Sequence[TimeCurve]) -> str:
    """Say in words which calls were measured."""
    return "; ".join(curve.shape.describe() for curve in curves) or "nothing"


def describe_miss(target_ms: float, curve: TimeCurve) -> str:
    """Say that a target is out of reach, and what is not."""
    point = curve.points[0]
    return (
        f"target_ms={target_ms:g} is out of reach here: the fastest measured is "
        f"{show_ms(point.ms)}, at keep={point.keep:.3g} ({curve.shape.describe()}); give a longer "
        "time, fewer samples or a smaller model"
    )


def check_aim(parts: Sequence[Budgeted], target_ms: float) -> None:
    """Raise a `BudgetError` if no call of a model can meet a target as far as is known."""
    for part in parts:
        if not part.curves:
            raise BudgetError(
                f"target_ms={target_ms:g} needs times, and none were measured on this model: call "
                f"adaptok.plan(model, inputs, target_ms={target_ms:g}) first"
            )
        fastest = min(part.curves, key=lambda curve: curve.fastest_ms)
        if fastest.find_keep(target_ms) is None:
            raise BudgetError(describe_miss(target_ms, fastest))


def merge_budget(
    setting: Budget,
    *,
    keep: Amount | None = None,
    tokens: Amount | None = None,
    drop: Amount | None = None,
) -> Budget:
    """Return the budget of one call: what the call says, else what was set before."""
    called = Budget(keep=keep, tokens=tokens, drop=drop)
    return setting if called.is_natural else called


def set_budget(
    model: nn.Module,
    *,
    keep: Amount | None = None,
    tokens: Amount | None = None,
    drop: Amount | None = None,
    uncond_drop: Amount | None = None,
    target_ms: float | None = None,
) -> None:
    """Set how many cells an adaptive model keeps from now on; nothing given: natural.

    Stages that take a budget and had stepped aside (`Plan.apply`) take part again.

    Args:
        model: a model with adaptive parts.
        keep: fraction of the cells, one number or one per sample.
        tokens: exact count, one number or one per sample.
        drop: tail-drop fraction, one number or one per sample.
        uncond_drop: tail-drop fraction of the unconditional samples of a guided model; the
            others get `drop`, or drop nothing.
        target_ms: milliseconds of a call; each call keeps as many cells as ran in that time when
            `adaptok.plan` measured calls of its shape.

    Raises:
        BudgetError: the model has no adaptive part, the budget is not valid, or a time came and
            nothing was measured or is that fast.

    Example:
        >>> import adaptok
        >>> config = adaptok.DCDiTConfig(hidden_size=64, depth=1, num_heads=2, latent_size=8)
        >>> model = adaptok.DCDiT(config)
        >>> set_budget(model, keep=0.5)
        >>> model.budget_setting.describe()
        'keep=0.5'
    """
    chosen = Budget(keep=keep, tokens=tokens, drop=drop, target_ms=target_ms)
    uncond = None if uncond_drop is None else Budget(drop=uncond_drop)
    if uncond is not None and not chosen.is_natural and chosen.drop is None:
        raise BudgetError(
            f"uncond_drop goes with drop=, and {chosen.describe()} came: give drop=, or no budget "
            "for the conditional samples"
        )
    parts = find_budgeted(model)
    if target_ms is not None:
        check_aim(parts, target_ms)
    before = [Settings.of(part) for part in parts]
    try:
        for part in parts:
            part.take_budget(chosen, uncond)
            part.aside = False
    except BudgetError:
        for settings in before:
            settings.restore()
        raise


@contextmanager
def budget(
    model: nn.Module,
    *,
    keep: Amount | None = None,
    tokens: Amount | None = None,
    drop: Amount | None = None,
    uncond_drop: Amount | None = None,
    target_ms: float | None = None,
) -> Iterator[nn.Module]:
    """Set a budget for the calls inside a `with` block, and restore the old one after it.

    Args:
        model: a model with adaptive parts.
        keep: fraction of the cells, one number or one per sample.
        tokens: exact count, one number or one per sample.
        drop: tail-drop fraction, one number or one per sample.
        uncond_drop: tail-drop fraction of the unconditional samples of a guided model.
        target_ms: milliseconds of a call, as `adaptok.plan` measured it.

    Yields:
        The model.

    Raises:
        BudgetError: as for `set_budget`.

    Example:
        >>> import adaptok
        >>> config = adaptok.DCDiTConfig(hidden_size=64, depth=1, num_heads=2, latent_size=8)
        >>> model = adaptok.DCDiT(config)
        >>> with budget(model, drop=0.3):
        ...     model.budget_setting.describe()
        'drop=0.3'
    """
    parts = find_budgeted(model)
    before = [Settings.of(part) for part in parts]
    set_budget(
        model, keep=keep, tokens=tokens, drop=drop, uncond_drop=uncond_drop, target_ms=target_ms
    )
    try:
        yield model
    finally:
        for settings in before:
            settings.restore()


def find_budgeted(model: nn.Module) -> list[Budgeted]:
    """Return the parts of a model that take a budget, or raise if it has none."""
    parts = [module for module in model.modules() if isinstance(module, Budgeted)]
    if not parts:
        raise BudgetError(
            f"{type(model).__name__} has no adaptive part that takes a budget: "
            "wrap it, or use a model such as adaptok.DCDiT"
        )
    return parts


def pair_budgets(cond: Budget, uncond: Budget, half: int) -> Budget:
    """Join the budgets of the conditional and the unconditional half of a batch.

    Args:
        cond: budget of the first half.
        uncond: budget of the second half.
        half: samples of a half.

    Returns:
        One budget, with one value per sample where the halves differ.

    Raises:
        BudgetError: one half has an exact count and the other a natural one, the exact counts
            are of different kinds, or one half has a target in milliseconds.

    Example:
        >>> pair_budgets(Budget(drop=0.0), Budget(drop=0.9), 2).describe()
        'drop=[0.0, 0.0, 0.9, 0.9]'
    """
    if cond.target_ms is not None or uncond.target_ms is not None:
        if cond.target_ms != uncond.target_ms:
            raise BudgetError(describe_halves(cond, uncond))
        return cond  # the time of both halves together
    pairs = {
        "keep": (cond.keep, uncond.keep),
        "tokens": (cond.tokens, uncond.tokens),
        "drop": (cond.drop, uncond.drop),
    }
    if cond.is_natural != uncond.is_natural:  # a natural half drops nothing
        first, second = pairs["drop"]
        pairs["drop"] = (0.0 if first is None else first, 0.0 if second is None else second)
    joined: dict[str, Amount] = {}
    for name, (first, second) in pairs.items():
        if first is None and second is None:
            continue
        if joined or first is None or second is None:
            raise BudgetError(describe_halves(cond, uncond))
        joined[name] = join_amounts(first, second, half)
    return Budget(keep=joined.get("keep"), tokens=joined.get("tokens"), drop=joined.get("drop"))


def describe_halves(cond: Budget, uncond: Budget) -> str:
    """Say that the halves of a batch have budgets that cannot be joined."""
    return (
        f"the conditional half has {cond.describe()} and the unconditional half "
        f"{uncond.describe()}: give both halves the same kind of budget"
    )


def join_amounts(first: Amount, second: Amount, half: int) -> Amount:
    """Return one amount for two halves; numbers stay numbers, so that they count exactly."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        devices = [side.device for side in (first, second) if isinstance(side, Tensor)]
        return torch.cat([spread_amount(side, half, devices[0]) for side in (first, second)])
    sides = [listed(side) for side in (first, second)]
    if sides[0] == sides[1] and len(sides[0]) == 1:
        return sides[0][0]
    for side in sides:
        if len(side) not in (1, half):
            raise BudgetError(
                f"one value per sample means {half} values for a half, got {len(side)}: give one "
                "number or one per sample"
            )
    return [value for side in sides for value in (side if len(side) == half else side * half)]
