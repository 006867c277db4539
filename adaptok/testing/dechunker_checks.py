"""Checks of dechunkers."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from adaptok.budgets import Budget
from adaptok.chunk_stage import ChunkStage
from adaptok.chunking import Chunker, ChunkPlan, Dechunker, Provenance
from adaptok.registry import Kind
from adaptok.routing import Router
from adaptok.stages import Stage
from adaptok.testing.cases import (
    GRID,
    HALF,
    ODD_GRIDS,
    ROUNDING,
    Answer,
    PartCase,
    PartMaker,
    PartSpec,
    make_routing,
    make_tokens,
    require_close,
    require_restored,
)
from adaptok.testing.host_checks import HOST_CHECKS, check_prefix
from adaptok.testing.models import WIDTH
from adaptok.testing.module_checks import MODULE_CHECKS
from adaptok.testing.report import NotRun, Report, require, run_checks
from adaptok.testing.router_checks import require_gradients
from adaptok.tokens import Tokens

DENSE = {"name": "dc", "layout": "fixed"}
PACKED = {"name": "dc", "layout": "packed"}


class DechunkerCase(PartCase):
    """A dechunker that is checked (see `PartCase`).

    Args:
        part: the dechunker.
        width: features of a token.
        chunker: the chunker beside it; None tries dense and packed tokens of DC-DiT's.
    """

    kind: ClassVar[Kind] = "dechunker"

    def __init__(self, part: PartSpec, width: int = WIDTH, chunker: PartSpec | None = None) -> None:
        super().__init__(part, width)
        wanted: tuple[PartSpec, ...] = (DENSE, PACKED) if chunker is None else (chunker,)
        made = [PartMaker("chunker", spec, self.facts).make() for spec in wanted]
        self.chunkers = [module for module in made if isinstance(module, Chunker)]

    def answer(self, part: nn.Module, tokens: Tokens, budget: Budget = HALF) -> Answer:
        """Return the cells after blocks that change each token by itself."""
        chunks, plan = self.chunkers[0](tokens, make_routing(tokens), budget)
        return (part(change_tokens(chunks), plan, tokens).x,)

    def stage(self, part: nn.Module) -> Stage:
        """Return a stage that has no weights but the dechunker's."""
        router = PartMaker("router", "predictability", self.facts).make()
        assert isinstance(router, Router)
        assert isinstance(part, Dechunker)
        return ChunkStage(router, self.chunkers[0], part, "dc")

    def chunk(self, tokens: Tokens, *exact: Budget) -> Iterator[tuple[str, Tokens, ChunkPlan]]:
        """Give tokens chunked in every way, and that way in words."""
        for chunker in self.chunkers:
            budgets = exact or (HALF, Budget(tokens=1), Budget(keep=1.0))
            layout = getattr(chunker, "layout", "fixed")
            if layout != "fixed" and not exact:
                budgets = (*budgets, Budget(), Budget(tokens=[24, 1, 7]))
            for budget in budgets:
                with torch.no_grad():
                    chunks, plan = chunker(tokens, make_routing(tokens), budget)
                shape = "packed" if chunks.is_packed else "dense"
                yield f"{budget.describe()}, {shape} tokens", chunks, plan


def change_tokens(chunks: Tokens) -> Tokens:
    """Stand for blocks: change each token by itself."""
    return chunks.with_x(chunks.x + torch.tanh(chunks.x) + 0.3)


def change_first(chunks: Tokens) -> Tokens:
    """Change the first token of each sample."""
    change = torch.zeros_like(chunks.x)
    if chunks.ptr is None:
        change[:, 0] = 1.0
    else:
        change[chunks.ptr[:-1]] = 1.0
    return chunks.with_x(chunks.x + change)


def change_others(chunks: Tokens, sample: int) -> Tokens:
    """Change every token of a batch but those of one sample."""
    change = torch.ones_like(chunks.x)
    if chunks.ptr is None:
        change[sample] = 0.0
    else:
        change[chunks.ptr[sample] : chunks.ptr[sample + 1]] = 0.0
    return chunks.with_x(chunks.x + change)


def check_answer(case: DechunkerCase) -> None:
    """It answers with one finite token per cell, from dense and from packed tokens."""
    part = case.make_filled()
    tokens = make_tokens(width=case.width)
    for said, chunks, plan in case.chunk(tokens):
        with torch.no_grad():
            after = part(change_tokens(chunks), plan, tokens)
        require(
            isinstance(after, Tokens) and not after.is_packed,
            f"{said}: dense adaptok.Tokens are needed, got {type(after).__name__}",
        )
        shape, needed = tuple(after.x.shape), tuple(tokens.x.shape)
        require(shape == needed, f"{said}: it answered with the shape {shape}, not {needed}")
        require(bool(after.x.isfinite().all()), f"{said}: the answer is not finite")


def check_packed(case: DechunkerCase) -> None:
    """The same kept cells give the same answer from dense and from packed tokens."""
    if len(case.chunkers) == 1:
        raise NotRun("a chunker of its own was given")
    part = case.make_filled()
    tokens = make_tokens(width=case.width)
    answers = []
    for _, chunks, plan in case.chunk(tokens, HALF):
        with torch.no_grad():
            answers.append(part(change_tokens(chunks), plan, tokens).x)
    dense, packed = answers
    require_close((packed,), (dense,), ROUNDING, "packed tokens give another answer than dense")


