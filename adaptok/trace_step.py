"""What one forward pass of a wrapped model decided."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from adaptok.chunking import ChunkPlan, Provenance
from adaptok.routing import Routing
from adaptok.tokens import Grid


@dataclass(frozen=True, slots=True, eq=False)
class SampleNote:
    """One number of each of some samples.

    Args:
        values: the numbers.
        samples: which samples of the batch these are; None means all.
    """

    values: Int[Tensor, " b"] | Bool[Tensor, " b"]
    samples: tuple[int, ...] | None = None


def join_samples(
    notes: Sequence[SampleNote], b: int, missing: int = -1
) -> Int[Tensor, " b"] | None:
    """Put notes about parts of a batch together.

    Args:
        notes: what was told, in order; of a sample told of twice, because an outer stage ran its
            blocks in pieces, the last one counts.
        b: samples of the batch.
        missing: stands for samples of which nothing was told.

    Returns:
        One number per sample; None without any note.

    Example:
        >>> notes = [SampleNote(torch.tensor([6]), (2,)), SampleNote(torch.tensor([12, 9]), (0, 1))]
        >>> join_samples(notes, 3)
        tensor([12,  9,  6])
    """
    if not notes:
        return None
    whole = torch.full((b,), missing)
    for note in notes:
        places = range(b) if note.samples is None else note.samples
        whole[list(places)] = note.values.cpu().long()
    return whole


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
        depths: the block in front of which each sample left, `(b)`; the one behind the last for
            those that stayed, -1 for those that no block ran for. None if no stage told of it.
        reused: whether each sample was given what the blocks did in an earlier step, `(b)`; None if
            no stage reuses steps.
    """

    grid: Grid
    stages: tuple[str, ...]
    routings: tuple[Routing, ...]
    plans: tuple[ChunkPlan, ...]
    provenance: Provenance
    flops: int
    ms: float
    depths: Int[Tensor, " b"] | None = None
    reused: Bool[Tensor, " b"] | None = None

    def __repr__(self) -> str:
        """Say what was decided, without the tensors."""
        words = [f"grid={self.grid}", f"stages={self.stages}", f"kept={self.kept.tolist()}"]
        if self.depths is not None:
            words.append(f"depths={self.depths.tolist()}")
        if self.reused is not None:
            words.append(f"reused={self.reused.tolist()}")
        return f"TraceStep({', '.join(words)}, flops={self.flops:,}, ms={self.ms:.3g})"

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
