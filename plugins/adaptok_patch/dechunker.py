"""Gives every cell what came of the patch that it lies in."""

import torch
from einops import rearrange

from adaptok import ChunkPlan, Dechunker, Tokens
from adaptok.chunking import spread_tokens
from adaptok_patch.chunker import PatchPlan


class AptDechunker(Dechunker):
    """Adds to each cell what the blocks changed in the token of its patch.

    With x the features of a cell, e the token of its patch as the blocks got it and h what they
    made of it, the cell gets `x + (h - e)`: details inside a patch stay. A cell that is a patch by
    itself gets h, exactly. It has no weights, computes in float32, and takes the plans of other
    chunkers too, whose tokens are those of kept cells.

    Example:
        >>> from adaptok import Budget, Routing
        >>> from adaptok_patch.chunker import AptChunker
        >>> tokens = Tokens(torch.arange(16.0).view(1, 16, 1), grid=(4, 4))
        >>> made, plan = AptChunker(1)(tokens, Routing(torch.ones(1, 16)), Budget(tokens=4))
        >>> after = AptDechunker()(made.with_x(made.x + 100), plan, tokens)
        >>> torch.equal(after.x, tokens.x + 100)
        True
    """

    def forward(self, chunks: Tokens, plan: ChunkPlan, before: Tokens) -> Tokens:
        """Give every cell its features again (see `Dechunker.forward`)."""
        with torch.autocast(chunks.x.device.type, enabled=False):
            x = before.x.float()
            h = chunks.x if chunks.is_packed else rearrange(chunks.x, "b m d -> (b m) d")
            h, rows = h.float(), plan.rows
            flat = rearrange(x, "b n d -> (b n) d")
            if isinstance(plan, PatchPlan) and plan.entered is not None:
                entered, members = plan.entered.float(), plan.members
            else:
                entered, members = flat.index_select(0, rows), None
            update = spread_tokens(h - entered, plan)
            prob = plan.routing.keep_prob
            if prob.requires_grad:  # zeros with the gradient of the probability (straight through)
                sure = (
                    prob
                    if plan.routing.natural_mask is None
                    else torch.where(plan.routing.natural_mask, prob, 1 - prob)
                )
                update = update + update.detach() * (sure - sure.detach())[..., None]
            moved = rearrange(x + update, "b n d -> (b n) d")
            if members is not None:
                h = torch.where(members[:, None] == 1, h, moved.index_select(0, rows))
            return before.with_x(moved.index_copy(0, rows, h).view_as(x))
