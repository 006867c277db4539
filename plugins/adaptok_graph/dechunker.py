"""A dechunker for segments: each cell moves as its token did, and touching segments may mix."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from adaptok import ChunkPlan, Dechunker, Tokens
from adaptok.chunking import spread_tokens
from adaptok.float32 import Float32Module
from adaptok_graph.geometric import import_geometric
from adaptok_graph.grids import check_neighbours, repeat_edges
from adaptok_graph.segments import SegmentPlan

SHARE = 4  # the smoothing is a quarter as wide as a token


class GraphDechunker(Float32Module, Dechunker):
    """Adds to every cell what the blocks added to its token.

    With `x` a cell before the blocks, `t` its token before and `h` after them, the cell becomes
    `x + (h - t)`, exactly `h` where `x = t`. Beside it a graph network (GraphConv) mixes the
    updates of segments that touch, in proportion to their common border, and enters as
    `+ g smooth(h - t)` with a gate of zero at the start. Blocks that change nothing give every
    cell back, at every budget, also after training. Runs in float32 always.

    Args:
        width: features of a token.
        neighbours: cells that touch: 4, or 8 with the corners.

    Raises:
        MissingPackageError: torch-geometric is not installed.
        ConfigError: neighbours is not 4 or 8.

    Example:
        >>> from adaptok import Budget, Routing
        >>> from adaptok_graph.chunker import GraphChunker
        >>> tokens = Tokens(torch.randn(2, 16, 8), grid=(4, 4))
        >>> few, plan = GraphChunker()(tokens, Routing(torch.rand(2, 16)), Budget(keep=0.25))
        >>> same = GraphDechunker(8)(few, plan, tokens)  # blocks that change nothing
        >>> torch.equal(same.x, tokens.x)
        True
    """

    compilable = True

    def __init__(self, width: int, neighbours: int = 4) -> None:
        super().__init__()
        inner = -(-width // SHARE)
        self.neighbours = check_neighbours(neighbours)
        self.down = nn.Linear(width, inner, bias=False)
        self.mix = import_geometric("nn").GraphConv(inner, inner, bias=False)
        self.up = nn.Linear(inner, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(width))

    def extra_repr(self) -> str:
        """Name the options."""
        return f"neighbours={self.neighbours}"

    def forward(self, chunks: Tokens, plan: ChunkPlan, before: Tokens) -> Tokens:
        """Give every cell its features again (see `Dechunker.forward`)."""
        self.check_float32()
        with torch.autocast(before.x.device.type, enabled=False):
            x = before.x.float()
            h = chunks.x.float()
            if not chunks.is_packed:
                h = rearrange(h, "b m d -> (b m) d")
            entered = find_entered(plan, x)
            update = h - entered
            base = move_cells(x, h, entered, plan)
            smooth = spread_tokens(self.smooth(update, plan, len(x)), plan)
            after = base + self.gate * smooth
            prob = find_confidence(plan)
            if prob.requires_grad:  # zeros with the gradient of the probability
                moved = spread_tokens(update.detach(), plan)
                after = after + moved * (prob - prob.detach())[..., None]
            return before.with_x(after)

    def smooth(self, update: Float[Tensor, "t d"], plan: ChunkPlan, b: int) -> Float[Tensor, "t d"]:
        """Mix the updates of segments that touch."""
        edges = repeat_edges(update, plan.grid, b, self.neighbours)
        ends, weight = weigh_borders(plan.sources, edges, len(update))
        mixed: Tensor = self.up(F.silu(self.mix(self.down(update), ends, weight)))
        return mixed


def find_entered(plan: ChunkPlan, x: Float[Tensor, "b n d"]) -> Float[Tensor, "t d"]:
    """Return the tokens as they went into the blocks; those of other chunkers are cells."""
    if isinstance(plan, SegmentPlan) and plan.entered is not None:
        return plan.entered.float()
    return rearrange(x, "b n d -> (b n) d").index_select(0, plan.rows)


def move_cells(
    x: Float[Tensor, "b n d"],
    h: Float[Tensor, "t d"],
    entered: Float[Tensor, "t d"],
    plan: ChunkPlan,
) -> Float[Tensor, "b n d"]:
    """Add to each cell what its token changed by; a cell like its token takes it as it is."""
    token, moved = spread_tokens(entered, plan), spread_tokens(h, plan)
    return torch.where(x == token, moved, x + (moved - token))


def find_confidence(plan: ChunkPlan) -> Float[Tensor, "b n"]:
    """Return the probability of what the router decided for each cell."""
    mask = plan.routing.natural_mask
    if mask is None:
        mask = plan.keep_mask
    return torch.where(mask, plan.routing.keep_prob, 1.0 - plan.routing.keep_prob).float()


def weigh_borders(
    source: Int[Tensor, " bn"], edges: Int[Tensor, "2 be"], t: int
) -> tuple[Int[Tensor, "2 be"], Float[Tensor, " be"]]:
    """Turn edges between cells into edges between tokens.

    Args:
        source: row of the token of each cell; -1 where there is none.
        edges: pairs of cells, in both directions.
        t: number of tokens.

    Returns:
        Pairs of tokens, and the part of the border of the second that each edge is; 0 inside a
        segment. Several edges may join the same two tokens.

    Example:
        >>> edges = repeat_edges(torch.zeros(1), (1, 4), 1)
        >>> weigh_borders(torch.tensor([0, 1, 1, 2]), edges, 3)[1]
        tensor([0.5000, 1.0000, 0.0000, 0.0000, 1.0000, 0.5000])
    """
    scatter = import_geometric("utils").scatter
    ends = source.index_select(0, edges.flatten()).view(2, -1)
    border = ((ends[0] != ends[1]) & (ends >= 0).all(0)).float()
    ends = ends.clamp(min=0)
    length = scatter(border, ends[1], dim_size=t).clamp(min=1.0)
    return ends, border / length.index_select(0, ends[1])
