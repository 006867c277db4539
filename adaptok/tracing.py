"""What a wrapped model decides, collected into objects of the caller."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adaptok.blocks import AdaptiveBlocks, find_adaptive, list_adaptive
from adaptok.calls import BlockCall
from adaptok.chunking import ChunkPlan
from adaptok.counting import make_counter
from adaptok.discovery import HOST
from adaptok.errors import NotWrappedError
from adaptok.observers import Observer
from adaptok.plan_notes import PlanNote, join_notes, note_standing, trace_cells
from adaptok.routing import Routing
from adaptok.standing import Standing
from adaptok.trace_step import SampleNote, TraceStep, join_samples


class Trace(Observer):
    """The steps of the calls inside an `adaptok.trace`.

    Args:
        steps: one per pass of the block list.
    """

    counts = True

    def __init__(self) -> None:
        self.steps: list[TraceStep] = []
        self.open: list[PlanNote] = []
        self.depths: list[SampleNote] = []
        self.reuse: list[SampleNote] = []
        self.order: tuple[str, ...] = ()  # names of the stages, the outermost first
        self.counter: FlopCounterMode | None = None
        self.start = 0.0

    def __repr__(self) -> str:
        """List the steps, without their tensors."""
        lines = "".join(f"\n  {step}" for step in self.steps)
        return f"Trace of {len(self.steps)} step{'' if len(self.steps) == 1 else 's'}{lines}"

    def note_entry(self, call: BlockCall) -> None:
        """Begin a step."""
        self.open, self.depths, self.reuse = [], [], []
        self.counter = make_counter()
        self.counter.__enter__()
        wait_for(call.x)
        self.start = time.perf_counter()

    def note_standing(
        self, host: str, standing: Standing, samples: Sequence[int] | None = None
    ) -> None:
        """Take in which cells the host chose: the first decision of a step."""
        if host not in self.order:
            self.order = (host, *self.order)
        part = None if samples is None else tuple(samples)
        self.open.append(note_standing(host, standing, part))

    def note_plan(self, stage: str, routing: Routing, plan: ChunkPlan) -> None:
        """Take in a decision."""
        self.open.append(PlanNote(stage, routing, plan))

    def note_part(
        self, stage: str, routing: Routing, plan: ChunkPlan, samples: Sequence[int]
    ) -> None:
        """Take in a decision about some samples."""
        self.open.append(PlanNote(stage, routing, plan, tuple(samples)))

    def note_depth(
        self, stage: str, depth: Int[Tensor, " b"], samples: Sequence[int] | None = None
    ) -> None:
        """Take in how deep samples went."""
        self.depths.append(SampleNote(depth, None if samples is None else tuple(samples)))

    def note_reuse(
        self, stage: str, reused: Bool[Tensor, " b"], samples: Sequence[int] | None = None
    ) -> None:
        """Take in which samples were reused."""
        self.reuse.append(SampleNote(reused, None if samples is None else tuple(samples)))

    def note_exit(self, call: BlockCall) -> None:
        """End a step."""
        wait_for(call.x)
        ms = 1000.0 * (time.perf_counter() - self.start)
        flops = self.leave_counter()
        b = call.x.shape[0]
        reused = join_samples(self.reuse, b, missing=0)
        # from the outermost stage to the innermost, also where an outer one told of it later
        notes = sorted(join_notes(self.open, b), key=lambda note: self.find_place(note.stage))
        grid = notes[0].plan.grid if self.open and self.open[0].of_host else call.grid
        n = math.prod(grid)
        step = TraceStep(
            grid,
            tuple(note.stage for note in notes),
            tuple(note.plan.routing for note in notes),
            tuple(note.plan for note in notes),
            trace_cells(notes, self.order, b, n, call.x.device),
            flops,
            ms,
            join_samples(self.depths, b),
            None if reused is None else reused.bool(),
        )
        self.steps.append(step)
        first = next((seen for seen in call.observers if isinstance(seen, Trace)), self)
        if first is self:  # of several open traces, only one tells the plug-ins
            HOST.manager.hook.adaptok_observe(event=step)

    def find_place(self, stage: str) -> int:
        """Return where a stage stands; one that is not known here comes last."""
        return self.order.index(stage) if stage in self.order else len(self.order)

    def leave_counter(self) -> int:
        """Stop counting, also after a pass that failed, and return what was counted."""
        if self.counter is None:
            return 0
        counter, self.counter = self.counter, None
        counter.__exit__(None, None, None)
        return int(counter.get_total_flops())


class LossCollector(Observer):
    """Sums the auxiliary losses of the calls inside an `adaptok.collect_losses`."""

    wants_losses = True

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}

    def note_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Add losses, unless a backward pass recomputes what was added before."""
        if torch._C._current_graph_task_id() != -1:
            return
        for name, loss in losses.items():
            known = self.losses.get(name)
            self.losses[name] = loss if known is None else known + loss


