"""AdaptiveBlocks: stands where a host kept its block list, and owns the loop over it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaptok.calls import BlockCall, HostNumbers
from adaptok.checkpointing import is_checkpointed, shield
from adaptok.config import Config
from adaptok.containers import BlockContainer, FollowingBlocks, Parts
from adaptok.errors import HandOverError, WrapError
from adaptok.host_numbers import HandedNumbers
from adaptok.hosts import Backbone
from adaptok.observers import Observer, PartObserver
from adaptok.packed_run import PackedBlock, run_forms
from adaptok.reduce_stage import stand_around
from adaptok.regions import Regional, mark_dynamic
from adaptok.split_run import Attended, KeyBias, SplitBlock
from adaptok.stages import UNASKED, BlockRange, Stage

PARTS = "adaptok"  # name of the one child that is not the host's


class AdaptiveBlocks(Regional, BlockContainer):
    """The block list of a wrapped model: runs its stages, and the host's blocks inside them.

    Args:
        original: the host's own container.
        backbone: the adapter of the host.
        stages: outermost first, by name.
        span: first block inside the stages, and the one behind the last.
        followers: containers whose blocks come after these.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> list(vit.blocks) == [vit.blocks], type(vit.blocks[0]).__name__
        (True, 'Block')
    """

    regions = ("run_blocks", "run_forms", "attend", "finish")
    run_forms = staticmethod(run_forms)

    def __init__(
        self,
        original: nn.Module,
        backbone: Backbone,
        stages: Mapping[str, Stage],
        span: tuple[int, int],
        followers: tuple[FollowingBlocks, ...] = (),
    ) -> None:
        super().__init__(original)
        self.backbone = backbone
        self.span = span
        self.followers = followers  # in a tuple: registered where the host has them
        self.add_module(PARTS, Parts(dict(stages)))
        self.handed = HandedNumbers()  # plain numbers, from the entrances
        self.request: tuple[str, str | None] | None = None
        self.config: Config | None = None  # what makes this wrap again
        # A probe that waits for the first call, because the weights are not there yet.
        self.proof: Callable[[AdaptiveBlocks, BlockCall], None] | None = None
        # Packed forms by block, for the layout that runs all samples in one run of tokens.
        self.forms: dict[nn.Module, PackedBlock] = {}
        # Halves of blocks, for stages that act between them; or why there are none.
        self.splits: dict[nn.Module, SplitBlock] = {}
        self.whole = UNASKED
        self.offset = 0  # of the first block, while a probe cuts the list short
        self.observers: tuple[Observer, ...] = ()
        self.plain = False  # run the blocks as the host would, without stages
        for stage in stages.values():
            stage.meet(self.list_range(*span))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to contexts that are open now: a copy is in none of them."""
        return super().__getstate__() | {"observers": (), "request": None, "plain": False}

    @property
    def stages(self) -> list[Stage]:
        """The stages, outermost first."""
        parts = self._modules[PARTS]
        assert isinstance(parts, nn.ModuleDict)
        return [stage for stage in parts.values() if isinstance(stage, Stage)]

    @property
    def stage_names(self) -> list[str]:
        """What the stages call themselves when they tell of a decision, outermost first."""
        return [str(getattr(stage, "name", type(stage).__name__)) for stage in self.stages]

    @property
    def all_blocks(self) -> list[nn.Module]:
        """The blocks of all containers in the order in which they run."""
        return self.blocks + [block for follower in self.followers for block in follower.blocks]

    def __iter__(self) -> Iterator[nn.Module]:
        yield self

    def extra_repr(self) -> str:
        """Show the stages, the span and the backbone."""
        shown = [f"backbone={self.backbone.name!r}", f"span={self.span}"]
        for stage in self.stages:
            shown += [f"{name}={text}" for name, text in stage.describe().items()]
            shown += ["aside=True"] if stage.aside else []
        return ", ".join(shown)

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run stages and blocks on what the host calls its first block with."""
        if torch.compiler.is_compiling() and self.is_cut:
            return run_uncompiled(self, args, kwargs)
        return self.run_call(args, kwargs)

    @property
    def is_cut(self) -> bool:
        """Whether a graph ends here, and regions are compiled each for itself."""
        if not self.compiled_regions or self.plain:
            return False  # a graph that somebody else makes, who said how
        if self.request is not None or self.observers:  # a name would be a constant of the graph
            return True
        running = [stage for stage in self.stages if not stage.aside]
        return any(stage.cuts or not stage.effects.compilable for stage in running)

    def run_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Run stages and blocks, shielded from a host that checkpoints its block list."""
        if not is_checkpointed():
            return self.run_host_call(args, kwargs, checkpoint=False)
        with shield():  # around the reading, too, which may compute: a table, a mask
            return self.run_host_call(args, kwargs, checkpoint=True)

    def run_host_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, checkpoint: bool
    ) -> Any:  # noqa: ANN401
        """Read the arguments, run stages and blocks, and return what the host expects."""
        numbers = self.take_numbers()
        call = self.backbone.read(numbers, args, kwargs)
        if isinstance(call, tuple):
            scale = self.backbone.timestep_scale
            groups = [
                replace(part, numbers=numbers, checkpoint=checkpoint, timestep_scale=scale)
                for part in call
            ]
            return self.backbone.write_groups(run_groups(self, groups))
        step = numbers.spread_timestep(call.x) if call.timestep is None else call.timestep
        call = replace(
            call,
            numbers=numbers,
            observers=self.observers,
            checkpoint=checkpoint,
            timestep=step,
            timestep_scale=self.backbone.timestep_scale,
        )
        if self.proof is not None and not torch.compiler.is_compiling():
            self.proof(self, call)
            self.proof = None
        for observer in self.observers:
            observer.note_entry(call)
        self.tell_standing(call)
        call = self.run(call)
        for observer in self.observers:
            observer.note_exit(call)
        return self.backbone.write(call)

    def tell_standing(self, call: BlockCall) -> None:
        """Tell observers which cells a host chose that shortens its own sequence."""
        if call.standing is not None:
            for observer in call.observers:
                observer.note_standing(self.backbone.name, call.standing)

    def take_numbers(self) -> HostNumbers:
        """Return what the host's forward handed over, once."""
        numbers = self.handed.take() or self.backbone.constant
        if numbers is None or not numbers.grid:
            raise HandOverError(
                f"the blocks of a wrapped model ({self.backbone.family}) were called without the "
                "grid: call the model itself, not its blocks; and where a checkpoint around them "
                "computes them again, give it use_reentrant=False"
            )
        if self.request is not None:
            request, branch = self.request
            branches = numbers.branches if branch is None else (branch,)
            numbers = replace(numbers, request=request, branches=branches)
        return numbers

    def run(self, call: BlockCall) -> BlockCall:
        """Run the blocks in front of the span, the stages around it, and the blocks behind it."""
        if self.plain or call.x.shape[0] == 0:  # no sample, nothing to choose
            return self.run_blocks(call, 0, len(self.all_blocks))
        first, last = self.span
        call = self.run_inner(call, 0, first)
        call = self.run_stages(call, first, last)
        return self.run_inner(call, last, len(self.all_blocks))

    def run_stages(self, call: BlockCall, first: int, last: int) -> BlockCall:
        """Run the stages around some of the blocks."""
        running = [stage for stage in self.stages if not stage.aside]
        return stand_around(running, self.list_range(first, last))(call)

    def list_range(self, first: int, last: int) -> BlockRange:
        """Return some of the host's blocks as the innermost stage sees them."""
        inside = self.all_blocks[first:last]
        found = [self.forms.get(block) for block in inside]
        forms = tuple(form for form in found if form is not None)
        return BlockRange(
            self.run_numbered,
            first + self.offset,
            last + self.offset,
            forms if forms and len(forms) == last - first else None,
            self.backbone.positions_per_sample,
            self.region("run_forms"),
            Halves(self) if all(block in self.splits for block in inside) else None,
            self.whole,
            self.find_module,
        )

    def find_module(self, block: int) -> nn.Module:
        """Return a block by its number in the whole list."""
        return self.all_blocks[block - self.offset]

    def run_numbered(self, call: BlockCall, first: int, last: int) -> BlockCall:
        """Run some of the host's blocks by their numbers in the whole list."""
        return self.run_inner(call, first - self.offset, last - self.offset)

    def attend(
        self, block: int, call: BlockCall, key_bias: KeyBias, keys: bool, class_attention: bool
    ) -> Attended:
        """Run the attention of a block, which has halves."""
        half = self.find_half(block)
        return half.attend(call, key_bias=key_bias, keys=keys, class_attention=class_attention)

    def finish(self, block: int, call: BlockCall) -> BlockCall:
        """Run the MLP of a block, which has halves."""
        return self.find_half(block).finish(call)

    def find_half(self, block: int) -> SplitBlock:
        """Return the halves of a block."""
        half = self.splits[self.all_blocks[block]]
        return half.at(block) if self.offset else half  # a short list counts from 0

    def run_inner(self, call: BlockCall, first: int, last: int) -> BlockCall:
        """Run some of the host's blocks, as a region where those are compiled."""
        if first == last:
            return call
        if self.compiled_regions:
            mark_call(call)
        after: BlockCall = self.region("run_blocks")(call, first, last)
        return after

    def run_blocks(self, call: BlockCall, first: int, last: int) -> BlockCall:
        """Run some of the host's blocks, as the host would."""
        blocks = self.all_blocks
        for index in range(first, last):
            if call.checkpoint:
                call = checkpoint(
                    self.backbone.run, blocks[index], index, call, use_reentrant=False
                )
            else:
                call = self.backbone.run(blocks[index], index, call)
        return call


