"""Probes: a fresh wrap is tried before it is given out, so that it is never a silent no-op."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from adaptok.blocks import AdaptiveBlocks
from adaptok.budgeted import Budgeted
from adaptok.budgets import Budget
from adaptok.calls import BlockCall
from adaptok.chunking import ChunkPlan
from adaptok.containers import BlockContainer
from adaptok.errors import ProbeError
from adaptok.hosts import HostInputs
from adaptok.observers import Observer
from adaptok.routing import Routing

PROBED_BLOCKS = 2
TOLERANCE = 1e-5  # relative to the largest value; another layout of memory rounds differently
BETWEEN = (
    ". The usual reason in a model of one's own is work between the blocks (a norm, a scale, a "
    "skip from an earlier block), which is left out where the list runs in one go: move it into "
    "the blocks, or give the list of those blocks alone that follow each other"
)
ROUNDINGS = 8  # in half precision, where one rounding is more than the tolerance


class EntryMeter(Observer):
    """Counts how often the block list is entered, and the tokens that its plans keep."""

    def __init__(self) -> None:
        self.entries = 0
        self.kept: list[int] = []
        self.cells = 0
        self.entered: BlockCall | None = None
        self.left: BlockCall | None = None

    def note_entry(self, call: BlockCall) -> None:
        """Count."""
        self.entries += 1
        self.cells = call.num_cells
        self.entered = call

    def note_exit(self, call: BlockCall) -> None:
        """Take in what the blocks gave."""
        self.left = call

    def note_plan(self, stage: str, routing: Routing, plan: ChunkPlan) -> None:
        """Take in the computed tokens."""
        self.kept += plan.computed.tolist()

    def note_part(
        self, stage: str, routing: Routing, plan: ChunkPlan, samples: Sequence[int]
    ) -> None:
        """Take in the computed tokens of some samples."""
        self.note_plan(stage, routing, plan)


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What the probes of a wrap saw.

    Args:
        error: largest difference to the host at full budget, relative to the largest value.
        entries: how often the block list was entered by one call.
        cells: grid cells of the example.
        kept: tokens kept at half the budget, per sample.
    """

    error: float
    entries: int
    cells: int
    kept: tuple[int, ...]


def can_probe(model: nn.Module) -> bool:
    """Say whether the weights are really there: not on meta, offloaded or sharded."""
    for parameter in model.parameters():
        if parameter.device.type == "meta" or "DTensor" in type(parameter).__name__:
            return False
    return not any(hasattr(module, "_hf_hook") for module in model.modules())


def probe(
    model: nn.Module, blocks: AdaptiveBlocks, paths: Mapping[str, BlockContainer]
) -> ProbeReport:
    """Try a fresh wrap on example inputs: identity, fewer tokens, one entry.

    Only two blocks of the span are run, so that a large model is probed in a moment; but all of
    them where the adapter does not know what the host's forward does between blocks.

    Args:
        model: the wrapped model.
        blocks: its block list.
        paths: the containers by path, the block list among them.

    Returns:
        What was seen.

    Raises:
        ProbeError: a promise does not hold; the message says which, and where.
    """
    inputs = blocks.backbone.example(model)
    with undisturbed(model), torch.no_grad(), short_containers(model, blocks, paths) as originals:
        for path, container in originals.items():
            set_submodule(model, path, container)
        expected = run(model, blocks, inputs)
        for path, short in paths.items():
            set_submodule(model, path, short)
        meter = EntryMeter()
        blocks.observers = (meter,)
        with budget_of(blocks, Budget(keep=1.0)):
            found = run(model, blocks, inputs)
        full_kept, meter.kept = meter.kept, []
        entries = meter.entries
        if entries != 1:
            raise ProbeError(
                f"one call of {type(model).__name__} entered {blocks.backbone.containers[0]} "
                f"{entries} times, once is needed: its forward does not run this list of blocks "
                "from the first to the last"
            )
        assert meter.entered is not None
        assert meter.left is not None
        # the head may read a class token only: what became of the cells is looked at too
        plain = blocks.run_blocks(meter.entered, 0, len(blocks.all_blocks))
        error = max(relative_error(found, expected), relative_error(meter.left.x, plain.x))
        if not error <= tolerance_of(meter.left.x):
            raise ProbeError(describe_error(type(model).__name__, error, blocks))
        if any(count != meter.cells for count in full_kept):
            raise ProbeError(
                f"a budget of keep=1.0 kept {full_kept} of {meter.cells} cells: the chunker does "
                "not follow its budget"
            )
        with budget_of(blocks, Budget(keep=0.5)):
            run(model, blocks, inputs)
        kept = tuple(meter.kept)
        check_saving(blocks, kept, meter.cells)
    if blocks.backbone.tries_all_blocks:
        error = max(error, compare_whole(model, blocks, paths, inputs))
    return ProbeReport(error, entries, meter.cells, kept)


