"""What both prunings have in common: a few blocks at which they act, the same share at each."""

from collections.abc import Sequence

from adaptok import BlockRange, ReduceStage
from adaptok.reductions import Restore, schedule_by_share
from adaptok_prune.places import check_blocks, choose_blocks


class PlacedStage(ReduceStage):
    """A pruning at some blocks of the span; pieces of the span have those that lie in them.

    Args:
        name: what the stage is called in traces and errors.
        blocks: indices of the blocks; None takes a quarter, a half and three quarters of the span.
        restore: see `adaptok.ReduceStage`.
        fill: see `adaptok.ReduceStage`.

    Raises:
        ConfigError: the blocks are no numbers that rise.
        StackError: (when wrapped or called) a block lies outside of the span.
    """

    drops = True

    def __init__(
        self, name: str, blocks: Sequence[int] | None, restore: Restore, fill: float | None
    ) -> None:
        super().__init__(name, restore, fill)
        self.blocks = check_blocks(blocks)
        self.met: tuple[int, ...] | None = None  # those of the whole span, once it is known

    def meet(self, inner: BlockRange) -> None:
        """Choose the blocks when a wrap is made (see `Stage.meet`)."""
        self.met = choose_blocks(self.blocks, inner.first, inner.last, short=0)

    def find_first(self, first: int, last: int) -> int:
        """Return the first block at which it acts (see `Stage.find_first`)."""
        return choose_blocks(self.blocks, first, last, short=0)[0]

    def list_blocks(self, inner: BlockRange) -> tuple[int, ...]:
        """Return the blocks of a range at which it acts."""
        if self.met is None:
            return choose_blocks(self.blocks, inner.first, inner.last)
        return tuple(block for block in self.met if inner.first <= block < inner.last)

    def schedule(self, n: int, final: int, steps: int) -> tuple[int, ...]:
        """Take the same share at each site (see `ReduceStage.schedule`)."""
        return schedule_by_share(n, final, steps)
