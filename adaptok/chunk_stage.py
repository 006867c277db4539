"""The stage that runs blocks on fewer tokens: route, chunk, run, dechunk."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

from adaptok.budgeted_stage import BudgetedStage
from adaptok.budgets import Budget
from adaptok.calls import BlockCall, merge_samples
from adaptok.chunking import Chunker, ChunkPlan, Dechunker
from adaptok.errors import RoutingError, ShapeError, StackError
from adaptok.packed_run import run_packed
from adaptok.regions import Regional, mark_dynamic
from adaptok.routing import Context, Router, Routing
from adaptok.stages import BlockRange, Effects
from adaptok.tokens import Tokens


class ChunkStage(Regional, BudgetedStage):
    """Routes the cells, keeps few of them, runs the blocks on those, and gives all cells back.

    Args:
        router: says how much each cell deserves a token.
        chunker: turns all cells into few tokens.
        dechunker: turns few tokens into all cells again.
        name: what the chunker is called.

    Raises:
        BudgetError: (when called) the budget does not fit the batch.
        RoutingError: (when called) the router's answer is no routing of these cells.

    Example:
        >>> from adaptok.dc.host import HostChunker, HostDechunker, HostRouter
        >>> stage = ChunkStage(HostRouter(64), HostChunker(), HostDechunker(64), "dc")
        >>> stage.take_budget(Budget(keep=0.5), None)
        >>> call = BlockCall(torch.randn(2, 17, 64), grid=(4, 4), start=1)
        >>> def run(call, first, last):
        ...     print(call.x.shape)
        ...     return call
        >>> stage(BlockRange(run, 0, 2), call).x.shape
        torch.Size([2, 9, 64])
        torch.Size([2, 17, 64])
    """

    effects: ClassVar[Effects] = Effects(
        "tokens", changes_count=True, needs_grid=True, compilable=True
    )
    # The chunker, between the two regions, waits for the counts unless the budget tells them.
    regions = ("route", "restore")

    def __init__(
        self, router: Router, chunker: Chunker, dechunker: Dechunker, name: str = "chunker"
    ) -> None:
        super().__init__(name)
        self.router = router
        self.chunker = chunker
        self.dechunker = dechunker

    def describe(self) -> dict[str, str]:
        """Return chunker, router, layout and budget in words."""
        shown = {"chunker": repr(self.name), "router": type(self.router).__name__}
        layout = getattr(self.chunker, "layout", None)
        if layout is not None:
            shown["layout"] = repr(layout)
        shown["budget"] = self.describe_budget()
        return shown

    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run the inner blocks on the kept tokens (see `Stage.forward`)."""
        if call.cells is not None:
            raise StackError(
                f"the chunker {self.name!r} needs every grid cell, and a stage around it has taken "
                "some away already: let it run first"
            )
        before = call.tokens
        routing = self.region("route")(before, call.context)
        check_routing(routing, before, self.router)
        chunks, plan = self.chunker(before, routing, self.choose_budget(call))
        for observer in call.observers:
            observer.note_plan(self.name, routing, plan)
            if observer.wants_losses:
                observer.note_losses(self.chunker.losses(plan.routing))
        x, short = run_chunks(inner, call, chunks, plan)
        if chunks.is_packed:
            mark_dynamic(x, 0)
        after = self.region("restore")(chunks.with_x(x), plan, before)
        return call.put(after.x, *short)

    def route(self, before: Tokens, context: Context) -> Routing:
        """Judge the cells."""
        routing: Routing = self.router(before, context)
        return routing

    def restore(self, chunks: Tokens, plan: ChunkPlan, before: Tokens) -> Tokens:
        """Give all cells their features again."""
        after: Tokens = self.dechunker(chunks, plan, before)
        return after

    def waits_for_device(self, budget: Budget) -> bool:
        """Ask the chunker (see `BudgetedStage.waits_for_device`)."""
        return self.chunker.waits_for_device(budget)


def check_routing(routing: object, tokens: Tokens, router: Router) -> None:
    """Raise a `RoutingError` unless a router answered with one finite probability per cell."""
    name = type(router).__name__
    if not isinstance(routing, Routing):
        raise RoutingError(
            f"{name} answered with a {type(routing).__name__}: an adaptok.Routing is needed, "
            "Routing(keep_prob) is enough"
        )
    shape = tuple(tokens.x.shape[:2])
    if tuple(routing.keep_prob.shape) != shape:
        raise RoutingError(
            f"{name} gave probabilities of the shape {tuple(routing.keep_prob.shape)} for cells of "
            f"the shape {shape}: one per cell is needed"
        )
    learns = any(parameter.requires_grad for parameter in router.parameters())
    if torch.is_grad_enabled() and router.training and learns:
        check_gradient(routing, name)
    if torch.compiler.is_compiling() or routing.keep_prob.device.type != "cpu":
        return  # looking would cut the graph, or wait for the device
    if not bool(routing.keep_prob.detach().isfinite().all()):
        cause = "the tokens hold NaN already" if not bool(tokens.x.isfinite().all()) else name
        raise RoutingError(f"{name} gave a keep probability that is no number; cause: {cause}")


