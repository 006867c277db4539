"""H-Net's chunker: boundary cells become tokens, each stands for the cells that follow it."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptok import Budget, Chunker, ChunkPlan, Provenance, Routing, Tokens
from adaptok.budgets import apply_budget, rank_cells, select_cells
from adaptok.chunking import LAYOUTS, Layout, gather_cells, gather_kept
from adaptok.errors import BudgetError, ConfigError, ShapeError
from adaptok.losses import ratio_loss
from adaptok_hnet.router import ScanRouting
from adaptok_hnet.scan import Scan, check_scan, invert_order, order_on, read_grid

BUCKETS = 16
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class ScanPlan(ChunkPlan):
    """A plan whose tokens follow each other along a scan; the dechunker smooths along it.

    Args:
        grid: see `adaptok.ChunkPlan`, as for all but the last one.
        layout: how the kept tokens are run.
        routing: the router's answer with the mask of the budget.
        keep_mask: the cells that are computed.
        cells: flat grid cell of each kept token.
        provenance: which token stands for each cell.
        batch: sample of each packed token.
        ptr: where each sample starts.
        lengths: the tokens of each sample.
        scan: the order of the cells.
    """

    scan: Scan = "raster"


class HNetChunker(Chunker):
    """Keeps the cells that routing and budget choose; each stands for a run of a scan.

    A cell belongs to the last kept cell at or before it in the scan (cells in front of the first
    kept one, which H-Net's router never leaves, belong to that one). Along `"snake"` and
    `"hilbert"` a run is a connected patch of the grid.

    Args:
        scan: order of the cells, for the router too: `"raster"`, `"snake"` or `"hilbert"`.
        layout: `"bucketed"` rounds counts that depend on the image up to a bucket, fills it with
            the sample's own next most probable cells, and runs equal counts together; exact
            budgets stay exact. `"fixed"` takes only budgets of one exact count for all samples.
            `"packed"` runs exact counts in one run of tokens, where the host's blocks have a
            packed form.
        buckets: number of counts that the bucketed layout allows.
        target: compression N that the ratio loss aims at.

    Raises:
        ConfigError: scan or layout is unknown, there are no buckets, or the target is not above 1;
            (when called) the router scans another way.
        BudgetError: (when called) the fixed layout got a budget without one exact count.

    Example:
        >>> tokens = Tokens(torch.randn(1, 6, 8), grid=(2, 3))
        >>> routing = Routing(torch.tensor([[1.0, 0.1, 0.9, 0.1, 0.8, 0.2]]))
        >>> kept, plan = HNetChunker(scan="snake")(tokens, routing, Budget(tokens=3))
        >>> plan.cells, plan.provenance.token.view(2, 3)
        (tensor([[0, 2, 4]]), tensor([[0, 0, 1],
                                      [2, 2, 1]]))

    Paper: Hwang et al., Dynamic Chunking for End-to-End Hierarchical Sequence Modeling, 2025.
    """

    compilable = True
    dechunker = "hnet"  # what stands beside it unless told otherwise

    def __init__(
        self,
        scan: Scan = "raster",
        layout: Layout = "bucketed",
        buckets: int = BUCKETS,
        target: float = 4.0,
    ) -> None:
        super().__init__()
        check_scan(scan)
        if layout not in LAYOUTS:
            raise ConfigError(f"layout is one of {', '.join(LAYOUTS)}, got {layout!r}")
        if buckets < 1:
            raise ConfigError(f"buckets is at least 1, got {buckets}")
        if layout != "bucketed" and buckets != BUCKETS:
            raise ConfigError(
                f'buckets={buckets} is for layout "bucketed", and {layout!r} has none'
            )
        if not target > 1.0:
            raise ConfigError(f"target is a compression above 1, got {target:g}")
        self.scan: Scan = scan
        self.layout: Layout = layout
        self.buckets = buckets
        self.target = target

    @property
    def router(self) -> dict[str, str]:
        """The router that stands beside it unless told otherwise; it scans the same way."""
        return {"name": "hnet", "scan": self.scan}

    def extra_repr(self) -> str:
        """Show scan, layout and target."""
        buckets = f", buckets={self.buckets}" if self.layout == "bucketed" else ""
        return f"scan={self.scan!r}, layout={self.layout!r}{buckets}, target={self.target:g}"

    def forward(self, tokens: Tokens, routing: Routing, budget: Budget) -> tuple[Tokens, ScanPlan]:
        """Keep the chosen cells (see `Chunker.forward`)."""
        self.check(tokens, routing)
        if self.layout == "fixed" or (self.layout == "bucketed" and budget.is_uniform):
            kept, plan = self.chunk_fixed(tokens, routing, budget)
        else:
            kept, plan = self.chunk_ragged(tokens, routing, budget)
        if routing.keep_prob.requires_grad:
            # A class token sees the kept cells only here: without it, no gradient would reach the
            # router of a host that reads nothing else. Values stay what they are.
            prob = routing.keep_prob.flatten().index_select(0, plan.rows)
            scale = (prob - prob.detach()).view(*kept.x.shape[:-1], 1).to(kept.x.dtype)
            kept = kept.with_x(kept.x + kept.x.detach() * scale)
        return kept, plan

    def check(self, tokens: Tokens, routing: Routing) -> None:
        """Raise unless there is one token and one probability per cell, along the same scan."""
        read_grid(tokens, "HNetChunker")
        if tuple(routing.keep_prob.shape) != tuple(tokens.x.shape[:2]):
            raise ShapeError(
                f"the routing has the shape {tuple(routing.keep_prob.shape)} and the tokens "
                f"{tuple(tokens.x.shape[:2])}: one probability per cell is needed"
            )
        if isinstance(routing, ScanRouting) and routing.scan != self.scan:
            raise ConfigError(
                f'the router scans along "{routing.scan}" and the chunker along "{self.scan}": '
                "give scan= to the chunker only, its router follows"
            )

    def chunk_fixed(
        self, tokens: Tokens, routing: Routing, budget: Budget
    ) -> tuple[Tokens, ScanPlan]:
        """Keep the same exact count of every sample; nothing waits for the device."""
        b, n = routing.keep_prob.shape
        try:
            count = budget.count(n)
        except BudgetError as error:
            raise BudgetError(
                f'layout "fixed" runs the same count for every sample: {error}, or choose layout '
                '"bucketed"'
            ) from None
        cells = select_cells(routing.keep_prob.detach(), count)
        keep_mask = torch.zeros(b, n, dtype=torch.bool, device=cells.device).scatter(1, cells, True)
        plan = ScanPlan(
            grid=required(tokens.grid),
            layout="fixed",
            routing=routing.with_keep_mask(keep_mask),
            keep_mask=keep_mask,
            cells=cells,
            provenance=self.trace(keep_mask, tokens),
            scan=self.scan,
        )
        return gather_cells(tokens, cells), plan

    def chunk_ragged(
        self, tokens: Tokens, routing: Routing, budget: Budget
    ) -> tuple[Tokens, ScanPlan]:
        """Keep the chosen cells, packed into one run; counts that are not exact are rounded."""
        routing = apply_budget(routing, budget)
        keep_mask = required(routing.keep_mask)
        b, n = keep_mask.shape
        if self.layout == "bucketed" and not budget.is_exact:
            keep_mask = fill_buckets(routing.keep_prob.detach(), keep_mask, self.buckets)
        # where the budget says how many, nothing waits for the device
        lengths = (budget.count(n),) * b if budget.is_uniform else tuple(keep_mask.sum(1).tolist())
        kept = gather_kept(tokens, keep_mask, lengths)
        plan = ScanPlan(
            grid=required(tokens.grid),
            layout=self.layout,
            routing=routing,
            keep_mask=keep_mask,
            cells=required(kept.cells),
            provenance=self.trace(keep_mask, tokens),
            batch=kept.batch,
            ptr=kept.ptr,
            lengths=lengths,
            scan=self.scan,
        )
        return kept, plan

    def trace(self, keep_mask: Bool[Tensor, "b n"], tokens: Tokens) -> Provenance:
        """Return for each cell the token of its run."""
        order = order_on(required(tokens.grid), self.scan, keep_mask.device)
        return Provenance(trace_runs(keep_mask, order))

    def losses(self, routing: Routing) -> dict[str, Tensor]:
        """Return the ratio loss, unless the router only ranks (see `Chunker.losses`)."""
        if routing.natural_mask is None:
            return {}
        return {"ratio": ratio_loss(routing, self.target)}


def trace_runs(keep_mask: Bool[Tensor, "b n"], order: Int[Tensor, " n"]) -> Int[Tensor, "b n"]:
    """Return for each cell the token of the last kept cell at or before it in a scan.

    Args:
        keep_mask: the kept cells, at least one per sample; tokens are numbered by their cells.
        order: the cell at each place of the scan.

    Returns:
        Tokens; cells in front of the first kept one belong to that one.

    Example:
        >>> trace_runs(torch.tensor([[False, True, False, True]]), torch.tensor([0, 2, 3, 1]))
        tensor([[1, 0, 1, 1]])
    """
    places = torch.arange(keep_mask.shape[1], device=keep_mask.device)
    kept = keep_mask.index_select(1, order)
    last = torch.where(kept, places, -1).cummax(1).values
    last = torch.where(last < 0, kept.int().argmax(1, keepdim=True), last)
    token = (keep_mask.cumsum(1) - 1).gather(1, order[last])
    return token.index_select(1, invert_order(order))


def fill_buckets(
    prob: Float[Tensor, "b n"], keep_mask: Bool[Tensor, "b n"], buckets: int
) -> Bool[Tensor, "b n"]:
    """Round each sample's count up to a bucket, with its own next most probable cells."""
    n = prob.shape[1]
    step = -(-n // buckets)
    counts = ((keep_mask.sum(1) + step - 1) // step * step).clamp(max=n)
    return rank_cells(prob, first=keep_mask) < counts[:, None]


def required(value: T | None) -> T:
    """Return a value that the caller has made sure of."""
    assert value is not None
    return value
