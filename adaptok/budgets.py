"""Budgets: how many cells a sample may keep, and which ones that are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from adaptok.errors import BudgetError
from adaptok.routing import Routing


@runtime_checkable
class NumberArray(Protocol):
    """Numbers of another library, one per sample, such as an array of NumPy."""

    def tolist(self) -> Any:  # noqa: ANN401
        """Return the numbers."""


Amount = float | Sequence[float] | Tensor | NumberArray
AMOUNTS = ("keep", "tokens", "drop")


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """How many cells a sample keeps: a fraction, a count, a tail drop, or what time allows.

    At most one of the four is given; with none of them the router's own threshold decides
    (the natural budget). Each of the first three is one number, or one per sample.

    Args:
        keep: fraction of the cells to keep, in (0, 1]; the count is
            `max(1, floor(keep * n + 0.5))`, exactly.
        tokens: number of cells to keep, at least 1, exactly.
        drop: fraction of the naturally kept cells to drop, in [0, 1): of a sample's `k` kept
            cells, the `floor(drop * k)` with the lowest keep probability go.
        target_ms: milliseconds of a call, above 0; the model keeps as many cells as it ran in that
            time when `adaptok.plan` measured it.
        places: a tensor whose *length* is the exact number of cells to keep, on any device; a
            compiled graph then sees a length that may change, and not a number that it is made
            for (`Budget.carried`).

    Raises:
        BudgetError: two of them came, or a value is out of range or not finite.

    Example:
        >>> Budget(keep=0.25).count(10)
        3
        >>> Budget(keep=1.5)
        Traceback (most recent call last):
            ...
        adaptok.errors.BudgetError: keep is a fraction in (0, 1], got 1.5
    """

    keep: Amount | None = None
    tokens: Amount | None = None
    drop: Amount | None = None
    target_ms: float | None = None
    places: Shaped[Tensor, " m"] | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) > 1:
            raise BudgetError(f"{' and '.join(given)} exclude each other: give one of them")
        for name in given:
            value: Any = getattr(self, name)
            if not isinstance(value, float | Tensor | Sequence) and getattr(value, "ndim", False):
                object.__setattr__(self, name, torch.as_tensor(value))  # an array of NumPy
            if name in AMOUNTS:
                check_amount(name, getattr(self, name))
        if self.target_ms is not None:
            check_target(self.target_ms)

    def carried(self, num_cells: int, device: torch.device | str = "cpu") -> "Budget":
        """Return the same exact budget for a grid, its count carried by a tensor's length.

        Args:
            num_cells: number of cells of a sample (`n`).
            device: where the tensor lies.

        Returns:
            The budget.

        Raises:
            BudgetError: there is no one exact count.
        """
        return Budget(places=torch.zeros(self.count(num_cells), dtype=torch.bool, device=device))

    def spread(self, b: int, num_cells: int, device: torch.device) -> "Budget":
        """Return the same budget as a tensor of one value per sample.

        A compiled graph then serves all values of it; exact budgets become counts here, in the
        double precision that a number has.

        Args:
            b: number of samples.
            num_cells: number of cells of a sample (`n`).
            device: where the tensor shall lie.

        Returns:
            The budget.

        Raises:
            BudgetError: there are not as many values as samples, or more tokens than cells.
        """
        if self.is_exact:
            natural = torch.zeros(b, dtype=torch.long, device=device)
            return Budget().hold("tokens", count_kept(self, natural, num_cells))
        if self.drop is not None:
            return Budget().hold("drop", spread_amount(self.drop, b, device).contiguous())
        return self

    def hold(self, name: str, values: Tensor) -> "Budget":
        """Take in values that were checked before: reading them would wait for the device."""
        object.__setattr__(self, name, values)
        return self

    def choose(self, samples: Int[Tensor, " b"]) -> "Budget":
        """Return the budget of some samples of the batch that this one is for.

        Args:
            samples: which samples, `(b)`.

        Returns:
            The budget; one that is the same for all samples stays as it is.
        """
        for name in AMOUNTS:
            amount = getattr(self, name)
            if isinstance(amount, Tensor) and amount.numel() > 1:
                return Budget().hold(name, amount.index_select(0, samples.to(amount.device)))
            if isinstance(amount, Sequence) and len(amount) > 1:
                chosen = [amount[sample] for sample in samples.tolist()]
                keep, tokens, drop = (chosen if name == kind else None for kind in AMOUNTS)
                return Budget(keep, tokens, drop)
        return self

    @property
    def is_natural(self) -> bool:
        """Whether the router's own threshold decides."""
        amounts = all(getattr(self, name) is None for name in AMOUNTS)
        return amounts and self.target_ms is None and self.places is None

    @property
    def is_exact(self) -> bool:
        """Whether the number of kept cells is known before the router has run."""
        return self.places is not None or self.keep is not None or self.tokens is not None

    @property
    def is_uniform(self) -> bool:
        """Whether every sample keeps the same exact count, known before the router has run."""
        if self.places is not None:
            return True
        amount = self.keep if self.keep is not None else self.tokens
        return isinstance(amount, int | float)

    def count(self, num_cells: int) -> int:
        """Return the one number of cells that every sample keeps.

        Args:
            num_cells: number of cells of a sample (`n`).

        Returns:
            The exact count.

        Raises:
            BudgetError: the budget has no exact count, or not the same one for all samples.
        """
        if self.places is not None:
            return self.places.shape[0]
        if not self.is_exact:
            raise BudgetError(
                f"an exact count needs keep= or tokens=, got {self.describe()}: with a natural "
                "budget or drop= the count depends on the image, with target_ms= on the model"
            )
        amount = self.keep if self.keep is not None else self.tokens
        values = {float(value) for value in listed(amount)}
        if len(values) != 1:
            raise BudgetError(
                f"every sample needs the same count here, got {self.describe()}: give one number"
            )
        if isinstance(amount, Tensor):
            natural = torch.zeros(1, dtype=torch.long)
            first = self.first_values()
            exact = Budget(keep=first.get("keep"), tokens=first.get("tokens"))
            return int(count_kept(exact, natural, num_cells))
        value = values.pop()
        if self.keep is not None:
            return max(1, math.floor(value * num_cells + 0.5))
        check_room(value, num_cells)
        return int(value)

    def first_values(self) -> dict[str, Tensor]:
        """Return the first value of each tensor of the budget, on the host."""
        amounts = {name: getattr(self, name) for name in AMOUNTS}
        return {
            name: amount.detach().flatten()[:1].cpu()
            for name, amount in amounts.items()
            if isinstance(amount, Tensor)
        }

    def describe(self) -> str:
        """Say in words what the budget is."""
        if self.places is not None:
            return f"tokens={self.places.shape[0]}"
        if self.target_ms is not None:
            return f"target_ms={self.target_ms:g}"
        for name in AMOUNTS:
            amount = getattr(self, name)
            if amount is not None:
                values = [round(float(value), 4) for value in listed(amount)]
                return f"{name}={values[0] if len(values) == 1 else values}"
        return "the natural budget"