def check_gradient(routing: Routing, name: str) -> None:
    """Raise a `RoutingError` unless the keep probability can train its router."""
    if not routing.keep_prob.requires_grad:
        raise RoutingError(
            f"{name} has weights to train, and its keep probability has no gradient: do not "
            "detach or round it, or freeze the router with requires_grad_(False)"
        )


def run_chunks(
    inner: BlockRange, call: BlockCall, chunks: Tokens, plan: ChunkPlan
) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor | None]]]:
    """Run blocks on chunks, dense or in groups of samples that have as many.

    Args:
        inner: the blocks.
        call: the call with all cells.
        chunks: the short tokens, dense `(b m d)` or packed `(t d)`.
        plan: what the chunker returned.

    Returns:
        The features of the chunks in their own shape, and what came of the other tokens and the
        streams.
    """
    if not chunks.is_packed and runs_together(inner, plan.cells, call.num_cells):
        after = inner(call.take(plan.cells, chunks.x))  # a batch of any size is one graph
        return after.cell_x, (after.rest_x, dict(after.streams))
    if not chunks.is_packed:
        groups = split_by_cells(plan.cells)
        parts = []
        for samples in groups:
            index = select(samples, call)
            cells, x = plan.cells, chunks.x
            if index is not None:
                cells, x = cells.index_select(0, index), x.index_select(0, index)
            parts.append(inner(call.take(cells, x, index)))
        order = [sample for group in groups for sample in group]
        x = parts[0].cell_x if len(parts) == 1 else torch.cat([part.cell_x for part in parts])
        if order != sorted(order):
            x = x.index_select(0, torch.tensor(order, device=x.device).argsort())
        return x, merge_samples(parts, groups)
    if plan.lengths is None or plan.ptr is None:
        raise ShapeError("a chunker that returns packed tokens needs lengths and ptr in its plan")
    if plan.layout == "packed":
        if inner.forms is None:
            raise StackError(
                'layout "packed" needs packed forms of the blocks, and none are left here: another '
                'stage stands before them, or they were replaced after the wrap. Use "bucketed"'
            )
        return run_packed(inner.forms, call, chunks, plan, inner.run_forms)
    return run_groups(inner, call, chunks, plan)


def run_groups(
    inner: BlockRange, call: BlockCall, chunks: Tokens, plan: ChunkPlan
) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor | None]]]:
    """Run packed chunks in groups of samples that have as many (see `run_chunks`)."""
    lengths, ptr = plan.lengths, plan.ptr
    assert lengths is not None
    assert ptr is not None
    by_length: dict[int, list[int]] = {}
    for sample, length in enumerate(lengths):
        by_length.setdefault(length, []).append(sample)
    groups: list[list[int]] = []
    for length, samples in by_length.items():
        if inner.positions_per_sample or length == call.num_cells:
            groups.append(samples)
        else:
            groups.extend([sample] for sample in samples)
    parts, rows = [], []
    for samples in groups:
        m = lengths[samples[0]]
        if len(groups) == 1:
            cells, x = plan.cells.view(-1, m), rearrange(chunks.x, "(b m) d -> b m d", m=m)
            parts.append(inner(call.take(cells, x)))
            continue
        index = torch.tensor(samples, device=ptr.device)
        places = (ptr[index][:, None] + torch.arange(m, device=ptr.device)).flatten()
        x = rearrange(chunks.x.index_select(0, places), "(b m) d -> b m d", m=m)
        cells = plan.cells.index_select(0, places).view(-1, m)
        parts.append(inner(call.take(cells, x, index)))
        rows.append(places)
    flat = [rearrange(part.cell_x, "b m d -> (b m) d") for part in parts]
    if len(parts) == 1:
        return flat[0], merge_samples(parts, groups)
    back = torch.cat(rows).argsort()
    return torch.cat(flat).index_select(0, back), merge_samples(parts, groups)


def runs_together(inner: BlockRange, cells: Tensor, num_cells: int) -> bool:
    """Say whether samples that keep the same count are one batch for the host's blocks."""
    b, m = cells.shape
    return inner.positions_per_sample or b == 1 or m == num_cells


def split_by_cells(cells: Tensor) -> Sequence[Sequence[int]]:
    """Return which samples run together where positions have no batch axis: those of equal cells.

    A graph runs each sample by itself, since it cannot look.
    """
    if torch.compiler.is_compiling():
        return [[sample] for sample in range(cells.shape[0])]
    by_cells: dict[tuple[int, ...], list[int]] = {}
    for sample, kept in enumerate(cells.tolist()):
        by_cells.setdefault(tuple(kept), []).append(sample)
    return list(by_cells.values())


def select(samples: Sequence[int], call: BlockCall) -> Int[Tensor, " s"] | None:
    """Return an index of some samples, or None if they are all samples in order."""
    if list(samples) == list(range(call.x.shape[0])):
        return None
    return torch.tensor(list(samples), device=call.x.device)
