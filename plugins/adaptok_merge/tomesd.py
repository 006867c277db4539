"""ToMe-SD: each block runs on merged tokens, and all tokens are there again behind it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from adaptok import BlockCall, BlockRange, Budget, Effects, Provenance, Routing, Site
from adaptok.budgeted_stage import BudgetedStage
from adaptok.budgets import count_kept
from adaptok.errors import BudgetError, ConfigError, StackError
from adaptok.reductions import ReduceEvent, ReducePlan
from adaptok.tokens import Grid
from adaptok_merge.cells import choose_destinations, count_cells, fit_cells, merge_into, spread
from adaptok_merge.matching import Merge, average, sum_sizes

BLOCKS = 1 << 16  # keys of one seed


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Samples that run together.

    Args:
        samples: which of the batch; None means all.
        count: grid tokens that their blocks run on.
    """

    samples: tuple[int, ...] | None
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """What became of the cells of some samples in one block.

    Args:
        owner: for each cell the token that stood for it.
        alone: the cells whose place a token had.
    """

    owner: Int[Tensor, "b n"]
    alone: Bool[Tensor, "b n"]

    @classmethod
    def of(cls, merge: Merge) -> "Merged":
        """Read it off a merge."""
        alone = torch.zeros_like(merge.owner, dtype=torch.bool).scatter(1, merge.places, True)
        return cls(merge.owner, alone)


