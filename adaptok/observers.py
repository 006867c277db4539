"""Observers: who is told what stages decide, for whole batches and for parts of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Bool, Int
from torch import Tensor

from adaptok.chunking import ChunkPlan
from adaptok.routing import Routing
from adaptok.standing import Standing

if TYPE_CHECKING:  # calls know their observers
    from adaptok.calls import BlockCall


class Observer:
    """Who is told what stages decide; a subclass listens to what it wants.

    See `adaptok.trace` and `adaptok.collect_losses`.
    """

    wants_losses = False
    counts = False  # whether it looks at each operation, which a compiled kernel hides

    def note_entry(self, call: "BlockCall") -> None:
        """Take in that the block list is entered."""

    def note_exit(self, call: "BlockCall") -> None:
        """Take in that the block list is left."""

    def note_standing(
        self, host: str, standing: Standing, samples: Sequence[int] | None = None
    ) -> None:
        """Take in which cells a host chose that shortens its own sequence.

        Args:
            host: name of its backbone.
            standing: the cells.
            samples: which samples of the batch these are; None means all.
        """

    def note_plan(self, stage: str, routing: Routing, plan: ChunkPlan) -> None:
        """Take in a decision."""

    def note_part(
        self, stage: str, routing: Routing, plan: ChunkPlan, samples: Sequence[int]
    ) -> None:
        """Take in a decision about some samples of the batch, which run apart from the others."""

    def note_depth(
        self, stage: str, depth: Int[Tensor, " b"], samples: Sequence[int] | None = None
    ) -> None:
        """Take in how deep each sample went: the number of the block that it did not run any more.

        Args:
            stage: who decided.
            depth: the block in front of which each sample left; for those that stayed, the one
                behind the last.
            samples: which samples of the batch these are; None means all.
        """

    def note_reuse(
        self, stage: str, reused: Bool[Tensor, " b"], samples: Sequence[int] | None = None
    ) -> None:
        """Take in which samples were given what the blocks did in an earlier step.

        Args:
            stage: who decided.
            reused: whether no block ran for a sample.
            samples: which samples of the batch these are; None means all.
        """

    def note_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Take in auxiliary losses."""


class PartObserver(Observer):
    """Stands for an observer where a part of the batch runs apart.

    Args:
        whole: who is told in the end.
        samples: which samples of its batch the part has.
        batch: how many samples that batch has.
    """

    def __init__(self, whole: Observer, samples: Sequence[int], batch: int) -> None:
        self.whole = whole
        self.samples = tuple(samples)
        self.share = len(self.samples) / batch
        self.wants_losses = whole.wants_losses

    def note_standing(
        self, host: str, standing: Standing, samples: Sequence[int] | None = None
    ) -> None:
        """Pass the host's choice on as one for these samples, or for some of them."""
        self.whole.note_standing(host, standing, self.name_samples(samples))

    def note_plan(self, stage: str, routing: Routing, plan: ChunkPlan) -> None:
        """Pass a decision on as one about some samples."""
        self.whole.note_part(stage, routing, plan, self.samples)

    def note_part(
        self, stage: str, routing: Routing, plan: ChunkPlan, samples: Sequence[int]
    ) -> None:
        """Pass a decision on about some of these samples."""
        self.whole.note_part(stage, routing, plan, [self.samples[sample] for sample in samples])

    def note_depth(
        self, stage: str, depth: Int[Tensor, " b"], samples: Sequence[int] | None = None
    ) -> None:
        """Pass depths on as those of these samples, or of some of them."""
        self.whole.note_depth(stage, depth, self.name_samples(samples))

    def note_reuse(
        self, stage: str, reused: Bool[Tensor, " b"], samples: Sequence[int] | None = None
    ) -> None:
        """Pass on which of these samples, or of some of them, were reused."""
        self.whole.note_reuse(stage, reused, self.name_samples(samples))

    def name_samples(self, samples: Sequence[int] | None) -> Sequence[int]:
        """Return the numbers that some of these samples have in the whole batch."""
        return self.samples if samples is None else [self.samples[sample] for sample in samples]

    def note_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Pass losses on by the share of the batch that they are a mean over."""
        self.whole.note_losses({name: self.share * loss for name, loss in losses.items()})
