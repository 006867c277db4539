"""Token reduction between blocks: what a stage sees at a site, and what it decides there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from adaptok.calls import BlockCall
from adaptok.chunking import ChunkPlan
from adaptok.errors import ReductionError, ShapeError

Where = Literal["before", "between"]  # in front of a block; between its attention and its MLP
Restore = Literal["copy", "update"]
RESTORES: tuple[Restore, ...] = ("copy", "update")


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A place where a stage makes tokens fewer.

    Args:
        block: index of the block in the host.
        where: `"before"` the block, or `"between"` its attention and its MLP.

    Example:
        >>> Site(3) < Site(3, "between") < Site(4)
        True
    """

    block: int
    where: Where = "before"


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """What a stage sees at a site.

    Args:
        site: the site.
        step: which of the stage's sites this is, from 0.
        steps: how many sites the stage has.
        call: the tokens now; between attention and MLP those after the attention residual.
        sizes: how many of the cells that came each grid token stands for, `(b m)`.
        owner: for each cell that came the grid token that stands for it, -1 for none, `(b n)`.
        counts: grid tokens that the budget leaves to each sample after this site; None: natural.
        keys: keys of the grid tokens, `(b key_heads m e)`, where the stage needs them and the
            site is between attention and MLP.
        class_attention: attention of the first token of the sequence to each grid token,
            `(b heads m)`, likewise.
        marks: what the stage has noted of each token at earlier sites, by name, `(b m ...)`.

    Example:
        >>> call = BlockCall(torch.randn(1, 5, 8), grid=(2, 2), start=1)
        >>> moment = Moment(
        ...     Site(0), 0, 1, call, torch.ones(1, 4), torch.arange(4)[None], counts=(2,)
        ... )
        >>> moment.x.shape, moment.count
        (torch.Size([1, 4, 8]), 2)
    """

    site: Site
    step: int
    steps: int
    call: BlockCall
    sizes: Float[Tensor, "b m"]
    owner: Int[Tensor, "b n"]
    counts: tuple[int, ...] | None = None
    keys: Float[Tensor, "b key_heads m e"] | None = None
    class_attention: Float[Tensor, "b heads m"] | None = None
    marks: Mapping[str, Shaped[Tensor, "b m ..."]] = field(default_factory=dict)

    @property
    def x(self) -> Float[Tensor, "b m d"]:
        """Features of the grid tokens."""
        return self.call.cell_x

    @property
    def count(self) -> int | None:
        """The one count that the budget leaves to all samples, or None."""
        # no set of them: a compiled graph would be made for one count
        if self.counts is None or any(count != self.counts[0] for count in self.counts):
            return None
        return self.counts[0]


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """What a stage decides at a site.

    Args:
        places: the grid token whose cell, position and other inputs each new token takes, `(b k)`.
        owner: for each grid token that came the new token that stands for it, -1 for none,
            `(b m)`.
        x: features of the new tokens, `(b k d)`; None leaves each those of its place.
        lengths: new tokens of each sample where samples have different counts: what lies behind
            in `places` is padding. None means `k` for all.
        marks: notes on the new tokens by name, `(b k ...)`; earlier notes go along with `places`.

    Raises:
        ShapeError: the parts are of different batches, or features or lengths do not fit.

    Example:
        >>> merged = Reduction(torch.tensor([[0, 2]]), torch.tensor([[0, 0, 1]]))
        >>> merged.places.shape
        torch.Size([1, 2])
    """

    places: Int[Tensor, "b k"]
    owner: Int[Tensor, "b m"]
    x: Float[Tensor, "b k d"] | None = None
    lengths: tuple[int, ...] | None = None
    marks: Mapping[str, Shaped[Tensor, "b k ..."]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        b, k = self.places.shape
        if self.owner.shape[0] != b:
            raise ShapeError(f"owner is of {self.owner.shape[0]} samples, and places of {b}")
        if self.x is not None and tuple(self.x.shape[:2]) != (b, k):
            raise ShapeError(
                f"x needs one row for each of the new tokens, ({b}, {k}, d), got "
                f"{tuple(self.x.shape)}"
            )
        if self.lengths is not None and (len(self.lengths) != b or max(self.lengths) > k):
            raise ShapeError(
                f"lengths has one number of at most {k} for each of {b} samples, got {self.lengths}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class ReduceEvent:
    """What became of the cells at one site, for whoever looks on.

    Args:
        stage: name of the stage.
        site: where it was.
        owner: for each cell the token that stands for it behind the site, -1 for none, `(b n)`.
        counts: grid tokens of each sample behind the site.
    """

    stage: str
    site: Site
    owner: Int[Tensor, "b n"]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class ReducePlan(ChunkPlan):
    """The plan of a whole reduction; its provenance is that behind the last site.

    `keep_mask` holds the cells whose token was still there at the end, `routing.keep_prob` the
    share of the blocks that each cell was there for.

    Args:
        grid: see `adaptok.ChunkPlan`, as for all but the last one.
        layout: always `"fixed"`.
        routing: which cells were left.
        keep_mask: the cells that were left.
        cells: flat grid cell of each token that was left; padded with those of other samples'
            lengths by -1.
        provenance: which token stands for each cell.
        batch: None.
        ptr: None.
        lengths: tokens left, per sample.
        events: what happened, site by site.
    """

    events: tuple[ReduceEvent, ...] = ()


def check_reduction(reduction: Reduction, moment: Moment, name: str, drops: bool = True) -> None:
    """Raise a `ReductionError` unless a decision is one about these tokens.

    Args:
        reduction: what a stage decided.
        moment: what it saw.
        name: what it is called.
        drops: whether it says that cells may be left without a token.

    Raises:
        ReductionError: another number of tokens, or indices that point nowhere (looked at on a
            CPU only, since a GPU would have to be waited for).
    """
    b, m = moment.sizes.shape
    if tuple(reduction.owner.shape) != (b, m):
        raise ReductionError(
            f"the stage {name!r} gave owners of the shape {tuple(reduction.owner.shape)} for "
            f"({b}, {m}) tokens: one new token, or -1, for each is needed"
        )
    k = reduction.places.shape[1]
    if k < 1 or k > m:
        raise ReductionError(
            f"the stage {name!r} made {k} tokens of {m}: a reduction leaves at least one, and no "
            "more than there were"
        )
    if torch.compiler.is_compiling():
        return
    left = reduction.lengths or (k,) * b
    if moment.counts is not None and left != moment.counts:
        raise ReductionError(
            f"the stage {name!r} left {list(left)} tokens where the budget leaves "
            f"{list(moment.counts)}: read moment.counts, one number for each sample, and give "
            "lengths= where they differ"
        )
    if reduction.places.device.type != "cpu":
        return
    low, high = (int(edge) for edge in reduction.owner.aminmax())
    first, last = (int(edge) for edge in reduction.places.aminmax())
    if low < -1 or high >= k or first < 0 or last >= m:
        raise ReductionError(
            f"the stage {name!r} points at tokens that are not there: places from {first} to "
            f"{last} of {m}, owners from {low} to {high} of {k}"
        )
    if low < 0 and not drops:
        raise ReductionError(
            f"the stage {name!r} leaves cells without a token, and does not say so: put "
            "`drops = True` into its class, so that they get their last features back"
        )


def schedule_evenly(n: int, final: int, steps: int) -> tuple[int, ...]:
    """Return how many tokens are left after each step if each takes as many as the next.

    Args:
        n: tokens in front of the first step.
        final: tokens behind the last one.
        steps: number of steps.

    Returns:
        A count for each step; the last one is `final`.

    Example:
        >>> schedule_evenly(10, 4, 3)
        (8, 6, 4)
    """
    return tuple(n - (n - final) * (step + 1) // steps for step in range(steps))


def schedule_by_share(n: int, final: int, steps: int) -> tuple[int, ...]:
    """Return how many tokens are left after each step if each keeps the same share.

    Args:
        n: tokens in front of the first step.
        final: tokens behind the last one.
        steps: number of steps.

    Returns:
        A count for each step; the last one is `final`.

    Example:
        >>> schedule_by_share(196, 67, 3)
        (137, 96, 67)
    """
    counts = [int(n * (final / n) ** ((step + 1) / steps) + 0.5) for step in range(steps)]
    return (*counts[:-1], final)


def restore_cells(
    x: Float[Tensor, "b m d"],
    owner: Int[Tensor, "b n"],
    before: Float[Tensor, "b n d"],
    lost: Float[Tensor, "b n d"] | float | None,
    restore: Restore,
) -> Float[Tensor, "b n d"]:
    """Give every cell its features again.

    Args:
        x: features of the tokens that are left.
        owner: for each cell the token that stands for it, -1 for none.
        before: features of the cells in front of all of it.
        lost: what cells get that no token stands for: their last features, or a number; None
            where there are no such cells.
        restore: `"copy"` gives each cell the features of its token; `"update"` its own features
            from before, moved as far as those of its token moved from the mean of its cells. A
            cell that is a token by itself takes the token's features either way.

    Returns:
        Features of all cells.

    Example:
        >>> x, owner = torch.tensor([[[5.0], [9.0]]]), torch.tensor([[0, 0, 1]])
        >>> before = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> restore_cells(x, owner, before, None, "copy").flatten()
        tensor([5., 5., 9.])
        >>> restore_cells(x, owner, before, None, "update").flatten()
        tensor([4.5000, 5.5000, 9.0000])
    """
    b, m, d = x.shape
    index = owner.clamp(min=0)
    rows = index[..., None].expand(-1, -1, d)
    after = x.gather(1, rows)
    if restore == "update":
        slot = torch.where(owner < 0, m, owner)
        ones = torch.ones_like(slot, dtype=before.dtype)
        sizes = before.new_zeros(b, m + 1).scatter_add(1, slot, ones).gather(1, index)[..., None]
        sums = before.new_zeros(b, m + 1, d).scatter_add(
            1, slot[..., None].expand(-1, -1, d), before
        )
        moved = before + (after - sums.gather(1, rows) / sizes.clamp(min=1))
        after = torch.where(sizes == 1, after, moved)
    if lost is None:
        return after
    return torch.where(owner[..., None] < 0, torch.as_tensor(lost).to(after), after)