def compare_whole(
    model: nn.Module,
    blocks: AdaptiveBlocks,
    paths: Mapping[str, BlockContainer],
    inputs: HostInputs,
) -> float:
    """Compare the list of a wrap with the host's own on all blocks, and return the difference.

    The stages stand aside: a schedule of depths leaves blocks out at any budget, and what is
    asked here is what the host's forward does between blocks.

    Args:
        model: the wrapped model.
        blocks: its block list.
        paths: the containers by path.
        inputs: of the example.

    Raises:
        ProbeError: the host does something between its blocks.
    """
    with undisturbed(model), torch.no_grad():
        try:
            for path, container in paths.items():
                (host,) = container.original
                names = list(container.names)
                own = type(host)(*wrap_arguments(host, container, names))
                set_submodule(model, path, own)
            expected = model(*inputs.args, **inputs.kwargs)
        finally:
            for path, container in paths.items():
                set_submodule(model, path, container)
            blocks.handed.clear()
        plain, blocks.plain = blocks.plain, True
        try:
            found = model(*inputs.args, **inputs.kwargs)
        finally:
            blocks.plain = plain
    read = blocks.backbone.output
    error = compare_outputs(type(model).__name__, found, expected)
    error = max(error, relative_error(read(found), read(expected)))
    depth = len(blocks.all_blocks)
    if not error <= max(1, depth / PROBED_BLOCKS) * tolerance_of(read(found)):
        raise ProbeError(describe_error(type(model).__name__, error, blocks))
    return error


def compare_outputs(name: str, found: object, expected: object) -> float:
    """Compare all tensors that a model returned, and return the largest difference.

    Args:
        name: what the model is called.
        found: what it returned with its blocks run in one go.
        expected: what it returned before.

    Raises:
        ProbeError: something is missing, such as features of single blocks.
    """
    (now, form), (before, known) = tree_flatten(found), tree_flatten(expected)
    if form != known:
        raise ProbeError(
            f"wrapped, {name} returns {len(now)} values, and {len(before)} before: it collects "
            "something behind single blocks, which are run in one go now. Take that out of its "
            "forward, or give the list of the blocks behind which nothing is collected"
        )
    pairs = zip(now, before, strict=True)
    errors = [
        relative_error(one, other)
        for one, other in pairs
        if isinstance(one, Tensor) and isinstance(other, Tensor)
    ]
    return max(errors, default=0.0)


def prove_call(blocks: AdaptiveBlocks, call: BlockCall) -> None:
    """Try a wrap on its first real call, where the weights were not there when it was made.

    Args:
        blocks: the block list.
        call: what the host called its first block with.

    Raises:
        ProbeError: the identity does not hold, or no token is saved.
    """
    probed = choose_blocks(blocks)
    first, last = probed.start, probed.stop
    meter = EntryMeter()
    seen = replace(call, observers=(meter,))
    with undisturbed(blocks), torch.no_grad():
        expected = blocks.run_blocks(call, first, last).x.float()
        with budget_of(blocks, Budget(keep=1.0)):
            found = blocks.run_stages(seen, first, last).x.float()
        error = relative_error(found, expected)
        if not error <= tolerance_of(call.x):
            raise ProbeError(describe_error("the first call of a wrapped model", error, blocks))
        meter.kept = []
        with budget_of(blocks, Budget(keep=0.5)):
            blocks.run_stages(seen, first, last)
    check_saving(blocks, tuple(meter.kept), call.num_cells)


