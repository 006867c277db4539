"""A stage that takes a budget, and finds the one that each call runs with."""

import torch

from adaptok.budgeted import Budgeted, pair_budgets
from adaptok.budgets import Budget
from adaptok.calls import BlockCall
from adaptok.errors import BudgetError
from adaptok.stages import Stage


class BudgetedStage(Budgeted, Stage):
    """A stage whose number of tokens `adaptok.set_budget` changes.

    A subclass says in `must_cut` whether one graph can hold it under its budget.

    Args:
        name: what the stage is called in traces and errors.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        # Exact budgets by number of cells, for compiled graphs: see `Budget.carried`.
        self.carried: dict[tuple[int, str], Budget] = {}
        self.cuts = True  # a plain flag, so that a graph does not look at the budget itself

    def take_budget(self, budget: Budget, uncond: Budget | None) -> None:
        """Run with a budget from now on (see `Budgeted.take_budget`)."""
        self.budget_setting = budget
        self.uncond_setting = uncond
        self.carried = {key: carry_budget(budget, *key) for key in self.carried}
        self.settle_again()
        self.cuts = self.must_cut()

    def describe_budget(self) -> str:
        """Return the budget in words."""
        uncond = self.uncond_setting
        shown = self.budget_setting.describe()
        return shown if uncond is None else f"{shown}, unconditional {uncond.describe()}"

    def choose_budget(self, call: BlockCall) -> Budget:
        """Return the budget of one call, or of the part of a batch that it is."""
        budget = self.find_budget(call)
        return budget if call.part is None else budget.choose(call.part.samples)

    def find_budget(self, call: BlockCall) -> Budget:
        """Return the budget of the batch."""
        if self.uncond_setting is not None:
            return self.split_budget(call, self.uncond_setting)
        if self.aims:
            b, n = call.x.shape[0], call.num_cells
            settled = self.settle_budget(self.budget_setting, b, n, call.x)
            if not torch.compiler.is_compiling():
                self.cuts = self.must_cut()
            return settled
        key = (call.num_cells, str(call.x.device))
        if torch.compiler.is_compiling():
            return self.carried.get(key, self.budget_setting)
        if key not in self.carried:
            self.carried[key] = carry_budget(self.budget_setting, *key)
            self.cuts = self.must_cut()
        return self.budget_setting

    def split_budget(self, call: BlockCall, uncond: Budget) -> Budget:
        """Return the budget of a guided call: unconditional samples have their own."""
        cond = self.budget_setting
        if cond.is_natural:
            cond = Budget(drop=0.0)
        branches = call.numbers.branches if call.numbers else ()
        if branches in (("cond",), ("uncond",)):
            return cond if branches == ("cond",) else uncond
        b = call.part.batch if call.part else call.x.shape[0]
        if set(branches) == {"cond", "uncond"} and len(branches) == 2 and b % 2 == 0:
            first, second = (cond if name == "cond" else uncond for name in branches)
            return pair_budgets(first, second, b // 2)
        known = " and ".join(branches) or "nothing"
        raise BudgetError(
            f"uncond_drop needs to know which of the {b} samples are unconditional, and the host "
            f"told {known}: put `with adaptok.request(model, 'id', branch='uncond'):` around the "
            "calls of that branch, or give both halves in one call"
        )

    def must_cut(self) -> bool:
        """Say whether one graph cannot hold this stage under its budget."""
        # the first call, which is not in a graph, makes what a graph reads instead of the budget
        known = self.settled if self.aims else self.carried
        if not known or self.uncond_setting is not None:
            return True
        exact = Budget(tokens=1)  # what a target becomes
        return self.waits_for_device(exact if self.aims else self.budget_setting)

    def waits_for_device(self, budget: Budget) -> bool:
        """Say whether the counts that a budget asks for depend on the image."""
        return not budget.is_uniform


def carry_budget(budget: Budget, n: int, device: str) -> Budget:
    """Return a budget whose count a compiled graph sees as a length, where it has one count."""
    try:
        return budget.carried(n, device) if budget.is_uniform else budget
    except BudgetError:  # more tokens than this grid has cells: said where it is used
        return budget
