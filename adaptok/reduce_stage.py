"""The stage that makes tokens fewer between blocks: merging and pruning, and the way back."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from adaptok.budgeted_stage import BudgetedStage
from adaptok.budgets import Budget, count_kept
from adaptok.calls import BlockCall, merge_samples
from adaptok.chunking import Provenance
from adaptok.errors import BudgetError, ConfigError, StackError
from adaptok.reduce_run import Counts, Reduced, ReduceRun
from adaptok.reductions import (
    RESTORES,
    Moment,
    ReduceEvent,
    ReducePlan,
    Reduction,
    Restore,
    Site,
    restore_cells,
    schedule_evenly,
)
from adaptok.routing import Routing
from adaptok.stages import BlockRange, Effects, Stage


class ReduceStage(BudgetedStage):
    """Makes tokens fewer at sites between the blocks inside it, and gives all cells back.

    A subclass says where it acts (`find_sites`) and what it does there (`reduce`). Prefix tokens,
    such as class and register tokens, and text are never part of what it sees. Stages of this kind
    that stand next to each other in a stack share one loop over the blocks.

    Args:
        name: what the stage is called in traces and errors.
        restore: what cells get in the end: `"copy"` the features of the token that stands for
            them, `"update"` their own from before, moved as far as that token moved.
        fill: what a cell gets that no token stands for; None leaves it its last features.

    Raises:
        ConfigError: there is no such way to restore.
        BudgetError: (when called) the budget does not fit the batch, or needs a natural count.

    Example:
        >>> class Halve(ReduceStage):
        ...     def find_sites(self, inner):
        ...         return (Site(inner.first),)
        ...     def reduce(self, moment):
        ...         m = moment.x.shape[1] if moment.count is None else 2 * moment.count
        ...         places = torch.arange(0, m, 2).expand(moment.x.shape[0], -1)
        ...         owner = torch.arange(m) // 2
        ...         return Reduction(places, owner.expand(moment.x.shape[0], -1))
        >>> def run(call, first, last):
        ...     print(tuple(call.x.shape))
        ...     return call
        >>> call = BlockCall(torch.randn(2, 17, 64), grid=(4, 4), start=1)
        >>> Halve("halve")(BlockRange(run, 0, 2), call).x.shape
        (2, 9, 64)
        torch.Size([2, 17, 64])
    """

    effects: ClassVar[Effects] = Effects("tokens", changes_count=True, compilable=True)
    reads_keys: ClassVar[bool] = False
    reads_class_attention: ClassVar[bool] = False
    drops: bool = False  # whether a cell may be left without a token

    def __init__(self, name: str, restore: Restore = "copy", fill: float | None = None) -> None:
        super().__init__(name)
        if restore not in RESTORES:
            raise ConfigError(f"restore is one of {', '.join(RESTORES)}, got {restore!r}")
        self.restore: Restore = restore
        self.fill = fill

    @abstractmethod
    def find_sites(self, inner: BlockRange) -> Sequence[Site]:
        """Return where this stage acts, in order.

        Args:
            inner: the blocks inside; `inner.can_split` says whether a stage can act between
                attention and MLP, `inner.whole` why not.
        """

    @abstractmethod
    def reduce(self, moment: Moment) -> Reduction | None:
        """Decide at a site.

        Args:
            moment: what there is; `moment.counts` is what the budget leaves, None means that the
                stage decides by itself.

        Returns:
            The decision; None changes nothing.
        """

    def biases_keys(self, sites: Sequence[Site], block: int) -> bool:
        """Say whether attention of a block gets a bias from this stage.

        Args:
            sites: where the stage acts.
            block: index of the block.
        """
        return False

    def bias_keys(self, moment: Moment) -> Float[Tensor, "b m"] | None:
        """Return what is added to the logits of each grid token as a key; None for nothing.

        Args:
            moment: what there is in front of the attention.
        """
        return None

    def schedule(self, n: int, final: int, steps: int) -> tuple[int, ...]:
        """Return how many tokens are left behind each site, so that `final` are left in the end.

        Args:
            n: grid tokens in front of the first site.
            final: grid tokens behind the last one.
            steps: number of sites.
        """
        return schedule_evenly(n, final, steps)

    def count_naturally(self, n: int, steps: int) -> int | None:
        """Return how many tokens are left without a budget, where that does not need the image.

        Args:
            n: grid tokens in front of the first site.
            steps: number of sites.
        """
        return None

    def waits_for_device(self, budget: Budget) -> bool:
        """Say whether counts depend on the image (see `BudgetedStage.waits_for_device`)."""
        if budget.is_natural:
            return self.count_naturally(2, 1) is None
        return not budget.is_uniform

    def describe(self) -> dict[str, str]:
        """Return name, way to restore and budget in words."""
        return {
            "stage": repr(self.name),
            "restore": repr(self.restore),
            "budget": self.describe_budget(),
        }

    def find_first(self, first: int, last: int) -> int:
        """Return the first block at which it acts (see `Stage.find_first`)."""
        sites = self.find_sites(BlockRange(pass_on, first, last))
        return min((site.block for site in sites), default=first)

    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run the inner blocks on fewer and fewer tokens (see `Stage.forward`)."""
        return run_together((self,), inner, call)

    def count_tokens(self, call: BlockCall, steps: int) -> Counts:
        """Return how many tokens the budget of a call leaves behind each site, per sample.

        Args:
            call: the tokens that came.
            steps: number of sites.

        Returns:
            A schedule per sample, or None if the stage decides by itself.

        Raises:
            BudgetError: `drop` came, and the stage has no count of its own to drop from.
        """
        budget = self.choose_budget(call)
        b, n = call.x.shape[0], call.num_cells
        if budget.is_natural or not steps:
            return None
        if budget.is_uniform:
            return (self.schedule(n, budget.count(n), steps),) * b
        if budget.is_exact:
            natural = torch.zeros(b, dtype=torch.long)
        else:
            count = self.count_naturally(n, steps)
            if count is None:
                raise BudgetError(
                    f"drop= drops from a natural count, and {self.name!r} has none that is known "
                    "before it has seen the image: give keep= or tokens="
                )
            natural = torch.full((b,), count)
        finals = count_kept(budget, natural, n).tolist()
        return tuple(self.schedule(n, final, steps) for final in finals)