def run_groups(blocks: AdaptiveBlocks, groups: Sequence[BlockCall]) -> tuple[BlockCall, ...]:
    """Run stages and blocks on groups of samples that have as many tokens.

    Args:
        blocks: the list.
        groups: calls with their `part`.

    Returns:
        The calls after the blocks.
    """
    whole = cover_groups(groups) if blocks.observers else None
    if blocks.proof is not None:
        blocks.proof(blocks, groups[0])
        blocks.proof = None
    for observer in blocks.observers:
        assert whole is not None
        observer.note_entry(whole)
    after = []
    for group in groups:
        assert group.part is not None
        told = tuple(
            PartObserver(seen, group.part.samples.tolist(), group.part.batch)
            for seen in blocks.observers
        )
        call = replace(group, observers=told)
        blocks.tell_standing(call)
        after.append(blocks.run(call))
    for observer in blocks.observers:
        assert whole is not None
        observer.note_exit(cover_groups(after))
    return tuple(after)


def cover_groups(groups: Sequence[BlockCall]) -> BlockCall:
    """Return one call that holds all groups, padded, for whoever looks on."""
    longest = max(group.x.shape[1] for group in groups)
    parts = [group.part.samples for group in groups if group.part]
    padded = [F.pad(group.x, (0, 0, 0, longest - group.x.shape[1])) for group in groups]
    x = torch.cat(padded).index_select(0, torch.cat(parts).argsort())
    return BlockCall(x, (longest,), numbers=groups[0].numbers)


