"""Which budget a model runs with: set for good, for a block of calls, or for one call."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adaptok.budgets import Amount, Budget, listed, spread_amount
from adaptok.errors import BudgetError


class Budgeted(nn.Module):
    """A module whose number of kept cells `set_budget` can change.

    The setting is configuration like a module's train mode, not a result of a forward pass.
    """

    budget_setting: Budget = Budget()
    uncond_setting: Budget | None = None

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
) -> None:
    """Set how many cells an adaptive model keeps from now on; nothing given: natural.

    Args:
        model: a model with adaptive parts.
        keep: fraction of the cells, one number or one per sample.
        tokens: exact count, one number or one per sample.
        drop: tail-drop fraction, one number or one per sample.
        uncond_drop: tail-drop fraction of the unconditional samples of a guided model; the
            others get `drop`, or drop nothing.

    Raises:
        BudgetError: the model has no adaptive part, or the budget is not valid.

    Example:
        >>> import adaptok
        >>> config = adaptok.DCDiTConfig(hidden_size=64, depth=1, num_heads=2, latent_size=8)
        >>> model = adaptok.DCDiT(config)
        >>> set_budget(model, keep=0.5)
        >>> model.budget_setting.describe()
        'keep=0.5'
    """
    chosen = Budget(keep=keep, tokens=tokens, drop=drop)
    uncond = None if uncond_drop is None else Budget(drop=uncond_drop)
    if uncond is not None and chosen.is_exact:
        raise BudgetError(
            f"uncond_drop goes with drop=, and {chosen.describe()} came: give drop=, or no budget "
            "for the conditional samples"
        )
    parts = find_budgeted(model)
    before = [(part.budget_setting, part.uncond_setting) for part in parts]
    try:
        for part in parts:
            part.take_budget(chosen, uncond)
    except BudgetError:
        for part, settings in zip(parts, before, strict=True):
            part.take_budget(*settings)
        raise


@contextmanager
def budget(
    model: nn.Module,
    *,
    keep: Amount | None = None,
    tokens: Amount | None = None,
    drop: Amount | None = None,
    uncond_drop: Amount | None = None,
) -> Iterator[nn.Module]:
    """Set a budget for the calls inside a `with` block, and restore the old one after it.

    Args:
        model: a model with adaptive parts.
        keep: fraction of the cells, one number or one per sample.
        tokens: exact count, one number or one per sample.
        drop: tail-drop fraction, one number or one per sample.
        uncond_drop: tail-drop fraction of the unconditional samples of a guided model.

    Yields:
        The model.

    Raises:
        BudgetError: the model has no adaptive part, or the budget is not valid.

    Example:
        >>> import adaptok
        >>> config = adaptok.DCDiTConfig(hidden_size=64, depth=1, num_heads=2, latent_size=8)
        >>> model = adaptok.DCDiT(config)
        >>> with budget(model, drop=0.3):
        ...     model.budget_setting.describe()
        'drop=0.3'
    """
    parts = find_budgeted(model)
    before = [(part.budget_setting, part.uncond_setting) for part in parts]
    set_budget(model, keep=keep, tokens=tokens, drop=drop, uncond_drop=uncond_drop)
    try:
        yield model
    finally:
        for part, settings in zip(parts, before, strict=True):
            part.take_budget(*settings)


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
        BudgetError: one half has an exact count and the other a natural one, or the exact
            counts are of different kinds.

    Example:
        >>> pair_budgets(Budget(drop=0.0), Budget(drop=0.9), 2).describe()
        'drop=[0.0, 0.0, 0.9, 0.9]'
    """
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
            raise BudgetError(
                f"the conditional half has {cond.describe()} and the unconditional half "
                f"{uncond.describe()}: give both halves the same kind of budget"
            )
        joined[name] = join_amounts(first, second, half)
    return Budget(keep=joined.get("keep"), tokens=joined.get("tokens"), drop=joined.get("drop"))


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