def check_amount(name: str, amount: Amount) -> None:
    """Raise a `BudgetError` unless each value of an amount is in the range of its kind."""
    if isinstance(amount, Tensor):
        if amount.ndim > 1:
            raise BudgetError(f"{name} is one number or one per sample, got {tuple(amount.shape)}")
        if amount.numel() == 0:
            raise BudgetError(f"{name} needs at least one number, got none")
        if torch.compiler.is_compiling():
            return  # reading values would cut the graph; the range was the caller's to check
    for value in listed(amount):
        try:
            number = float("no number" if isinstance(value, bool) else value + 0)  # nor is text
        except (TypeError, ValueError):
            raise BudgetError(f"{name} is a number or one per sample, got {amount!r}") from None
        if name == "keep" and not 0.0 < number <= 1.0:
            raise BudgetError(f"keep is a fraction in (0, 1], got {number:g}")
        if name == "drop" and not 0.0 <= number < 1.0:
            raise BudgetError(f"drop is a fraction in [0, 1), got {number:g}")
        if name == "tokens" and (not math.isfinite(number) or number < 1 or number != int(number)):
            raise BudgetError(f"tokens is a whole number of at least 1, got {number:g}")


def check_target(target_ms: object) -> None:
    """Raise a `BudgetError` unless a target is one number of milliseconds above 0."""
    if isinstance(target_ms, bool) or not isinstance(target_ms, int | float):
        raise BudgetError(f"target_ms is one number of milliseconds, got {target_ms!r:.80}")
    if not 0.0 < target_ms < math.inf:
        raise BudgetError(f"target_ms is a finite number above 0, got {target_ms:g}")


def check_room(tokens: float, num_cells: int) -> None:
    """Raise a `BudgetError` if more tokens are asked for than there are cells."""
    if tokens > num_cells:
        raise BudgetError(
            f"tokens={int(tokens)} is more than the {num_cells} cells of the grid: "
            f"give at most {num_cells}"
        )


def listed(amount: Amount | None) -> list[float]:
    """Return the values of an amount as a list of one or more."""
    if amount is None:
        return []
    if isinstance(amount, Tensor):
        values: list[float] = amount.detach().flatten().tolist()
        return values
    if isinstance(amount, Sequence):
        if not amount:
            raise BudgetError("a budget per sample needs at least one number, got none")
        return list(amount)
    return [amount]  # type: ignore[list-item]  # arrays have become tensors


