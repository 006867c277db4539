"""A chunker that contracts edges between similar cells: tokens are connected segments."""

from typing import ClassVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptok import Budget, Chunker, ChunkPlan, Provenance, Routing, Tokens
from adaptok.budgets import apply_budget, count_kept, rank_cells
from adaptok.chunking import LAYOUTS, Layout
from adaptok.errors import BudgetError, ConfigError, ShapeError
from adaptok.losses import ratio_loss
from adaptok.tokens import Grid, starts_of
from adaptok_graph.contraction import MergeTree, contract_edges
from adaptok_graph.geometric import import_geometric
from adaptok_graph.grids import check_neighbours
from adaptok_graph.segments import (
    Represent,
    SegmentPlan,
    choose_members,
    place_cells,
    pool_cells,
    share_cells,
)
from adaptok_graph.similarity import sketch_cells

BUCKETS = 16
LEAST_ROOM = 1e-2  # the least 1 - p: a cell resists merging at most a hundred times as much


class GraphChunker(Chunker):
    """Contracts edges between similar neighbouring cells until the budget is met.

    What is left are connected segments of the grid, exactly as many as the budget says. Two
    segments cost `(1 - similarity) / (1 - p)`, where `1 - similarity` is Ward's cost (for two
    cells half their squared distance, 1 if they have nothing in common) and `p` is the highest
    keep probability in both, `1 - p` taken relative to its mean over the sample.

    Args:
        layout: `"bucketed"`, `"fixed"` or `"packed"`, as of the chunker `"dc"`; filled up, a
            sample is cut into more segments.
        buckets: number of counts that the bucketed layout allows.
        token: `"member"`: a segment enters the blocks as the cell that is most like the mean of
            all its cells, which suits every dechunker; `"mean"`: as that mean, weighted by keep
            probability, at the place of the cell in its middle.
        threshold: with a natural budget, merge while the similarity is above this number; None
            leaves the count to the router's threshold.
        trust: exponent of `1 - p`; 0 does not ask the router.
        neighbours: 4, or 8 with the corners; in a video the frames before and after, too.
        target: compression that the ratio loss aims at.

    Raises:
        MissingPackageError: torch-geometric is not installed.
        ConfigError: an option is out of range.
        BudgetError: (when called) the fixed layout got a budget without one exact count.
        ShapeError: (when called) the tokens are not all cells of a grid.

    Example:
        >>> x = torch.tensor([0.0, 0.1, 0.2, 7.0, 7.1, 0.0])[:, None] * torch.tensor([1.0, -1, 0])
        >>> routing = Routing(torch.full((1, 6), 0.5))
        >>> chunker = GraphChunker("fixed")
        >>> _, plan = chunker(Tokens(x[None], (1, 6)), routing, Budget(tokens=3))
        >>> plan.provenance.token
        tensor([[0, 1, 1, 1, 1, 2]])

    Paper: Ward, Hierarchical grouping to optimize an objective function, 1963; Karypis and Kumar,
    A fast and high quality multilevel scheme for partitioning irregular graphs, 1998.
    """

    # What `adaptok.wrap(model, chunker="graph")` puts beside it unless told otherwise.
    # The similarity says already what the router's prior would.
    router: ClassVar[dict[str, str | None]] = {"name": "graph", "prior": None}
    dechunker: ClassVar[str] = "graph"

    def __init__(
        self,
        layout: Layout = "bucketed",
        buckets: int = BUCKETS,
        token: Represent = "member",
        threshold: float | None = None,
        trust: float = 1.0,
        neighbours: int = 4,
        target: float = 2.0,
    ) -> None:
        super().__init__()
        import_geometric("utils")
        if layout not in LAYOUTS:
            raise ConfigError(f"layout is one of {', '.join(LAYOUTS)}, got {layout!r}")
        if buckets < 1:
            raise ConfigError(f"buckets is at least 1, got {buckets}")
        if layout != "bucketed" and buckets != BUCKETS:
            raise ConfigError(
                f'buckets={buckets} is for layout "bucketed", and {layout!r} has none'
            )
        if token not in get_args(Represent):
            raise ConfigError(f'token is "mean" or "member", got {token!r}')
        if threshold is not None and not threshold < 1:
            raise ConfigError(f"threshold is a similarity below 1, got {threshold:g}")
        if not 0 <= trust <= 8:
            raise ConfigError(f"trust is an exponent from 0 to 8, got {trust:g}")
        if not target > 1:
            raise ConfigError(f"target is a compression above 1, got {target:g}")
        self.layout: Layout = layout
        self.buckets = buckets
        self.token: Represent = token
        self.threshold = threshold
        self.trust = float(trust)
        self.neighbours = check_neighbours(neighbours)
        self.target = float(target)

    @property
    def compilable(self) -> bool:
        """Whether a graph of torch.compile holds it, with a budget of one exact count."""
        return self.layout != "packed"  # counts of the packed layout are read off the device

    def extra_repr(self) -> str:
        """Name the options."""
        return (
            f"layout={self.layout!r}, token={self.token!r}, threshold={self.threshold}, "
            f"trust={self.trust:g}, neighbours={self.neighbours}"
        )

    def forward(self, tokens: Tokens, routing: Routing, budget: Budget) -> tuple[Tokens, ChunkPlan]:
        """Contract edges (see `Chunker.forward`)."""
        grid = check_tokens(tokens, routing)
        with torch.autocast(tokens.x.device.type, enabled=False):
            z = sketch_cells(tokens.x)
            if self.is_dense(budget):
                return self.chunk_dense(tokens, z, grid, routing, self.count_all(budget, z))
            return self.chunk_ragged(tokens, z, grid, routing, budget)

    def waits_for_device(self, budget: Budget) -> bool:
        """Say whether counts are read off the device (see `Chunker.waits_for_device`)."""
        return not self.is_dense(budget)

    def is_dense(self, budget: Budget) -> bool:
        """Say whether every sample gets the same exact count, and so one dense run."""
        return self.layout == "fixed" or (self.layout == "bucketed" and budget.is_uniform)

    def count_all(self, budget: Budget, z: Float[Tensor, "b n k"]) -> int:
        """Return the one count of all samples, or raise a `BudgetError` if there is none."""
        try:
            return budget.count(z.shape[1])
        except BudgetError as error:
            if self.layout != "fixed":
                raise
            raise BudgetError(
                f'layout "fixed" runs the same count for every sample: {error}, or choose layout '
                '"packed" or "bucketed"'
            ) from None

    def merge(
        self,
        z: Float[Tensor, "b n k"],
        grid: Grid,
        routing: Routing,
        counts: Int[Tensor, " b"],
        limit: float = -1.0,
    ) -> MergeTree:
        """Return the merges that lead to some counts, and those up to a cost."""
        room = (1.0 - routing.keep_prob.detach().float()).clamp(min=LEAST_ROOM)
        reluctance = (room.mean(1, keepdim=True) / room) ** self.trust
        return contract_edges(z, reluctance, grid, self.neighbours, counts, limit)

    def chunk_dense(
        self,
        tokens: Tokens,
        z: Float[Tensor, "b n k"],
        grid: Grid,
        routing: Routing,
        count: int,
    ) -> tuple[Tokens, ChunkPlan]:
        """Make the same number of segments of every sample; nothing depends on the image's size."""
        b = z.shape[0]
        counts = torch.full((b,), count, device=z.device)
        segment = self.merge(z, grid, routing, counts).cut(counts)
        mask = self.choose(z, grid, segment)
        # True sorts before False, and a stable order is that of the cells
        cells = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
        token = number_tokens(mask, segment)
        starts = torch.arange(b, device=z.device)[:, None] * count
        entered = self.represent(tokens, routing, mask, (token + starts).flatten(), b * count)
        plan = SegmentPlan(
            grid=grid,
            layout="fixed",
            routing=routing.with_keep_mask(mask),
            keep_mask=mask,
            cells=cells,
            provenance=Provenance(token),
            entered=entered,
        )
        return Tokens(entered.view(b, count, -1), grid, cells), plan

    def chunk_ragged(
        self,
        tokens: Tokens,
        z: Float[Tensor, "b n k"],
        grid: Grid,
        routing: Routing,
        budget: Budget,
    ) -> tuple[Tokens, ChunkPlan]:
        """Make as many segments of each sample as its own count says."""
        n = z.shape[1]
        asked, tree = self.count_each(z, grid, routing, budget)
        counts = asked
        if self.layout == "bucketed" and not budget.is_exact:
            step = -(-n // self.buckets)
            counts = ((asked + step - 1) // step * step).clamp(max=n)
        segment = tree.cut(counts)
        mask = self.choose(z, grid, segment)
        lengths = tuple(counts.tolist())  # the wait for the device, where it is one
        token, ptr = number_tokens(mask, segment), starts_of(counts)
        t = sum(lengths)
        places = mask.flatten().nonzero().squeeze(1)
        entered = self.represent(tokens, routing, mask, (token + ptr[:-1, None]).flatten(), t)
        cells, batch = places % n, places // n
        wanted = rank_cells(routing.keep_prob.detach(), first=mask) < asked[:, None]
        plan = SegmentPlan(
            grid=grid,
            layout=self.layout,
            routing=routing.with_keep_mask(wanted),
            keep_mask=mask,
            cells=cells,
            provenance=Provenance(token),
            batch=batch,
            ptr=ptr,
            lengths=lengths,
            entered=entered,
        )
        return Tokens(entered, grid, cells, batch=batch, ptr=ptr), plan

    def count_each(
        self, z: Float[Tensor, "b n k"], grid: Grid, routing: Routing, budget: Budget
    ) -> tuple[Int[Tensor, " b"], MergeTree]:
        """Return how many segments each sample gets, and merges that lead there."""
        n = z.shape[1]
        if budget.is_exact or self.threshold is None:
            counts = apply_budget(routing, budget).kept
            return counts, self.merge(z, grid, routing, counts)
        everything = torch.full((z.shape[0],), n, device=z.device)
        limit = 1.0 - self.threshold
        tree = self.merge(z, grid, routing, everything, limit)
        natural = tree.count_below(limit)
        counts = count_kept(budget, natural, n)
        return counts, tree if budget.is_natural else self.merge(z, grid, routing, counts, limit)

    def choose(self, z: Float[Tensor, "b n k"], grid: Grid, segment: Int[Tensor, "b n"]) -> Tensor:
        """Return the cell of each segment at which its token sits, as a mask."""
        if self.token == "member":
            return choose_members(z, segment)
        return choose_members(place_cells(grid, z.device).expand(len(z), -1, -1), segment)

    def represent(
        self, tokens: Tokens, routing: Routing, mask: Tensor, row: Int[Tensor, " bn"], t: int
    ) -> Float[Tensor, "t d"]:
        """Return the tokens that enter the blocks."""
        share = share_cells(routing.keep_prob, row)
        if self.token == "member":
            # one at the member, and the gradient of the share
            share = share - share.detach() + mask.flatten()
        return pool_cells(tokens.x, share, row, t)

    def losses(self, routing: Routing) -> dict[str, Tensor]:
        """Return the ratio loss, unless the router only ranks (see `Chunker.losses`)."""
        if routing.natural_mask is None:
            return {}
        return {"ratio": ratio_loss(routing, self.target)}


def check_tokens(tokens: Tokens, routing: Routing) -> Grid:
    """Return the grid, or raise a `ShapeError` unless all its cells and probabilities came."""
    partial = tokens.cells is not None or tokens.valid is not None
    if tokens.grid is None or tokens.is_packed or partial:
        raise ShapeError("the graph chunker takes dense tokens, one per cell of a known grid")
    if tuple(routing.keep_prob.shape) != tuple(tokens.x.shape[:2]):
        raise ShapeError(
            f"the routing has the shape {tuple(routing.keep_prob.shape)} and the tokens "
            f"{tuple(tokens.x.shape[:2])}: one probability per cell is needed"
        )
    return tokens.grid


def number_tokens(mask: Tensor, segment: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Return for each cell the number of its token; tokens are in the order of their cells."""
    number = torch.where(mask, mask.cumsum(1) - 1, 0)
    # each segment has one cell in the mask: its number goes to the cell that names the segment
    of_name = torch.zeros_like(number).scatter_add(1, segment, number)
    return of_name.gather(1, segment)