class Halves:
    """The halves of a list's blocks, compiled where its regions are.

    Args:
        blocks: the list.
    """

    def __init__(self, blocks: AdaptiveBlocks) -> None:
        self.blocks = blocks

    def attend(
        self,
        block: int,
        call: BlockCall,
        *,
        key_bias: KeyBias = None,
        keys: bool = False,
        class_attention: bool = False,
    ) -> Attended:
        """Run the attention of a block (see `BlockHalves`)."""
        if self.blocks.compiled_regions:
            mark_call(call)
        number = block - self.blocks.offset
        region = self.blocks.region("attend")
        attended: Attended = region(number, call, key_bias, keys, class_attention)
        return attended

    def finish(self, block: int, call: BlockCall) -> BlockCall:
        """Run the MLP of a block (see `BlockHalves`)."""
        if self.blocks.compiled_regions:
            mark_call(call)
        after: BlockCall = self.blocks.region("finish")(block - self.blocks.offset, call)
        return after


def run_apart(blocks: AdaptiveBlocks, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
    """Run a block list outside of the graph around it; its regions have graphs of their own."""
    if any(observer.counts for observer in blocks.observers):
        with torch.compiler.set_stance("force_eager"):  # a compiled kernel cannot be looked into
            return blocks.run_call(args, kwargs)
    return blocks.run_call(args, kwargs)


run_uncompiled = torch.compiler.disable(run_apart)


def mark_call(call: BlockCall) -> None:
    """Tell the compiler that samples and tokens of a call differ from call to call."""
    mark_dynamic(call.x, 0, 1)
    if call.cells is not None:
        mark_dynamic(call.cells, 0, 1)
    for per_sample in (call.condition, call.timestep):
        if per_sample is not None:
            mark_dynamic(per_sample, 0)
    for given in call.token_inputs.values():
        if given.value.shape[0] > 1 or not given.batched:
            mark_dynamic(given.value, *given.axes, *([0] if given.batched else []))


def list_adaptive(model: nn.Module) -> dict[str, AdaptiveBlocks]:
    """Return the block lists of all wrapped models in a module, by path."""
    found = model.named_modules()
    return {path: part for path, part in found if isinstance(part, AdaptiveBlocks)}


def find_adaptive(model: nn.Module) -> AdaptiveBlocks | None:
    """Return the block list of a wrapped model, or None if it is not wrapped.

    Raises:
        WrapError: there are several, and nothing says which is meant.
    """
    found = list_adaptive(model)
    if len(found) > 1:
        raise WrapError(
            f"{type(model).__name__} holds {len(found)} wrapped models, whose blocks are at "
            f"{', '.join(found)}: give the one that is meant"
        )
    return next(iter(found.values()), None)
