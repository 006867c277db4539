"""The loop of token reduction: blocks, and what stages decide at the sites between them.

Stages that stand next to each other in a stack share one loop, so that one of them can merge at
every block while another one prunes at three.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from adaptok.calls import BlockCall
from adaptok.reductions import Moment, ReduceEvent, Reduction, Site, Where, check_reduction
from adaptok.split_run import Attended
from adaptok.stages import BlockRange

Counts = tuple[tuple[int, ...], ...] | None  # per sample one count for each site; None: natural


class Reducer(Protocol):
    """What the loop needs of a stage (see `reduce_stage.ReduceStage`)."""

    name: str
    reads_keys: ClassVar[bool]
    reads_class_attention: ClassVar[bool]
    drops: bool

    def biases_keys(self, sites: Sequence[Site], block: int) -> bool:
        """Say whether attention of a block gets a bias, which needs its halves."""

    def reduce(self, moment: Moment) -> Reduction | None:
        """Decide at a site."""

    def bias_keys(self, moment: Moment) -> Float[Tensor, "b m"] | None:
        """Return what is added to the logits of each grid token as a key."""


@dataclass(frozen=True, slots=True)
class Act:
    """One act of the loop: blocks, one half of a block, or a decision.

    Args:
        kind: what is done.
        first: the block, or the first of several.
        last: the block behind the last one.
        reducer: who decides.
        site: where.
        step: which of its sites that is.
    """

    kind: str
    first: int
    last: int
    reducer: int = -1
    site: Site | None = None
    step: int = -1


@dataclass(frozen=True, slots=True, eq=False)
class Reduced:
    """How far a group of samples has come.

    Args:
        call: the tokens that are left.
        owner: for each cell that came the grid token that stands for it, -1 for none.
        sizes: how many cells each grid token stands for.
        left: which of the cells that came each grid token has the place of.
        numbers: which samples of the batch these are.
        lost: last features of the cells that no token stands for, where a stage drops cells.
        gone: how many blocks each cell's own token was there for, where somebody looks on.
        attended: what the attention of the current block gave beside tokens.
        marks: by reducer, notes on tokens.
        events: what happened.
    """

    call: BlockCall
    owner: Int[Tensor, "b n"]
    sizes: Float[Tensor, "b m"]
    left: Int[Tensor, "b m"]
    numbers: tuple[int, ...]
    lost: Float[Tensor, "b n d"] | None = None
    gone: Int[Tensor, "b n"] | None = None
    keys: Float[Tensor, "b key_heads m e"] | None = None
    class_attention: Float[Tensor, "b heads m"] | None = None
    marks: tuple[Mapping[str, Shaped[Tensor, "b m ..."]], ...] = ()
    events: tuple[ReduceEvent, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ReduceRun:
    """The reducers of one loop, and what each of them is to do.

    Args:
        reducers: who decides; at the same site in this order.
        inner: the blocks.
        sites: of each reducer.
        counts: of each reducer.
    """

    reducers: tuple[Reducer, ...]
    inner: BlockRange
    sites: tuple[tuple[Site, ...], ...]
    counts: tuple[Counts, ...]

    def list_acts(self) -> list[Act]:
        """Return what is done, in order."""
        acts: list[Act] = []
        for block in range(self.inner.first, self.inner.last):
            acts += self.list_decisions(block, "before")
            between = self.list_decisions(block, "between")
            biased = any(
                reducer.biases_keys(sites, block)
                for reducer, sites in zip(self.reducers, self.sites, strict=True)
            )
            if between or (biased and self.inner.can_split):
                acts += [Act("attend", block, block + 1), *between, Act("finish", block, block + 1)]
            elif acts and acts[-1].kind == "blocks":
                acts[-1] = replace(acts[-1], last=block + 1)
            else:
                acts.append(Act("blocks", block, block + 1))
        return acts

    def list_decisions(self, block: int, where: Where) -> list[Act]:
        """Return who decides at a site."""
        return [
            Act("reduce", block, block + 1, number, site, step)
            for number, sites in enumerate(self.sites)
            for step, site in enumerate(sites)
            if site.block == block and site.where == where
        ]

    def run(self, call: BlockCall, watched: bool) -> list[Reduced]:
        """Run all of it on a batch.

        Args:
            call: the tokens.
            watched: whether events are wanted.

        Returns:
            One group of samples, or several whose counts differ.
        """
        b, n = call.x.shape[0], call.num_cells
        cells = torch.arange(n, device=call.x.device).expand(b, n)
        start = Reduced(
            call,
            cells,
            torch.ones(b, n, device=call.x.device),
            cells,
            tuple(range(b)),
            gone=torch.full_like(cells, self.inner.last - self.inner.first) if watched else None,
            marks=tuple({} for _ in self.reducers),
        )
        return self.walk(start, self.list_acts())

    def walk(self, state: Reduced, acts: Sequence[Act]) -> list[Reduced]:
        """Do some acts, in groups from where counts differ."""
        for number, act in enumerate(acts):
            if act.kind == "blocks":
                call = self.inner.run(state.call, act.first, act.last)
                state = replace(state, call=call)
            elif act.kind == "attend":
                state = self.attend(state, act.first)
            elif act.kind == "finish":
                call = self.inner.split().finish(act.first, state.call)
                state = replace(state, call=call, keys=None, class_attention=None)
            else:
                groups = self.decide(state, act)
                if len(groups) > 1:
                    return [end for group in groups for end in self.walk(group, acts[number + 1 :])]
                (state,) = groups
        return [state]

    def attend(self, state: Reduced, block: int) -> Reduced:
        """Run the attention of a block."""
        here = [self.reducers[act.reducer] for act in self.list_decisions(block, "between")]
        attended = self.inner.split().attend(
            block,
            state.call,
            key_bias=self.sum_biases(state, block),
            keys=any(reducer.reads_keys for reducer in here),
            class_attention=any(reducer.reads_class_attention for reducer in here),
        )
        return take_in(state, attended)

    def sum_biases(self, state: Reduced, block: int) -> Float[Tensor, "b s"] | None:
        """Return what is added to the logits of each token as a key."""
        total: Tensor | None = None
        for number, reducer in enumerate(self.reducers):
            if reducer.biases_keys(self.sites[number], block):
                moment = self.show(state, Act("attend", block, block + 1, number))
                bias = reducer.bias_keys(moment)
                if bias is not None:
                    total = bias if total is None else total + bias
        if total is None:
            return None
        call = state.call
        behind = call.x.shape[1] - call.start - call.num_cells
        return F.pad(total, (call.start, behind)) if call.start or behind else total

    def show(self, state: Reduced, act: Act) -> Moment:
        """Return what a reducer sees."""
        return Moment(
            act.site or Site(act.first, "before"),
            act.step,
            len(self.sites[act.reducer]),
            state.call,
            state.sizes,
            state.owner,
            self.count_left(state, act),
            state.keys,
            state.class_attention,
            state.marks[act.reducer],
        )

    def count_left(self, state: Reduced, act: Act) -> tuple[int, ...] | None:
        """Return how many tokens the budget leaves behind a site, per sample."""
        counts = self.counts[act.reducer]
        if counts is None or act.step < 0:
            return None
        m = state.call.num_cells
        left = []
        for sample in state.numbers:
            before = counts[sample][act.step - 1] if act.step else state.owner.shape[1]
            after = counts[sample][act.step]
            if m != before:  # another stage took some away, too: the same share of the rest
                after = min(m, max(1, (2 * m * after + before) // (2 * before)))
            left.append(after)
        return tuple(left)

    def decide(self, state: Reduced, act: Act) -> list[Reduced]:
        """Let a reducer decide, and return the groups of samples that have as many tokens."""
        reducer = self.reducers[act.reducer]
        moment = self.show(state, act)
        reduction = reducer.reduce(moment)
        assert act.site is not None
        lived = act.site.block - self.inner.first
        if reduction is None:
            return [note_event(state, reducer.name, act.site, lived)]
        check_reduction(reduction, moment, reducer.name, reducer.drops)
        if reducer.drops:
            state = keep_lost(state, reduction)
        here = self.list_decisions(act.first, act.site.where)
        if act == here[-1]:  # nobody reads them after this one
            state = replace(state, keys=None, class_attention=None)
        groups = group_samples(reduction, self.inner.positions_per_sample)
        ended = [apply_reduction(state, reduction, group, act.reducer) for group in groups]
        return [note_event(end, reducer.name, act.site, lived) for end in ended]


def take_in(state: Reduced, attended: Attended) -> Reduced:
    """Return a state behind attention, with what it gave of the grid tokens."""
    call = attended.call
    rows = slice(call.start, call.start + call.num_cells)
    keys, seen = attended.keys, attended.class_attention
    return replace(
        state,
        call=call,
        keys=None if keys is None else keys[:, :, rows],
        class_attention=None if seen is None else seen[:, :, rows],
    )


def keep_lost(state: Reduced, reduction: Reduction) -> Reduced:
    """Remember the features of the cells that nobody stands for any more."""
    owner, x = state.owner, state.call.cell_x
    alive = owner >= 0
    new = torch.where(alive, reduction.owner.gather(1, owner.clamp(min=0)), owner)
    now = x.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    lost = torch.zeros_like(now) if state.lost is None else state.lost
    return replace(state, lost=torch.where((alive & (new < 0))[..., None], now, lost))


def group_samples(reduction: Reduction, per_sample: bool) -> list[tuple[int, ...]]:
    """Return which samples go on together: those with as many tokens.

    Where the host's positions have no batch axis, only samples whose tokens stand at the same
    places go on together.
    """
    b = reduction.places.shape[0]
    if reduction.lengths is None and (per_sample or b == 1):
        return [tuple(range(b))]
    lengths = reduction.lengths or (reduction.places.shape[1],) * b
    if per_sample or b == 1:
        by_length: dict[int, list[int]] = {}
        for sample, length in enumerate(lengths):
            by_length.setdefault(length, []).append(sample)
        return [tuple(group) for group in by_length.values()]
    if torch.compiler.is_compiling():
        return [(sample,) for sample in range(b)]
    by_places: dict[tuple[int, ...], list[int]] = {}
    for sample, places in enumerate(reduction.places.tolist()):
        by_places.setdefault(tuple(places[: lengths[sample]]), []).append(sample)
    return [tuple(group) for group in by_places.values()]


def apply_reduction(
    state: Reduced, reduction: Reduction, group: tuple[int, ...], number: int
) -> Reduced:
    """Return the state of some samples with the tokens that a reduction leaves."""
    whole = len(group) == reduction.places.shape[0]
    index = None if whole else torch.tensor(group, device=reduction.places.device)

    def choose(value: Tensor) -> Tensor:
        return value if index is None else value.index_select(0, index)

    length = reduction.lengths[group[0]] if reduction.lengths else reduction.places.shape[1]
    places = choose(reduction.places)[:, :length]
    x = None if reduction.x is None else choose(reduction.x)[:, :length]
    owner, old, sizes = choose(reduction.owner), choose(state.owner), choose(state.sizes)
    # tokens that nobody stands for are counted in one more place, which is cut off
    slot = torch.where(owner < 0, length, owner)
    summed = sizes.new_zeros(sizes.shape[0], length + 1).scatter_add(1, slot, sizes)[:, :length]
    marks = []
    for holder, noted in enumerate(state.marks):
        kept = {name: take_marks(choose(value), places) for name, value in noted.items()}
        if holder == number:
            new = reduction.marks.items()
            kept |= {name: choose(value)[:, :length] for name, value in new}
        marks.append(kept)
    keys, seen = state.keys, state.class_attention
    if keys is not None:
        keys = take_columns(choose(keys), places)
    if seen is not None:
        seen = choose(seen).gather(2, places[:, None].expand(-1, seen.shape[1], -1))
    lost, gone = state.lost, state.gone
    return Reduced(
        state.call.take(places, x, index),
        torch.where(old < 0, old, owner.gather(1, old.clamp(min=0))),
        summed,
        choose(state.left).gather(1, places),
        tuple(state.numbers[sample] for sample in group),
        None if lost is None else choose(lost),
        None if gone is None else choose(gone),
        keys,
        seen,
        tuple(marks),
        tuple(choose_event(event, group, index) for event in state.events),
    )


def take_marks(value: Shaped[Tensor, "b m ..."], places: Int[Tensor, "b k"]) -> Tensor:
    """Return the notes on some tokens."""
    index = places.view(*places.shape, *[1] * (value.ndim - 2))
    return value.gather(1, index.expand(*places.shape, *value.shape[2:]))


def take_columns(keys: Float[Tensor, "b heads m e"], places: Int[Tensor, "b k"]) -> Tensor:
    """Return the keys of some tokens."""
    b, heads, _, e = keys.shape
    return keys.gather(2, places[:, None, :, None].expand(b, heads, -1, e))


def choose_event(event: ReduceEvent, group: tuple[int, ...], index: Tensor | None) -> ReduceEvent:
    """Return what an event was for some samples."""
    if index is None:
        return event
    owner = event.owner.index_select(0, index)
    return replace(event, owner=owner, counts=tuple(event.counts[sample] for sample in group))


def note_event(state: Reduced, name: str, site: Site, lived: int) -> Reduced:
    """Write down what became of the cells, where somebody looks on.

    Args:
        state: the samples behind the site.
        name: who decided.
        site: where.
        lived: blocks that a token which is gone now was there for.
    """
    if state.gone is None:
        return state
    counts = (state.call.num_cells,) * state.owner.shape[0]
    event = ReduceEvent(name, site, state.owner, counts)
    there = torch.zeros_like(state.gone, dtype=torch.bool).scatter(1, state.left, True)
    gone = torch.where(there, state.gone, state.gone.clamp(max=lived))
    return replace(state, gone=gone, events=(*state.events, event))