class ToMeSD(BudgetedStage):
    """Runs each block on merged tokens, and gives every token the step of the one it is part of.

    One token in each cell of `sy` x `sx` is a destination. Of the others, those whose features are
    most similar to a destination become one with it, by the mean. Behind the block every
    token has moved as far as the one that stood for it. Text and prefix tokens run as always.

    Args:
        ratio: share of the tokens that merge, at most `1 - 1 / (sy sx)`. A budget stands above
            it: `keep` is 1 - ratio, exactly, and where it leaves fewer tokens than there are cells,
            cells grow.
        sy: rows of a cell.
        sx: columns of a cell.
        use_rand: choose another token of each cell in each block; False takes the first.
        seed: of that choice, which is the same for all samples and steps.
        mlp: whether the MLP runs on merged tokens, too; False needs blocks that can be split.

    Raises:
        ConfigError: cells are empty, or `ratio` is more than cells allow.
        BudgetError: (when called) the grid does not divide, and has more cells than `ratio` leaves.
        StackError: (when called) tokens are gone already, or blocks cannot be split and `mlp` is
            False.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=[ToMeSD(ratio=0.5)])
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(torch.randn(2, 3, 32, 48))
        >>> seen.steps[0].kept, len(seen.steps[0].plans[0].events)
        (tensor([12, 12]), 3)

    Paper: Bolya and Hoffman, Token Merging for Fast Stable Diffusion, 2023.
    """

    effects: ClassVar[Effects] = Effects(
        "tokens", changes_count=True, needs_grid=True, compilable=True
    )

    def __init__(
        self,
        ratio: float = 0.5,
        sy: int = 2,
        sx: int = 2,
        use_rand: bool = True,
        seed: int = 0,
        mlp: bool = True,
    ) -> None:
        super().__init__("tomesd")
        if sy < 1 or sx < 1:
            raise ConfigError(f"a cell has at least one row and one column, got {sy} x {sx}")
        most = 1 - 1 / (sy * sx)
        if not 0.0 <= ratio <= most:
            raise ConfigError(
                f"ratio is from 0 to {most:g}, since one token of each cell of {sy} x {sx} stays; "
                f"got {ratio:g}: give larger cells (sy=, sx=) to merge more"
            )
        self.ratio = ratio
        self.sy = sy
        self.sx = sx
        self.use_rand = use_rand
        self.seed = seed
        self.mlp = mlp
        if not mlp:  # so that a wrap makes halves of the blocks
            self.effects = replace(type(self).effects, needs_keys=True)  # type: ignore[misc]

    def describe(self) -> dict[str, str]:
        """Return what merges, and the budget in words."""
        return {
            "stage": repr(self.name),
            "ratio": f"{self.ratio:g}",
            "cells": f"{self.sy}x{self.sx}",
            "budget": self.describe_budget(),
        }

    def waits_for_device(self, budget: Budget) -> bool:
        """Say whether samples have other counts than one exact one."""
        return not (budget.is_natural or budget.is_uniform)

    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run the inner blocks on merged tokens (see `adaptok.Stage.forward`)."""
        if call.cells is not None:
            raise StackError(
                "tomesd needs every grid cell, and a stage around it has taken some away already: "
                "let it run first"
            )
        if not self.mlp and not inner.can_split:
            raise StackError(
                f"mlp=False merges around attention alone, and here that cannot be: {inner.whole}. "
                "Take mlp=True, which merges around whole blocks"
            )
        groups = group_samples(self.count_tokens(call), inner.positions_per_sample, call.num_cells)
        ended, told = [], []
        for group in groups:
            merges: list[Merged] = []
            ended.append(self.run_blocks(inner, choose_samples(call, group.samples), group, merges))
            told.append(merges)
        if call.observers:
            plan = self.make_plan(inner, call, groups, told)
            for observer in call.observers:
                observer.note_plan(self.name, plan.routing, plan)
        return join(call, groups, ended)

    def count_tokens(self, call: BlockCall) -> tuple[int, ...]:
        """Return how many tokens blocks run on, per sample."""
        budget, (b, n) = self.choose_budget(call), (call.x.shape[0], call.num_cells)
        natural = n - math.floor(self.ratio * n + 1e-9)
        if budget.is_uniform:
            return (budget.count(n),) * b
        if budget.is_natural:
            cells = count_cells(call.grid, self.cell_sizes(call.grid))
            if natural < cells:
                raise BudgetError(
                    f"ratio={self.ratio:g} leaves {natural} of {n} tokens, and a grid {call.grid} "
                    f"has {cells} cells of {self.sy} x {self.sx}, each of which keeps one: give "
                    f"ratio={math.floor(1000 * (1 - cells / n)) / 1000:g} or less, or larger cells"
                )
            return (natural,) * b
        kept = count_kept(budget, torch.full((b,), natural), n)
        return tuple(int(count) for count in kept.tolist())

    def cell_sizes(self, grid: Grid) -> tuple[int, ...]:
        """Return the lengths of a cell along all axes; frames do not merge with each other."""
        if len(grid) < 2:
            raise StackError(f"tomesd needs a grid of rows and columns, and this one is {grid}")
        return (*(1,) * (len(grid) - 2), self.sy, self.sx)

    def run_blocks(
        self, inner: BlockRange, call: BlockCall, group: Group, merges: list[Merged]
    ) -> BlockCall:
        """Run all blocks on as many tokens, and note for each block what became of the cells.

        Args:
            inner: the blocks.
            call: the tokens of some samples.
            group: how many to run on.
            merges: where to note it.
        """
        n = call.num_cells
        if group.count >= n:  # nothing merges: no difference, not even by rounding
            cells = torch.arange(n, device=call.x.device).expand(call.x.shape[0], n)
            merges += [Merged(cells, torch.ones_like(cells, dtype=torch.bool))] * (
                inner.last - inner.first
            )
            return inner(call)
        sizes = fit_cells(call.grid, self.cell_sizes(call.grid), group.count)
        for block in range(inner.first, inner.last):
            key = self.seed * BLOCKS + block if self.use_rand else None
            destinations = choose_destinations(call.grid, sizes, key, call.x.device)
            merge = merge_into(call.cell_x, destinations, group.count)
            merges.append(Merged.of(merge))
            call = self.run_merged(inner, call, block, merge)
        return call

    def run_merged(self, inner: BlockRange, call: BlockCall, block: int, merge: Merge) -> BlockCall:
        """Run one block, or its attention alone, on merged tokens."""
        ones = torch.ones_like(merge.owner, dtype=torch.float32)
        summed = sum_sizes(ones, merge.owner, merge.places.shape[1])
        merged = average(call.x, ones, summed, merge, call.start)
        short = call.take(merge.places, merged)
        if self.mlp:
            after = inner.run(short, block, block + 1)
        else:
            after = inner.split().attend(block, short).call
        x = spread(call.cell_x, after.cell_x - merged, merge.owner)
        call = call.put(x, after.rest_x, after.streams)
        return call if self.mlp else inner.split().finish(block, call)

    def make_plan(
        self,
        inner: BlockRange,
        call: BlockCall,
        groups: Sequence[Group],
        told: Sequence[Sequence[Merged]],
    ) -> ReducePlan:
        """Return what was decided: one event per block; the plan itself is that of the last."""
        b = call.x.shape[0]
        counts = [0] * b
        for group in groups:
            for sample in group.samples or range(b):
                counts[sample] = group.count
        order = [sample for group in groups for sample in group.samples or range(b)]
        back = torch.tensor(order, device=call.x.device).argsort()
        steps = list(zip(*told, strict=True))
        owners = [torch.cat([merge.owner for merge in same])[back] for same in steps]
        alone = [torch.cat([merge.alone for merge in same])[back] for same in steps]
        share = torch.stack(alone).float().mean(0)
        cells = (~alone[-1]).int().argsort(dim=1, stable=True)[:, : max(counts)]
        lengths = torch.tensor(counts, device=cells.device)[:, None]
        behind = torch.arange(cells.shape[1], device=cells.device) >= lengths
        return ReducePlan(
            grid=call.grid,
            layout="fixed",
            routing=Routing(share, alone[-1], alone[-1], threshold=None),
            keep_mask=alone[-1],
            cells=cells.masked_fill(behind, -1),
            provenance=Provenance(owners[-1]),
            lengths=tuple(counts),
            events=tuple(
                ReduceEvent(self.name, Site(block, "before"), owner, tuple(counts))
                for block, owner in zip(range(inner.first, inner.last), owners, strict=True)
            ),
        )


def group_samples(counts: tuple[int, ...], per_sample: bool, n: int) -> list[Group]:
    """Return which samples run together: those with as many tokens.

    Where the host's positions have no batch axis, samples with merged tokens run one by one.
    """
    together = per_sample or len(counts) == 1 or counts[0] >= n
    if together and all(count == counts[0] for count in counts):
        return [Group(None, counts[0])]
    if not per_sample:
        return [Group((sample,), count) for sample, count in enumerate(counts)]
    by_count: dict[int, list[int]] = {}
    for sample, count in enumerate(counts):
        by_count.setdefault(count, []).append(sample)
    return [Group(tuple(samples), count) for count, samples in by_count.items()]


def choose_samples(call: BlockCall, samples: tuple[int, ...] | None) -> BlockCall:
    """Return the call of some samples, with all their tokens."""
    if samples is None:
        return call
    n = call.num_cells
    cells = torch.arange(n, device=call.x.device).expand(len(samples), n)
    return call.take(cells, None, torch.tensor(samples, device=call.x.device))


def join(call: BlockCall, groups: Sequence[Group], ended: Sequence[BlockCall]) -> BlockCall:
    """Put groups of samples into one call again."""
    if len(ended) == 1:
        (end,) = ended
        return call.put(end.cell_x, end.rest_x, end.streams)
    order = [sample for group in groups for sample in group.samples or ()]
    back = torch.tensor(order, device=call.x.device).argsort()
    streams: dict[str, Tensor | None] = {}
    for name in ended[0].streams:
        found = [stream for end in ended if (stream := end.streams[name]) is not None]
        streams[name] = torch.cat(found)[back] if found else None
    x = torch.cat([end.cell_x for end in ended])[back]
    return call.put(x, torch.cat([end.rest_x for end in ended])[back], streams)