def check_round_trip(case: DechunkerCase) -> None:
    """A fresh one gives back what came if the blocks change nothing, at least in kept cells."""
    part = case.make()
    restores = getattr(part, "restores", "all")
    if restores == "nothing":
        raise NotRun('restores = "nothing"')
    tokens = make_tokens(width=case.width)
    for said, chunks, plan in case.chunk(tokens):
        with torch.no_grad():
            found = part(chunks, plan, tokens).x
        require_restored(found, tokens, plan, restores, f"with {said}")


def check_kept(case: DechunkerCase) -> None:
    """What the blocks made of a token arrives in its own cell."""
    part = case.make()
    tokens = make_tokens(width=case.width)
    for said, chunks, plan in case.chunk(tokens):
        with torch.no_grad():
            base = part(chunks, plan, tokens).x
            moved = part(change_first(chunks), plan, tokens).x
        reached = (moved - base).abs().amax(-1) > 1e-3
        first = plan.keep_mask.int().argmax(1)  # cell of the first token, for cells in order
        if plan.ptr is None:
            first = plan.cells[:, 0]
        require(
            bool(reached.gather(1, first[:, None]).all()),
            f"{said}: the cell of a kept token does not react to what the blocks made of it",
        )


def check_extremes(case: DechunkerCase) -> None:
    """Grids of every shape work with every cell kept, and with one token."""
    part = case.make_filled()
    for grid in (*ODD_GRIDS, GRID):
        tokens = make_tokens(grid, width=case.width)
        for said, chunks, plan in case.chunk(tokens, Budget(keep=1.0), Budget(tokens=1)):
            with torch.no_grad():
                x = part(change_tokens(chunks), plan, tokens).x
            require(
                x.shape == tokens.x.shape and bool(x.isfinite().all()),
                f"on a grid {grid}, {said}: no finite token per cell",
            )


def check_pruned(case: DechunkerCase) -> None:
    """Cells that no token stands for (-1 in the plan) get finite features, of their own sample."""
    part = case.make_filled()
    tokens = make_tokens(width=case.width)
    for said, chunks, plan in case.chunk(tokens, HALF):
        token = torch.where(plan.keep_mask, plan.provenance.token, -1)
        pruned = replace(plan, provenance=Provenance(token))
        changed = change_tokens(chunks)
        with torch.no_grad():
            x = part(changed, pruned, tokens).x
        require(
            x.shape == tokens.x.shape and bool(x.isfinite().all()),
            f"{said}: cells without a token make the answer wrong",
        )
        for sample in range(tokens.num_samples):
            with torch.no_grad():
                other = part(change_others(changed, sample), pruned, tokens).x
            moved = (other - x)[sample][~plan.keep_mask[sample]].abs().amax(-1)
            wrong = int((moved > ROUNDING * float(x.abs().max())).sum())
            require(
                not wrong,
                f"{said}: {wrong} of {moved.numel()} cells of sample {sample} that no token stands "
                "for change with the tokens of other samples: -1 in plan.sources is no row, and "
                "as an index it reads the last one of the batch; adaptok.chunking.spread_tokens "
                "puts zeros there",
            )


def check_gradient(case: DechunkerCase) -> None:
    """In training, a gradient reaches the tokens of the blocks, and its own weights."""
    part = case.make_filled().train()
    tokens = make_tokens(width=case.width)
    chunks, plan = case.chunkers[0](tokens, make_routing(tokens), HALF)
    h = change_tokens(chunks).x.detach().requires_grad_()
    (part(chunks.with_x(h), plan, tokens).x ** 2).sum().backward()
    require(
        h.grad is not None and bool((h.grad.abs().amax(-1) > 0).all()),
        "no gradient reaches a token of the blocks",
    )
    if case.has_weights(part):
        require_gradients(part)


DECHUNKER_CHECKS = (
    check_answer,
    check_packed,
    check_round_trip,
    check_kept,
    check_extremes,
    check_pruned,
    check_gradient,
    check_prefix,
    *MODULE_CHECKS,
    *HOST_CHECKS,
)


def check_dechunker(
    part: PartSpec,
    *,
    chunker: PartSpec | None = None,
    width: int = WIDTH,
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Check whether a dechunker does what `adaptok.wrap` and its user rely on.

    Args:
        part: a registered name, a mapping with options, a class, a function that makes a
            dechunker, or an instance, of which copies are checked. A parameter called `width` is
            filled. A class attribute `restores = "kept"` says that only kept cells come back
            where blocks change nothing, `"nothing"` that none does.
        chunker: the chunker beside it; None tries dense and packed tokens.
        width: features of a token, where an instance has weights of another width.
        skip: names of checks that are not run, and why.
        only: names of the only checks to run.

    Returns:
        The report; print it, or `report.raise_failed()`.

    Raises:
        ConfigError: the part is no dechunker, or there is no check of a name.
        UnknownNameError: there is no dechunker of that name.

    Example:
        >>> check_dechunker("dc", only=["answer", "round_trip"]).failed
        ()
    """
    case = DechunkerCase(part, width, chunker)
    return run_checks(case.title, DECHUNKER_CHECKS, case, skip, only)