def describe_error(what: str, error: float, blocks: AdaptiveBlocks) -> str:
    """Say that the identity does not hold."""
    return (
        f"with every cell kept, {what} differs by {error:.2g} (relative) from what it computed "
        f"before, more than rounding explains. The backbone {blocks.backbone.name!r} or a "
        "stage does not do what it promises" + (BETWEEN if blocks.backbone.tries_all_blocks else "")
    )


def check_saving(blocks: AdaptiveBlocks, kept: tuple[int, ...], cells: int) -> None:
    """Raise a `ProbeError` unless half a budget saved tokens of every sample."""
    if has_chunkers(blocks) and (not kept or not all(m < cells for m in kept)):
        raise ProbeError(
            f"a budget of keep=0.5 computed {list(kept) or 'no plan'} of {cells} cells: the wrap "
            "would not save a token"
        )


def has_chunkers(blocks: AdaptiveBlocks) -> bool:
    """Say whether any stage changes the token count."""
    return any(stage.effects.changes_count for stage in blocks.stages)


def run(model: nn.Module, blocks: AdaptiveBlocks, inputs: HostInputs) -> Tensor:
    """Call the model and return the tensor that is compared."""
    return blocks.backbone.output(model(*inputs.args, **inputs.kwargs)).detach().float()


def tolerance_of(x: Tensor) -> float:
    """Return the relative error that rounding may cause in tokens of this precision."""
    return max(TOLERANCE, ROUNDINGS * torch.finfo(x.dtype).eps)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value; infinite for NaN."""
    found, expected = found.float(), expected.float()
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf") if bool(expected.isfinite().all()) else 0.0
    largest = max(float(expected.abs().max()), 1e-12)
    return float((found - expected).abs().max()) / largest


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave random numbers and train modes as they are."""
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def short_containers(
    model: nn.Module, blocks: AdaptiveBlocks, paths: Mapping[str, BlockContainer]
) -> Iterator[dict[str, nn.Module]]:
    """Cut a wrapped model down to two blocks of its span, and give the host's own lists of them.

    Yields:
        By path, containers of the host's own class that hold the same blocks.
    """
    probed = choose_blocks(blocks)
    saved = {path: container.names for path, container in paths.items()}
    settings = (blocks.span, blocks.observers, blocks.offset)
    originals, start = {}, 0
    for path, container in paths.items():
        names = container.names
        kept = [name for i, name in enumerate(names, start) if i in probed]
        start += len(names)
        (host,) = container.original
        originals[path] = type(host)(*wrap_arguments(host, container, kept))
        container.names = tuple(kept)
    try:
        blocks.span, blocks.offset = (0, len(probed)), probed[0]
        yield originals
    finally:
        for path, container in paths.items():
            container.names = saved[path]
            set_submodule(model, path, container)
        blocks.span, blocks.observers, blocks.offset = settings
        blocks.handed.clear()


def choose_blocks(blocks: AdaptiveBlocks) -> range:
    """Return the two blocks of the span on which a wrap is tried: where a stage begins to act."""
    first, last = blocks.span
    acts = [stage.find_first(first, last) for stage in blocks.stages]
    begin = max(first, min([*acts, last - PROBED_BLOCKS]))
    return range(begin, min(last, begin + PROBED_BLOCKS))


def wrap_arguments(
    host: nn.Module, container: BlockContainer, names: list[str]
) -> tuple[object, ...]:
    """Return what the constructor of a ModuleList or Sequential takes for some blocks."""
    chosen = [container.get_submodule(name) for name in names]
    return tuple(chosen) if isinstance(host, nn.Sequential) else (chosen,)


@contextmanager
def budget_of(blocks: AdaptiveBlocks, budget: Budget) -> Iterator[None]:
    """Run the stages of a block list with a budget."""
    parts = [stage for stage in blocks.stages if isinstance(stage, Budgeted)]
    before = [(part.budget_setting, part.uncond_setting) for part in parts]
    try:
        for part in parts:
            part.take_budget(budget, None)
        yield
    finally:
        for part, settings in zip(parts, before, strict=True):
            part.take_budget(*settings)


def set_submodule(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at an attribute path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
