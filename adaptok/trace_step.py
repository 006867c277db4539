"""What one forward pass of a wrapped model decided."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from adaptok.chunking import ChunkPlan, Provenance
from adaptok.routing import Routing
from adaptok.tokens import Grid


@dataclass(frozen=True, slots=True, eq=False)
class TraceStep:
    """One pass of a wrapped model's block list.

    Args:
        grid: lengths of the grid axes.
        stages: names of the stages that chose tokens, in the order in which they ran.
        routings: what each router said, with the mask after the budget.
        plans: what each chunker decided.
        provenance: for each cell, the token that stood for it after all stages.
        flops: floating-point operations of the block list, of the whole batch.
        ms: milliseconds that it took, measured while it was traced.
    """

    grid: Grid
    stages: tuple[str, ...]
    routings: tuple[Routing, ...]
    plans: tuple[ChunkPlan, ...]
    provenance: Provenance
    flops: int
    ms: float

    @property
    def kept(self) -> Int[Tensor, " b"]:
        """Grid tokens that were computed, per sample; `plans[i].requested` are those asked for."""
        if not self.plans:
            b, n = self.provenance.token.shape
            return torch.full((b,), n)
        return self.plans[-1].computed

    @property
    def kept_share(self) -> float:
        """Share of the cells that were computed, over the batch."""
        return float(self.kept.float().mean()) / self.provenance.token.shape[1]
