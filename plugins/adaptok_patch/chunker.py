"""One token for each patch of a quadtree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from adaptok import Budget, Chunker, ChunkPlan, Provenance, Routing, Tokens
from adaptok.budgets import apply_budget
from adaptok.chunking import LAYOUTS, Layout, gather_cells, gather_kept
from adaptok.errors import BudgetError, ConfigError, ShapeError
from adaptok_patch.joining import PatchJoiner
from adaptok_patch.merging import MergeOrder, order_merges
from adaptok_patch.router import check_dense
from adaptok_patch.scales import SCALES, check_scales

BUCKETS = 16


@dataclass(frozen=True, slots=True, eq=False)
class PatchPlan(ChunkPlan):
    """A plan that also knows what its tokens were made of.

    Args:
        entered: the tokens as the blocks get them, of all samples in one run, `(t d)`.
        members: how many cells each of them stands for, `(t)`.
    """

    entered: Float[Tensor, "t d"] | None = None
    members: Int[Tensor, " t"] | None = None


class AptChunker(Chunker):
    """Merges square blocks of cells, those that deserve it least first, into one token each.

    Blocks of 2 by 2, 4 by 4, ... cells merge in the order of their second highest keep probability
    (`order_merges`), until as many tokens are left as the budget asks for; a natural budget asks
    for as many as the router keeps cells. A merge of four takes three tokens away, so that at most
    one block of a sample is merged in part: then one to three of its four parts are joined. Smaller
    budgets merge a superset. Blocks that the border cuts, and those coarser than the router's
    scales, merge last.

    The token of a patch stands at the place of one of its cells: the most probable one, which is
    near the centre with the router `"apt"`. Whole coarse patches get a learned part of all their
    cells, which is zero at the start (`PatchJoiner`).

    Args:
        width: features of a token.
        layout: `"bucketed"` rounds counts that depend on the image up to a bucket, undoing the
            sample's own last merges, and runs equal counts together; exact budgets stay exact.
            `"fixed"` takes only budgets of one exact count for all samples. `"packed"` runs exact
            counts in one run of tokens, where the host's blocks have a packed form.
        buckets: number of counts that the bucketed layout allows.
        scales: edges of the patches, in cells, that get a learned part.
        learned: whether there is one; False adds no weights.
        token: `"member"`, the features of the cell at whose place the patch stands, or the `"mean"`
            of all its cells.

    Raises:
        ConfigError: an option is out of range.
        ShapeError: (when called) the tokens are not dense on a grid.
        BudgetError: (when called) the fixed layout got a budget without one exact count.

    Example:
        >>> tokens = Tokens(torch.arange(16.0).view(1, 16, 1), grid=(4, 4))
        >>> routing = Routing((torch.arange(16.0) / 16)[None])
        >>> kept, plan = AptChunker(1, learned=False)(tokens, routing, Budget(tokens=7))
        >>> plan.provenance.token.view(4, 4)  # the last block stays fine
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 1],
                [4, 4, 2, 3],
                [4, 4, 5, 6]])

    Paper: APT, arXiv 2510.18091.
    """

    # What `adaptok.wrap(model, chunker="apt")` puts beside it unless told otherwise.
    router = "apt"
    dechunker = "apt"

    def __init__(
        self,
        width: int,
        layout: Layout = "bucketed",
        buckets: int = BUCKETS,
        scales: Sequence[int] = SCALES,
        learned: bool = True,
        token: Literal["member", "mean"] = "member",
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ConfigError(f"layout is one of {', '.join(LAYOUTS)}, got {layout!r}")
        if buckets < 1:
            raise ConfigError(f"buckets is at least 1, got {buckets}")
        if layout != "bucketed" and buckets != BUCKETS:
            raise ConfigError(f'buckets={buckets} is for layout "bucketed": {layout!r} has none')
        if token not in ("mean", "member"):
            raise ConfigError(f"token is mean or member, got {token!r}")
        self.layout: Layout = layout
        self.buckets = buckets
        self.scales = check_scales(scales)
        self.learned = bool(learned)
        self.token = token
        self.joiner = PatchJoiner(width, self.scales) if learned else None

    def extra_repr(self) -> str:
        """Show the layout."""
        return f"layout={self.layout!r}"

    def forward(self, tokens: Tokens, routing: Routing, budget: Budget) -> tuple[Tokens, ChunkPlan]:
        """Merge patches (see `Chunker.forward`)."""
        grid = check_dense(tokens, "AptChunker")
        shape = tuple(routing.keep_prob.shape)
        if shape != tuple(tokens.x.shape[:2]):
            raise ShapeError(
                f"the routing has the shape {shape} and the tokens {tuple(tokens.x.shape[:2])}: "
                "one probability per cell is needed"
            )
        order = order_merges(routing.keep_prob.detach().float(), grid)
        dense = self.layout == "fixed" or (self.layout == "bucketed" and budget.is_uniform)
        if dense:
            kept, plan = self.keep_count(tokens, routing, budget, order)
        else:
            kept, plan = self.keep_ragged(tokens, routing, budget, order)
        return self.fill(kept, plan, tokens, grid)

    def keep_count(
        self, tokens: Tokens, routing: Routing, budget: Budget, order: MergeOrder
    ) -> tuple[Tokens, ChunkPlan]:
        """Keep the same exact count of every sample, with static shapes."""
        b, n = routing.keep_prob.shape
        try:
            count = budget.count(n)
        except BudgetError as error:
            raise BudgetError(
                f'layout "fixed" runs the same count for every sample: {error}, or choose layout '
                '"packed" or "bucketed"'
            ) from None
        cells = order.cells[:, :count].sort(1).values
        mask = torch.zeros(b, n, dtype=torch.bool, device=cells.device).scatter(1, cells, True)
        plan = ChunkPlan(
            tokens.grid or (),
            "fixed",
            routing.with_keep_mask(mask),
            mask,
            cells,
            Provenance(order.find_tokens(mask)),
        )
        return gather_cells(tokens, cells), plan

    def keep_ragged(
        self, tokens: Tokens, routing: Routing, budget: Budget, order: MergeOrder
    ) -> tuple[Tokens, ChunkPlan]:
        """Keep each sample's own count, all samples in one run."""
        wanted = apply_budget(routing, budget).kept
        places = order.places()
        asked = mask = places < wanted[:, None]
        if self.layout == "bucketed" and not budget.is_exact:
            n = places.shape[1]
            step = -(-n // self.buckets)
            filled = ((wanted + step - 1) // step * step).clamp(max=n)
            mask = places < filled[:, None]
        lengths = tuple(mask.sum(1).tolist())  # the one wait for the device
        kept = gather_kept(tokens, mask, lengths)
        assert kept.cells is not None
        plan = ChunkPlan(
            tokens.grid or (),
            self.layout,
            routing.with_keep_mask(asked),
            mask,
            kept.cells,
            Provenance(order.find_tokens(mask)),
            kept.batch,
            kept.ptr,
            lengths,
        )
        return kept, plan

    def fill(
        self, kept: Tokens, plan: ChunkPlan, tokens: Tokens, grid: tuple[int, int, int]
    ) -> tuple[Tokens, ChunkPlan]:
        """Make the features of the patches, and put them into the plan."""
        sources = plan.sources
        members = torch.zeros(plan.cells.numel(), dtype=torch.long, device=sources.device)
        members = members.index_add(0, sources, torch.ones_like(sources))
        if self.token == "mean":
            x = average_cells(tokens.x, sources, members)
        else:
            x = rearrange(tokens.x, "b n d -> (b n) d").index_select(0, plan.rows)
        if self.joiner is not None:
            x = x + self.joiner(tokens.x, grid, plan, members).to(x.dtype)
        if plan.routing.keep_prob.requires_grad:
            # a router with weights learns by what its tokens are worth; values stay what they are
            prob = plan.routing.keep_prob.flatten().index_select(0, plan.rows)
            x = x + x.detach() * (prob - prob.detach())[:, None].to(x.dtype)
        full = PatchPlan(
            plan.grid,
            plan.layout,
            plan.routing,
            plan.keep_mask,
            plan.cells,
            plan.provenance,
            plan.batch,
            plan.ptr,
            plan.lengths,
            x,
            members,
        )
        return kept.with_x(x.view(kept.x.shape)), full


def average_cells(
    x: Float[Tensor, "b n d"], sources: Int[Tensor, " bn"], members: Int[Tensor, " t"]
) -> Float[Tensor, "t d"]:
    """Return the mean features of the cells that each token stands for.

    Args:
        x: features of all cells.
        sources: for each cell of the batch, its token.
        members: how many cells each token stands for.

    Returns:
        The means, added up in float32 at least: exactly the features of a cell that stands for
        itself alone.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    flat = rearrange(x, "b n d -> (b n) d").to(exact)
    total = flat.new_zeros(members.shape[0], flat.shape[1]).index_add(0, sources, flat)
    return (total / members[:, None]).to(x.dtype)
