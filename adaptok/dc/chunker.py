"""The chunker of DC-DiT: kept cells become tokens, the nearest one stands for each cell."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from adaptok.budgets import Budget, apply_budget, listed, rank_cells, select_cells
from adaptok.chunking import (
    LAYOUTS,
    Chunker,
    ChunkPlan,
    Layout,
    Provenance,
    find_rows,
    gather_cells,
)
from adaptok.dc.nearest import find_nearest, reach_of
from adaptok.errors import BudgetError, ConfigError, ShapeError
from adaptok.regions import Regional
from adaptok.routing import Routing
from adaptok.tokens import Grid, Tokens, starts_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Which cells are computed, as the device knows it before the host knows the counts.

    Args:
        grid: lengths of the grid axes.
        layout: how the kept tokens will be run.
        routing: routing with its `keep_mask`.
        keep_mask: the cells that are computed, `(b n)`.
        numbers: what the host must know: the count of each sample, `(b)`, and, where `provenance`
            is missing, the reach.
        provenance: which token stands for each cell, where it is known already.
    """

    grid: Grid
    layout: Layout
    routing: Routing
    keep_mask: Bool[Tensor, "b n"]
    numbers: Int[Tensor, " b"] | Int[Tensor, " b_plus_1"]
    provenance: Provenance | None = None


class DCChunker(Regional, Chunker):
    """Keeps the cells that routing and budget choose.

    Args:
        layout: `"packed"` runs exact counts in one run of tokens; `"bucketed"` fills each
            sample up to a bucket with its own next most probable cells; `"fixed"` keeps the
            same exact count of every sample, with static shapes.
        buckets: number of counts that the bucketed layout allows, from one bucket to all cells.

    Raises:
        ConfigError: the layout is unknown, or there are no buckets.
        BudgetError: (when called) the fixed layout got a budget without one exact count.

    Example:
        >>> tokens = Tokens(torch.randn(2, 16, 8), grid=(4, 4))
        >>> kept, plan = DCChunker("fixed")(tokens, Routing(torch.rand(2, 16)), Budget(keep=0.25))
        >>> kept.x.shape
        torch.Size([2, 4, 8])

    Paper: DC-DiT, arXiv 2603.06351.
    """

    regions = ("decide",)

    def __init__(self, layout: Layout = "packed", buckets: int = 64) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ConfigError(f"layout is one of {', '.join(LAYOUTS)}, got {layout!r}")
        if buckets < 1:
            raise ConfigError(f"buckets is at least 1, got {buckets}")
        self.layout: Layout = layout
        self.buckets = buckets

    def extra_repr(self) -> str:
        """Show the layout."""
        buckets = f", buckets={self.buckets}" if self.layout == "bucketed" else ""
        return f"layout={self.layout!r}{buckets}"

    def forward(self, tokens: Tokens, routing: Routing, budget: Budget) -> tuple[Tokens, ChunkPlan]:
        """Keep the chosen cells (see `Chunker.forward`)."""
        self.check_tokens(tokens, routing)
        if self.layout == "fixed":
            return chunk_fixed(tokens, routing, budget)
        if self.compiled_regions:
            b, n = routing.keep_prob.shape
            budget = budget.spread(b, n, routing.keep_prob.device)
        plan = settle_plan(self.region("decide")(routing, tokens.grid, budget))
        return gather_plan(tokens, plan), plan

    def decide(self, routing: Routing, grid: Grid, budget: Budget) -> Choice:
        """Decide which cells are computed, in a ragged layout; nothing waits for the device."""
        buckets = self.buckets if self.layout == "bucketed" else None
        return choose_cells(apply_budget(routing, budget), grid, buckets)

    def waits_for_device(self, budget: Budget) -> bool:
        """Say whether counts depend on the image (see `Chunker.waits_for_device`)."""
        return self.layout != "fixed"

    def check_tokens(self, tokens: Tokens, routing: Routing) -> None:
        """Raise a `ShapeError` unless there is one token and one probability per cell."""
        partial = tokens.cells is not None or tokens.valid is not None
        if tokens.grid is None or tokens.is_packed or partial:
            raise ShapeError("this chunker takes dense tokens, one per cell of a known grid")
        if tuple(routing.keep_prob.shape) != tuple(tokens.x.shape[:2]):
            raise ShapeError(
                f"the routing has the shape {tuple(routing.keep_prob.shape)} and the tokens "
                f"{tuple(tokens.x.shape[:2])}: one probability per cell is needed"
            )


def choose_cells(routing: Routing, grid: Grid, buckets: int | None = None) -> Choice:
    """Decide which cells are computed; nothing waits for the device.

    Args:
        routing: routing with its `keep_mask`.
        grid: lengths of the grid axes.
        buckets: fill each sample up to a count of so many possible ones with its own next
            most probable cells; None keeps exactly the mask.

    Returns:
        The choice.
    """
    keep_mask = required(routing.keep_mask)
    if buckets is not None:
        keep_mask = fill_buckets(routing.keep_prob.detach(), keep_mask, buckets)
    layout: Layout = "packed" if buckets is None else "bucketed"
    counts = keep_mask.sum(1)
    if torch.compiler.is_compiling():  # fused into one operation, without a bound on the distance
        provenance = trace_cells(keep_mask, grid, None)
        return Choice(grid, layout, routing, keep_mask, counts, provenance)
    numbers = torch.cat([counts, reach_of(keep_mask, grid)[None]])
    return Choice(grid, layout, routing, keep_mask, numbers)


