"""H-Net's dechunker: a moving average over the tokens of a scan, plugged back at its boundaries."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from adaptok import ChunkPlan, Dechunker, Routing, Tokens
from adaptok.chunking import spread_tokens
from adaptok.float32 import Float32Module, without_autocast
from adaptok_hnet.chunker import ScanPlan
from adaptok_hnet.scan import invert_order, order_on
from adaptok_hnet.smoothing import smooth_runs


class HNetDechunker(Float32Module, Dechunker):
    """Kept cells take what came of their token, dropped ones the update of the token of their run.

    With `x` the features before and `h` those after the blocks, a kept cell takes `h`, a dropped
    one `x + (h_rep - x_rep)` of the token that stands for it. H-Net's moving average
    `z_k = P_k h_k + (1 - P_k) z_(k-1)` along the scan enters as `base + gate (z_rep - base)` with
    a gate of zero at the start; with a gate of one each cell takes `z_rep`, as in H-Net. The scan
    is that of the plan; a plan of another chunker is walked in raster order. Runs in float32
    always.

    Args:
        width: features of a token.

    Example:
        >>> from adaptok import Budget, Routing
        >>> from adaptok_hnet.chunker import HNetChunker
        >>> tokens = Tokens(torch.randn(2, 16, 8), grid=(4, 4))
        >>> kept, plan = HNetChunker()(tokens, Routing(torch.rand(2, 16)), Budget(keep=0.25))
        >>> same = HNetDechunker(8)(kept, plan, tokens)  # blocks that change nothing
        >>> torch.equal(same.x, tokens.x)
        True

    Paper: Hwang et al., Dynamic Chunking for End-to-End Hierarchical Sequence Modeling, 2025.
    """

    compilable = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, chunks: Tokens, plan: ChunkPlan, before: Tokens) -> Tokens:
        """Give every cell its features again (see `Dechunker.forward`)."""
        self.check_float32()
        with without_autocast(chunks.x):
            h = chunks.x.float()
            if not chunks.is_packed:
                h = rearrange(h, "b m d -> (b m) d")
            x = before.x.float()
            flat = rearrange(x, "b n d -> (b n) d")
            rows = plan.rows
            update = spread_tokens(h - flat.index_select(0, rows), plan)
            base = rearrange(x + update, "b n d -> (b n) d").index_copy(0, rows, h).view_as(x)
            prob = chosen_prob(plan.routing)
            if prob.requires_grad:  # zeros with the gradient of the probability (straight through)
                base = base + update.detach() * (prob - prob.detach())[..., None]
            smoothed = spread_tokens(smooth_scan(h, plan), plan)
            # a cell that no token stands for has nothing to be smoothed with
            alone = (plan.provenance.token < 0)[..., None]
            return before.with_x(base + self.gate * torch.where(alone, 0.0, smoothed - base))


def smooth_scan(h: Float[Tensor, "t d"], plan: ChunkPlan) -> Float[Tensor, "t d"]:
    """Smooth the tokens of each sample along the scan of a plan.

    Args:
        h: tokens of all samples, in the order of the plan.
        plan: what the chunker returned.

    Returns:
        Smoothed tokens, in the same order.
    """
    rows = plan.rows
    n = plan.keep_mask.shape[1]
    scan = plan.scan if isinstance(plan, ScanPlan) else "raster"
    place_of_cell = invert_order(order_on(plan.grid, scan, h.device))
    along = (rows - rows % n + place_of_cell[rows % n]).argsort()  # samples stay apart
    prob = plan.routing.keep_prob.float().flatten().index_select(0, rows)
    z = smooth_runs(
        h.index_select(0, along), prob.index_select(0, along), places_in_run(plan), longest=n
    )
    return z.index_select(0, invert_order(along))


def places_in_run(plan: ChunkPlan) -> Int[Tensor, " t"]:
    """Return the place of each token of a plan in its sample."""
    if plan.batch is None or plan.ptr is None:
        b, m = plan.cells.shape
        return torch.arange(m, device=plan.cells.device).repeat(b)
    return torch.arange(plan.cells.shape[0], device=plan.cells.device) - plan.ptr[plan.batch]


def chosen_prob(routing: Routing) -> Float[Tensor, "b n"]:
    """Return the probability of each natural decision: p where kept, 1 - p where not.

    A router without a threshold decides by the budget.
    """
    mask = routing.keep_mask if routing.natural_mask is None else routing.natural_mask
    assert mask is not None
    return torch.where(mask, routing.keep_prob, 1.0 - routing.keep_prob).float()