def wait_for(x: Tensor) -> None:
    """Wait until the device has done its work, so that a clock tells the truth."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def require_adaptive(model: nn.Module) -> AdaptiveBlocks:
    """Return the block list of a wrapped model, or raise a `NotWrappedError`."""
    blocks = find_adaptive(model)
    if blocks is None:
        raise NotWrappedError(
            f"{type(model).__name__} is not wrapped: call adaptok.wrap(model, chunker=...) first"
        )
    return blocks


def require_all(model: nn.Module) -> list[AdaptiveBlocks]:
    """Return the block lists of all wrapped models in a module, or raise a `NotWrappedError`."""
    return list(list_adaptive(model).values()) or [require_adaptive(model)]


@contextmanager
def observe(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Tell an observer what the wrapped models in a module decide inside a `with` block."""
    before = [(blocks, blocks.observers) for blocks in require_all(model)]
    for blocks, observers in before:
        blocks.observers = (*observers, observer)
    try:
        yield
    finally:
        for blocks, observers in before:
            blocks.observers = observers


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Collect what a wrapped model decides in the calls inside a `with` block.

    Args:
        model: a wrapped model.

    Yields:
        The trace; each call adds to `trace.steps` its routings, plans, provenance, kept tokens,
        FLOPs and milliseconds.

    Raises:
        NotWrappedError: the model is not wrapped.
        WrapError: it holds several wrapped models: trace each of them.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> with trace(vit) as seen:
        ...     out = vit(torch.randn(2, 3, 32, 48))
        >>> seen.steps[0].grid, seen.steps[0].kept
        ((4, 6), tensor([12, 12]))
    """
    seen = Trace()
    seen.order = tuple(require_adaptive(model).stage_names)
    with observe(model, seen):
        try:
            yield seen
        finally:
            seen.leave_counter()


@contextmanager
def collect_losses(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Sum the auxiliary losses of the calls of a wrapped model inside a `with` block.

    Args:
        model: a wrapped model, or one that holds several.

    Yields:
        Losses by name, such as `losses["ratio"]`; filled while the block runs.

    Raises:
        NotWrappedError: the model is not wrapped.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> with collect_losses(vit) as losses:
        ...     out = vit(torch.randn(2, 3, 32, 48))
        >>> losses["ratio"].requires_grad
        True
    """
    collector = LossCollector()
    with observe(model, collector):
        yield collector.losses


@contextmanager
def request(model: nn.Module, name: str, branch: str | None = None) -> Iterator[nn.Module]:
    """Say whose step the calls inside a `with` block are, and of which guidance branch.

    Args:
        model: a wrapped model.
        name: any name of the request.
        branch: `"cond"` or `"uncond"` where a pipeline calls the model once per branch; None
            leaves it to the host.

    Yields:
        The model.

    Raises:
        NotWrappedError: the model is not wrapped.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> with request(vit, "picture-1", branch="uncond"):
        ...     out = vit(torch.randn(2, 3, 32, 48))
    """
    before = [(blocks, blocks.request) for blocks in require_all(model)]
    for blocks, _ in before:
        blocks.request = (name, branch)
    try:
        yield model
    finally:
        for blocks, known in before:
            blocks.request = known


@contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """Run a wrapped model without its stages, as the host would run by itself, for a while.

    Args:
        model: a wrapped model.

    Yields:
        The model; calls inside the block compute what the unwrapped model computes.

    Raises:
        NotWrappedError: the model is not wrapped.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit, image = make_vit(), torch.randn(2, 3, 32, 48)
        >>> before = vit(image)
        >>> with plain(adaptok.wrap(vit, chunker="dc", budget=0.5)):
        ...     torch.equal(vit(image), before)
        True
    """
    before = [(blocks, blocks.plain) for blocks in require_all(model)]
    for blocks, _ in before:
        blocks.plain = True
    try:
        yield model
    finally:
        for blocks, known in before:
            blocks.plain = known