def settle_plan(choice: Choice) -> ChunkPlan:
    """Wait for the counts, once, and lay the kept cells out in one run.

    Args:
        choice: which cells are computed.

    Returns:
        The plan.
    """
    b, n = choice.keep_mask.shape
    numbers = choice.numbers.tolist()  # the one wait for the device
    lengths, reach = tuple(numbers[:b]), numbers[-1]
    provenance = choice.provenance
    if provenance is None:
        provenance = trace_cells(choice.keep_mask, choice.grid, reach)
    rows = find_rows(choice.keep_mask, sum(lengths))
    return ChunkPlan(
        choice.grid,
        choice.layout,
        choice.routing,
        choice.keep_mask,
        rows % n,
        provenance,
        rows // n,
        starts_of(choice.numbers[:b]),
        lengths,
    )


def gather_plan(tokens: Tokens, plan: ChunkPlan) -> Tokens:
    """Gather the kept cells of a plan into one run.

    Args:
        tokens: dense tokens, one per grid cell.
        plan: where the kept cells are.

    Returns:
        Packed tokens.
    """
    x = rearrange(tokens.x, "b n d -> (b n) d").index_select(0, plan.rows)
    return Tokens(x, tokens.grid, plan.cells, batch=plan.batch, ptr=plan.ptr)


def chunk_ragged(
    tokens: Tokens, routing: Routing, buckets: int | None = None
) -> tuple[Tokens, ChunkPlan]:
    """Keep the cells of a mask, packed into one run.

    Args:
        tokens: dense tokens, one per grid cell.
        routing: routing with its `keep_mask`.
        buckets: see `choose_cells`.

    Returns:
        Packed tokens and their plan.
    """
    plan = settle_plan(choose_cells(routing, required(tokens.grid), buckets))
    return gather_plan(tokens, plan), plan


def chunk_fixed(tokens: Tokens, routing: Routing, budget: Budget) -> tuple[Tokens, ChunkPlan]:
    """Keep the same exact count of every sample; nothing waits for the device.

    Args:
        tokens: dense tokens, one per grid cell.
        routing: what the router said of them.
        budget: `keep=` or `tokens=`, one number for all samples.

    Returns:
        Dense tokens `(b m d)` and their plan.

    Raises:
        BudgetError: the budget has no one exact count, or more tokens than there are cells.
    """
    grid = required(tokens.grid)
    b, n = routing.keep_prob.shape
    try:
        count = budget.count(n)
    except BudgetError as error:
        if has_one_count(budget):  # there is one, and it does not fit the grid
            raise
        raise BudgetError(
            f'layout "fixed" runs the same count for every sample: {error}, or choose layout '
            '"packed" or "bucketed"'
        ) from None
    cells = select_cells(routing.keep_prob.detach(), count)
    keep_mask = torch.zeros(b, n, dtype=torch.bool, device=cells.device).scatter(1, cells, True)
    # on a CPU the reach is known at once; elsewhere, and in a graph, nothing may wait for it
    at_once = cells.device.type == "cpu" and not torch.compiler.is_compiling()
    reach = int(reach_of(keep_mask, grid)) if at_once else None
    plan = ChunkPlan(
        grid,
        "fixed",
        routing.with_keep_mask(keep_mask),
        keep_mask,
        cells,
        trace_cells(keep_mask, grid, reach),
    )
    return gather_cells(tokens, cells), plan


def has_one_count(budget: Budget) -> bool:
    """Say whether a budget asks for one exact count, whether or not it fits the grid."""
    amount = budget.keep if budget.keep is not None else budget.tokens
    return budget.is_uniform or len(set(listed(amount))) == 1


def fill_buckets(prob: Tensor, keep_mask: Bool[Tensor, "b n"], buckets: int) -> Bool[Tensor, "b n"]:
    """Round each sample's count up to a bucket, with its own next most probable cells."""
    n = prob.shape[1]
    step = -(-n // buckets)
    counts = ((keep_mask.sum(1) + step - 1) // step * step).clamp(max=n)
    return rank_cells(prob, first=keep_mask) < counts[:, None]


def trace_cells(keep_mask: Bool[Tensor, "b n"], grid: Grid, reach: int | None) -> Provenance:
    """Return for each cell the token of its nearest kept cell."""
    nearest = find_nearest(keep_mask, grid, reach)
    token_of_cell = keep_mask.cumsum(1) - 1
    return Provenance(token_of_cell.gather(1, nearest))


def required(value: T | None) -> T:
    """Return a value that the caller has made sure of."""
    assert value is not None
    return value
