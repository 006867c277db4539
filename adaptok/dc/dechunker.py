"""The dechunker of DC-DiT: smooth the kept tokens, plug them back, add a gated residual."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.chunking import ChunkPlan, Dechunker, spread_tokens
from adaptok.dc.scaffold import returns_its_own
from adaptok.dc.smoothing import smooth_kept
from adaptok.errors import ConfigError
from adaptok.float32 import Float32Module, without_autocast
from adaptok.routing import Routing
from adaptok.tokens import Tokens


class DCDechunker(Float32Module, Dechunker):
    """Gives each cell the smoothed token of its nearest kept cell, and a residual.

    Runs in float32 always.

    Args:
        width: features of a token.
        sigma: width of the smoothing in cells (1 for a 32 x 32 grid, 2 for 64 x 64).

    Raises:
        ConfigError: sigma is not positive.

    Example:
        >>> from adaptok.budgets import Budget
        >>> from adaptok.dc import DCChunker
        >>> tokens = Tokens(torch.randn(2, 16, 8), grid=(4, 4))
        >>> kept, plan = DCChunker()(tokens, Routing(torch.rand(2, 16)), Budget(keep=0.25))
        >>> DCDechunker(8)(kept, plan, tokens).x.shape
        torch.Size([2, 16, 8])

    Paper: DC-DiT, arXiv 2603.06351.
    """

    def __init__(self, width: int, sigma: float = 1.0) -> None:
        super().__init__()
        if not sigma > 0:
            raise ConfigError(f"sigma is a positive number of cells, got {sigma:g}")
        self.sigma = sigma
        self.residual = nn.Linear(width, width)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)

    def extra_repr(self) -> str:
        """Show sigma."""
        return f"sigma={self.sigma:g}"

    def forward(self, chunks: Tokens, plan: ChunkPlan, before: Tokens) -> Tokens:
        """Spread tokens over the grid (see `Dechunker.forward`)."""
        self.check_float32()
        with without_autocast(chunks.x):
            spread = smooth_and_spread(chunks, plan, self.sigma)
            gate = pass_gradient(natural_confidence(plan.routing))
            cells = self.residual(before.x.float())
            if returns_its_own(self.residual, nn.Linear):  # saves a third copy of all cells
                return before.with_x(cells.addcmul_(spread, gate[..., None]))
            return before.with_x(torch.addcmul(cells, spread, gate[..., None]))


def smooth_and_spread(chunks: Tokens, plan: ChunkPlan, sigma: float) -> Float[Tensor, "b n d"]:
    """Smooth the kept tokens of each sample and give each cell its nearest one's.

    Args:
        chunks: the short tokens after the blocks, packed or dense.
        plan: what the chunker returned.
        sigma: width of the smoothing in cells.

    Returns:
        Features of all cells, float32, `(b n d)`.
    """
    h = chunks.x.float()
    if not chunks.is_packed:
        h = rearrange(h, "b m d -> (b m) d")
    rows = plan.rows
    prob = plan.routing.keep_prob.float()
    smooth = smooth_kept(
        h, prob.flatten().index_select(0, rows), rows, prob.shape[0], plan.grid, sigma
    )
    return spread_tokens(smooth, plan)


def natural_confidence(routing: Routing) -> Float[Tensor, "b n"]:
    """Return the probability of each natural decision: p where kept, 1 - p where not.

    A router without a threshold decides by the budget.
    """
    mask = routing.keep_mask if routing.natural_mask is None else routing.natural_mask
    assert mask is not None
    return torch.where(mask, routing.keep_prob, 1.0 - routing.keep_prob).float()


def pass_gradient(prob: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Return exactly one, with the gradient of the probability (straight through)."""
    return prob - prob.detach() + 1.0