def spread_amount(amount: Amount, b: int, device: torch.device) -> Float[Tensor, " b"]:
    """Return an amount as one float32 value per sample, on a device."""
    if isinstance(amount, int | float):  # filled on the device, so that the host does not wait
        return torch.full((b,), amount, dtype=torch.float32, device=device)
    values = torch.as_tensor(amount, dtype=torch.float32, device=device)
    if values.ndim == 1 and values.shape[0] not in (1, b):
        raise BudgetError(
            f"one value per sample means {b} values here, got {values.shape[0]}: "
            "give one number or one per sample"
        )
    return values.expand(b)


def count_kept(budget: Budget, natural: Int[Tensor, " b"], num_cells: int) -> Int[Tensor, " b"]:
    """Return how many cells each sample keeps under a budget.

    Args:
        budget: the budget.
        natural: number of cells that the router keeps of itself, `(b)`.
        num_cells: number of cells of a sample (`n`).

    Returns:
        Counts of at least 1, `(b)`.

    Raises:
        BudgetError: there are not as many values as samples, more tokens than cells, or a time
            that no model has turned into a count.

    Example:
        >>> count_kept(Budget(drop=0.3), torch.tensor([10, 7, 0]), 16)
        tensor([7, 5, 1])
    """
    b, device = natural.shape[0], natural.device
    if budget.places is not None:
        return torch.full((b,), budget.places.shape[0], device=device).clamp(max=num_cells)
    if budget.keep is not None:
        if isinstance(budget.keep, Tensor):
            wanted = spread_amount(budget.keep, b, device) * num_cells + 0.5
            return wanted.floor().long().clamp(1, num_cells)
        # Python's own double precision, so that a number and Budget.count agree
        exact = [max(1, math.floor(v * num_cells + 0.5)) for v in listed(budget.keep)]
        return spread_amount(exact[0] if len(exact) == 1 else exact, b, device).long()
    if budget.tokens is not None:
        if not torch.compiler.is_compiling():
            check_room(max(listed(budget.tokens)), num_cells)
        return spread_amount(budget.tokens, b, device).long().clamp(1, num_cells)
    if budget.drop is not None:
        dropped = (spread_amount(budget.drop, b, device) * natural.float()).floor().long()
        return (natural - dropped).clamp(min=1)
    if budget.target_ms is not None:
        raise BudgetError(
            f"{budget.describe()} says nothing about cells yet: a model settles it for each call, "
            "by what adaptok.plan measured (Budgeted.settle_budget); give keep=, tokens= or drop="
        )
    return natural.clamp(min=1)


def apply_budget(routing: Routing, budget: Budget) -> Routing:
    """Decide which cells are kept.

    Cells are ranked by keep probability; among equal ones the lower index comes first. A
    sample always keeps at least one cell: its most probable one if nothing is above the
    threshold.

    Args:
        routing: what the router said.
        budget: how many cells to keep.

    Returns:
        The routing with its `keep_mask`.

    Raises:
        BudgetError: the router only ranks, and the budget needs a natural count; or the
            budget does not fit the batch.

    Example:
        >>> routing = Routing(torch.tensor([[0.9, 0.6, 0.7, 0.1]]))
        >>> apply_budget(routing, Budget(tokens=2)).keep_mask
        tensor([[ True, False,  True, False]])
    """
    prob = routing.keep_prob.detach()
    b, n = prob.shape
    natural_mask = routing.natural_mask
    if natural_mask is None:
        if not budget.is_exact:
            raise BudgetError(
                "this router only ranks cells, it has no threshold: give keep= or tokens=, "
                f"got {budget.describe()}"
            )
        return routing.with_keep_mask(
            rank_cells(prob)
            < count_kept(budget, torch.zeros(b, dtype=torch.long, device=prob.device), n)[:, None]
        )
    natural = natural_mask.sum(1)
    counts = count_kept(budget, natural, n)
    if budget.is_exact:
        return routing.with_keep_mask(rank_cells(prob) < counts[:, None])
    if budget.is_natural:
        best = torch.arange(n, device=prob.device) == prob.argmax(1, keepdim=True)
        return routing.with_keep_mask(natural_mask | (best & (natural == 0)[:, None]))
    return routing.with_keep_mask(rank_cells(prob, first=natural_mask) < counts[:, None])


def rank_cells(
    prob: Float[Tensor, "b n"], first: Bool[Tensor, "b n"] | None = None
) -> Int[Tensor, "b n"]:
    """Return each cell's place in its sample, the most probable one first, ties by index.

    Args:
        prob: keep probability, `(b n)`.
        first: cells that come before all others, whatever their probability, `(b n)`.

    Returns:
        Places from 0 to n - 1, `(b n)`.
    """
    order = prob.argsort(dim=1, descending=True, stable=True)
    if first is not None:
        later = (~first).gather(1, order).to(torch.uint8)
        order = order.gather(1, later.argsort(dim=1, stable=True))
    places = torch.arange(prob.shape[1], device=prob.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def select_cells(prob: Float[Tensor, "b n"], count: int) -> Int[Tensor, "b m"]:
    """Return the flat indices of the `count` most probable cells, in ascending order."""
    order = prob.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values
