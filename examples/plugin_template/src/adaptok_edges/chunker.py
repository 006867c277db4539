"""Let the most similar token stand for a cell, not the nearest one."""

import torch
from torch import nn

from adaptok import Budget, Chunker, ChunkPlan, Provenance, Routing, Tokens


class SimilarChunker(Chunker):
    """Keeps the most probable cells; a dropped cell is stood for by the kept one most like it.

    It takes budgets of one exact count (`keep=` or `tokens=`, one number for all samples).
    """

    router = "edges"  # what stands beside it unless the user says otherwise
    dechunker = "dc"
    layout = "fixed"

    def forward(self, tokens: Tokens, routing: Routing, budget: Budget) -> tuple[Tokens, ChunkPlan]:
        """Choose tokens."""
        assert tokens.grid is not None
        b, n, d = tokens.x.shape
        count = budget.count(n)  # raises a BudgetError where there is no one count
        ranked = routing.keep_prob.detach().argsort(dim=1, descending=True, stable=True)
        cells = ranked[:, :count].sort(dim=1).values
        x = tokens.x.gather(1, cells[..., None].expand(-1, -1, d))

        # the cosine to each kept token says which one stands for a cell; a kept one for itself
        directions = nn.functional.normalize(tokens.x.detach().float(), dim=-1)
        kept = directions.gather(1, cells[..., None].expand(-1, -1, d))
        places = torch.arange(count, device=cells.device).expand(b, count)
        token = (directions @ kept.mT).argmax(dim=-1).scatter(1, cells, places)

        mask = torch.zeros(b, n, dtype=torch.bool, device=cells.device).scatter(1, cells, True)
        plan = ChunkPlan(
            grid=tokens.grid,
            layout="fixed",
            routing=routing.with_keep_mask(mask),
            keep_mask=mask,
            cells=cells,
            provenance=Provenance(token),
        )
        return Tokens(x, tokens.grid, cells), plan
