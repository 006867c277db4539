"""The plainest part beside a part that is checked."""

from einops import rearrange

from adaptok.chunking import ChunkPlan, Dechunker
from adaptok.tokens import Tokens


class OwnFeatures(Dechunker):
    """Kept cells take what came of their token, dropped ones keep the features that they had.

    It has no weights, so that a wrap with it is exact.

    Example:
        >>> import torch
        >>> from adaptok import Budget, Routing
        >>> from adaptok.dc import DCChunker
        >>> tokens = Tokens(torch.arange(3.0).view(1, 3, 1), grid=(1, 3))
        >>> kept, plan = DCChunker()(tokens, Routing(torch.tensor([[0.9, 0.1, 0.8]])), Budget())
        >>> OwnFeatures()(kept.with_x(kept.x + 10), plan, tokens).x.flatten()
        tensor([10.,  1., 12.])
    """

    def forward(self, chunks: Tokens, plan: ChunkPlan, before: Tokens) -> Tokens:
        """Put the tokens back (see `Dechunker.forward`)."""
        h = chunks.x if chunks.is_packed else rearrange(chunks.x, "b m d -> (b m) d")
        flat = rearrange(before.x, "b n d -> (b n) d")
        moved = flat.index_copy(0, plan.rows, h.to(flat.dtype))
        return before.with_x(moved.view_as(before.x))