def pass_on(call: BlockCall, first: int, last: int) -> BlockCall:
    """Return a call as it is."""
    return call


def run_together(stages: Sequence[ReduceStage], inner: BlockRange, call: BlockCall) -> BlockCall:
    """Run blocks with several stages deciding between them, and give all cells back.

    Args:
        stages: who decides, the outermost first.
        inner: the blocks.
        call: the tokens.

    Returns:
        The call after the blocks, with as many tokens as it came with.

    Raises:
        StackError: the stages restore in different ways.
    """
    ways = {(stage.restore, stage.fill) for stage in stages}
    if len(ways) > 1:
        names = " and ".join(repr(stage.name) for stage in stages)
        raise StackError(
            f"{names} share one loop and restore cells in different ways: give all of them the "
            "same restore= and fill="
        )
    sites = tuple(tuple(stage.find_sites(inner)) for stage in stages)
    run = ReduceRun(
        tuple(stages),
        inner,
        sites,
        tuple(
            stage.count_tokens(call, len(found)) for stage, found in zip(stages, sites, strict=True)
        ),
    )
    ended = run.run(call, watched=bool(call.observers))
    ((restore, fill),) = ways
    groups = [end.numbers for end in ended]
    before = call.cell_x
    parts = []
    for end in ended:
        whole = len(ended) == 1
        own = before if whole else before[list(end.numbers)]
        lost = end.lost if fill is None or end.lost is None else fill
        parts.append(restore_cells(end.call.cell_x, end.owner, own, lost, restore))
    x = join_groups(parts, groups)
    if call.observers:
        plan = make_plan(call, ended, groups, inner.last - inner.first)
        for observer in call.observers:
            observer.note_plan("+".join(stage.name for stage in stages), plan.routing, plan)
    return call.put(x, *merge_samples([end.call for end in ended], groups))


