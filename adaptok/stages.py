"""Stages: what stands between a host and its blocks, and what each one declares."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

from torch import nn

from adaptok.calls import BlockCall
from adaptok.errors import ConfigError, StackError
from adaptok.packed_run import PackedBlock, RunForms, run_forms
from adaptok.split_run import Attended, KeyBias

Axis = Literal["time", "depth", "tokens", "width"]
AXES: tuple[Axis, ...] = ("time", "depth", "tokens", "width")  # outermost first


@dataclass(frozen=True, slots=True)
class Effects:
    """What a stage does to a forward pass, and what it needs; a solver orders stacks by it.

    Args:
        axis: what is saved: `"time"` (a step is reused), `"depth"` (blocks), `"tokens"`, or
            `"width"` (heads and channels).
        changes_count: the blocks inside see fewer tokens.
        needs_grid: every grid cell must still have its token when the stage begins.
        needs_attention: attention maps are read.
        needs_keys: keys of attention are read.
        needs_step: the diffusion step must be known.
        keeps_state: something is kept from one forward pass to the next.
        compilable: `torch.compile(fullgraph=True)` works with a budget of one exact count.

    Raises:
        ConfigError: there is no such axis.

    Example:
        >>> Effects("tokens", changes_count=True, needs_grid=True).axis
        'tokens'
    """

    axis: Axis
    changes_count: bool = False
    needs_grid: bool = False
    needs_attention: bool = False
    needs_keys: bool = False
    needs_step: bool = False
    keeps_state: bool = False
    compilable: bool = False

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise ConfigError(f"the axis of a stage is one of {', '.join(AXES)}, got {self.axis!r}")


class BlockRunner(Protocol):
    """Runs the host's blocks from `first` to `last`, the last one excluded."""

    def __call__(self, call: BlockCall, first: int, last: int) -> BlockCall:
        """Run the blocks on a call and return the call after them."""


UNASKED = "nobody asked for the halves of these blocks"
NO_MODULES = "what runs them is no block list of a wrapped model"


class BlockHalves(Protocol):
    """Runs one block of the host in two halves (see `split_run.SplitBlock`)."""

    def attend(
        self,
        block: int,
        call: BlockCall,
        *,
        key_bias: KeyBias = None,
        keys: bool = False,
        class_attention: bool = False,
    ) -> Attended:
        """Run attention of a block with its norm, scale and residual."""

    def finish(self, block: int, call: BlockCall) -> BlockCall:
        """Run the MLP of a block with its norm, scale and residual."""


@dataclass(frozen=True, slots=True)
class BlockRange:
    """The blocks inside a stage, with all stages between it and them.

    Args:
        run: runs some of the blocks.
        first: the first block.
        last: the block behind the last one.
        forms: packed forms of the blocks, where they were asked for: each takes all samples in one
            run of tokens.
        positions_per_sample: whether samples of one call may keep different cells.
        run_forms: runs packed forms one after the other.
        halves: runs a block in two halves, where that is possible.
        whole: why it is not.
        find_module: gives a block of the host by its number, where no stage stands before it.

    Example:
        >>> import torch
        >>> def run(call, first, last):
        ...     return call.with_x(call.x + (last - first))
        >>> inner = BlockRange(run, 2, 5)
        >>> inner(BlockCall(torch.zeros(1, 4, 2), grid=(2, 2))).x.max()
        tensor(3.)
    """

    run: BlockRunner
    first: int
    last: int
    forms: tuple[PackedBlock, ...] | None = None
    positions_per_sample: bool = True
    run_forms: RunForms = run_forms
    halves: BlockHalves | None = None
    whole: str = UNASKED
    find_module: Callable[[int], nn.Module] | None = None

    def __call__(self, call: BlockCall) -> BlockCall:
        """Run all of the blocks.

        Args:
            call: the tokens and what the blocks take beside them.

        Returns:
            The call after the blocks.
        """
        return self.run(call, self.first, self.last)

    @property
    def can_split(self) -> bool:
        """Whether blocks can be run in two halves."""
        return self.halves is not None

    def split(self) -> BlockHalves:
        """Return what runs blocks in two halves.

        Returns:
            The halves of all blocks.

        Raises:
            StackError: these blocks have none, or another stage stands before them.
        """
        if self.halves is None:
            raise StackError(
                f"a stage acts between attention and MLP, and here it cannot: {self.whole}"
            )
        return self.halves

    def module(self, block: int) -> nn.Module:
        """Return a block of the host, for a stage that runs its submodules by itself.

        Args:
            block: its number in the host's list.

        Returns:
            The block; it belongs to the host, so that a stage does not keep it.

        Raises:
            StackError: another stage stands before it, or there are no blocks here.
        """
        if self.find_module is None:
            raise StackError(
                "a stage runs the blocks by their own submodules, and here it does not see them: "
                f"{NO_MODULES if self.whole == UNASKED else self.whole}"
            )
        return self.find_module(block)

    def around(self, stage: "Stage") -> "BlockRange":
        """Return the same blocks with one more stage around them."""

        def run(call: BlockCall, first: int, last: int) -> BlockCall:
            forms = self.forms and self.forms[first - self.first : last - self.first]
            after: BlockCall = stage(replace(self, first=first, last=last, forms=forms), call)
            return after

        # what is outside sees the stage, no blocks
        whole = f"a stage of the class {type(stage).__name__} stands before them"
        return replace(self, run=run, forms=None, halves=None, whole=whole, find_module=None)


class Stage(nn.Module, ABC):
    """Runs the blocks inside it on what it chooses.

    A subclass declares its `effects` and implements `forward`.

    Example:
        >>> class Twice(Stage):
        ...     effects = Effects("time")
        ...     def forward(self, inner, call):
        ...         return inner(inner(call))
        >>> Twice.effects.axis
        'time'
    """

    effects: ClassVar[Effects]
    cuts: bool = False  # one graph cannot hold it: a compiled model runs it between two graphs
    aside: bool = False  # not run, as if it was not there: see `adaptok.set_aside`

    def find_first(self, first: int, last: int) -> int:
        """Return the first block of a range at which this stage does something.

        A wrap is tried on two blocks from there.

        Args:
            first: the first block of the range.
            last: the block behind the last one.
        """
        return first

    def meet(self, inner: BlockRange) -> None:
        """Look at the blocks when a wrap is made, before anything is run.

        A stage whose weights depend on what the blocks are like makes them here.

        Args:
            inner: all blocks of the span, without the stages between them and this one;
                `inner.module(block)` is one of them.

        Raises:
            StackError: the stage cannot work with these blocks; the model stays as it was.
        """

    @abstractmethod
    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run the inner blocks.

        Args:
            inner: the blocks inside; `inner(call)` runs all of them, `inner.run(call, 3, 5)`
                those from 3 to 4.
            call: the tokens, and what the blocks take beside them.

        Returns:
            The call after the blocks, with as many tokens as it came with.
        """

    def describe(self) -> Mapping[str, str]:
        """Return what `repr` of a wrapped model shows of this stage, name by name."""
        return {"stage": type(self).__name__}