def join_groups(parts: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> Tensor:
    """Put groups of samples into one batch again, in order."""
    if len(parts) == 1:
        return parts[0]
    order = [sample for group in groups for sample in group]
    back = torch.tensor(order, device=parts[0].device).argsort()
    return torch.cat(list(parts)).index_select(0, back)


def make_plan(
    call: BlockCall, ended: Sequence[Reduced], groups: Sequence[Sequence[int]], blocks: int
) -> ReducePlan:
    """Return what was decided, for whoever looks on.

    Args:
        call: the tokens that came.
        ended: the groups of samples in the end.
        groups: which samples those are.
        blocks: how many blocks there were.
    """
    longest = max(end.call.num_cells for end in ended)
    masks, cells, lived = [], [], []
    for end in ended:
        there = torch.zeros_like(end.owner, dtype=torch.bool).scatter(1, end.left, True)
        masks.append(there)
        cells.append(F.pad(end.left, (0, longest - end.left.shape[1]), value=-1))
        assert end.gone is not None
        lived.append(end.gone)
    keep_mask = join_groups(masks, groups)
    share = join_groups(lived, groups).float() / blocks
    events = tuple(
        ReduceEvent(
            same[0].stage,
            same[0].site,
            join_groups([event.owner for event in same], groups),
            join_counts([event.counts for event in same], groups),
        )
        for same in zip(*(end.events for end in ended), strict=True)
    )
    return ReducePlan(
        grid=call.grid,
        layout="fixed",
        routing=Routing(share, keep_mask, keep_mask, threshold=None),
        keep_mask=keep_mask,
        cells=join_groups(cells, groups),
        provenance=Provenance(join_groups([end.owner for end in ended], groups)),
        lengths=join_counts([(end.call.num_cells,) * len(end.numbers) for end in ended], groups),
        events=events,
    )


def join_counts(
    counts: Sequence[tuple[int, ...]], groups: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Put one number per sample of groups into the order of the batch."""
    pairs = [
        pair
        for group, numbers in zip(groups, counts, strict=True)
        for pair in zip(group, numbers, strict=True)
    ]
    return tuple(number for _, number in sorted(pairs))


def stand_around(stages: Sequence[Stage], inner: BlockRange) -> BlockRange:
    """Put stages around blocks; neighbours that make tokens fewer share one loop.

    Args:
        stages: the outermost first.
        inner: the blocks.

    Returns:
        The blocks with all stages around them.
    """
    waiting: list[ReduceStage] = []
    for stage in reversed(stages):
        if isinstance(stage, ReduceStage):
            waiting.insert(0, stage)
            continue
        inner = close(waiting, inner).around(stage)
        waiting = []
    return close(waiting, inner)


def close(stages: Sequence[ReduceStage], inner: BlockRange) -> BlockRange:
    """Put stages that share a loop around blocks."""
    if not stages:
        return inner
    return inner.around(stages[0] if len(stages) == 1 else Joined(stages))


class Joined(Stage):
    """Stages that share one loop, as one; it owns none of them.

    Args:
        stages: the outermost first.
    """

    effects: ClassVar[Effects] = ReduceStage.effects

    def __init__(self, stages: Sequence[ReduceStage]) -> None:
        super().__init__()
        self.joined = tuple(stages)  # in a tuple, so that they are not registered twice

    def describe(self) -> dict[str, str]:
        """Return the names."""
        return {"stage": " and ".join(repr(stage.name) for stage in self.joined)}

    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run the loop (see `Stage.forward`)."""
        return run_together(self.joined, inner, call)
