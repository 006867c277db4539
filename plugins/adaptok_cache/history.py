"""History: what blocks added to the sequences of a call, kept, extended and predicted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptok import BlockCall
from adaptok_cache.runs import SampleRun

TOKENS = "x"
STREAM = "stream "  # in front of the name of another sequence
Terms = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """Samples whose blocks ran, and what is needed to put them where they belong.

    Args:
        rows: which samples of the batch, `(m)`; None means all.
        runs: where each of them is, before this step is noted as computed.
    """

    rows: Int[Tensor, " m"] | None
    runs: Sequence[SampleRun]


def list_sequences(call: BlockCall) -> dict[str, Tensor]:
    """Return the sequences that blocks change, by name.

    Args:
        call: the call.

    Returns:
        The sequence of the cells with all that stands in it, and the streams beside it.
    """
    streams = {STREAM + name: x for name, x in call.streams.items() if x is not None}
    return {TOKENS: call.x} | streams


def measure_change(after: BlockCall, before: BlockCall) -> dict[str, Tensor]:
    """Return what blocks added to each sequence; of one that has another shape now, itself.

    Where a host chooses its tokens anew in each step, what they got is spread to the cells.

    Args:
        after: the call behind the blocks.
        before: the call in front of them.

    Returns:
        The changes by name, without a gradient, in memory of their own.

    Example:
        >>> before = BlockCall(torch.ones(1, 4, 2), grid=(2, 2))
        >>> measure_change(before.with_x(3 * before.x), before)["x"].max()
        tensor(2.)
    """
    old = list_sequences(before)
    changes = {}
    for name, x in list_sequences(after).items():
        known = old.get(name)
        fits = known is not None and known.shape == x.shape
        change = (x - known if fits else x.clone()).detach()  # type: ignore[operator]
        changes[name] = spread_cells(before, change) if name == TOKENS else change
    return changes


def spread_cells(call: BlockCall, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b n d"]:
    """Return features of tokens so that those of two steps can be compared.

    Args:
        call: the call that they belong to.
        x: one row per token.

    Returns:
        One row per cell, where the host chose its tokens for this step; else what was given.
    """
    return x if call.standing is None else call.standing.spread(x)


def apply_change(before: BlockCall, changes: Mapping[str, Tensor]) -> BlockCall:
    """Return a call as if the blocks had run, by what they are taken to have changed.

    Args:
        before: the call in front of the blocks.
        changes: by name, as `measure_change` gives them.

    Returns:
        The call behind the blocks.
    """
    old = list_sequences(before)
    made: dict[str, Tensor] = {}
    for name, change in changes.items():
        known = old.get(name)
        if name == TOKENS and before.standing is not None:
            change = before.standing.gather(change)
        fits = known is not None and known.shape == change.shape
        made[name] = known + change.to(known.dtype) if fits else change  # type: ignore[union-attr, operator]
    streams: dict[str, Tensor | None] = dict.fromkeys(before.streams)
    for name, x in made.items():
        if name != TOKENS:
            streams[name.removeprefix(STREAM)] = x
    return replace(before, x=made[TOKENS], streams=streams)


def put_samples(whole: BlockCall, part: BlockCall, rows: Int[Tensor, " m"]) -> BlockCall:
    """Return a call with some of its samples replaced by those that really ran.

    Args:
        whole: all samples.
        part: some of them, behind the blocks.
        rows: which ones.

    Returns:
        All samples.
    """
    streams = dict(whole.streams)
    for name, x in part.streams.items():
        known = streams.get(name)
        streams[name] = None if x is None or known is None else put_rows(known, rows, x)
    return replace(whole, x=put_rows(whole.x, rows, part.x), streams=streams)


def put_rows(whole: Tensor, rows: Int[Tensor, " m"] | None, part: Tensor) -> Tensor:
    """Return a tensor with some of its rows replaced.

    A new one: what was made in inference mode could not be changed in place behind it.

    Args:
        whole: the tensor.
        rows: which rows, `(m)`; None means all.
        part: what they become.
    """
    return part if rows is None else whole.index_copy(0, rows, part.to(whole.dtype))


def extend_terms(old: Terms | None, new: Tensor, update: Update, orders: int) -> Terms:
    """Add a computed step to the history of one sequence.

    Term 0 is what was computed; term j + 1 is the difference of term j to the one before, divided
    by the number of steps between both.

    Args:
        old: the terms of all samples; None where there are none yet, and all samples ran.
        new: what was computed for some samples, `(m ...)`.
        update: which samples, and where they are.
        orders: how many terms are kept.

    Returns:
        The terms of all samples.

    Example:
        >>> first, second = SampleRun(999.0), SampleRun(800.0, step=2, computed=0, orders=1)
        >>> terms = extend_terms(None, torch.ones(1, 3), Update(None, [first]), 2)
        >>> terms = extend_terms(terms, torch.full((1, 3), 5.0), Update(None, [second]), 2)
        >>> [term[0, 0].item() for term in terms]
        [5.0, 2.0]
    """
    rows, runs = update.rows, update.runs
    latest = [new]
    for order in range(orders - 1):
        if old is None:
            latest.append(torch.zeros_like(new))
            continue
        earlier = old[order] if rows is None else old[order].index_select(0, rows)
        # no difference yet: zero, and not what another run left there
        known = [run.computed is not None and run.orders > order for run in runs]
        gap = spread([float(max(run.age, 1)) for run in runs], new)
        difference = (latest[order].float() - earlier.float()) / gap
        kept = difference.where(spread(known, new), 0.0)
        latest.append(kept.to(new.dtype))
    if rows is None or old is None:
        return tuple(latest)
    return tuple(put_rows(a, rows, b) for a, b in zip(old, latest, strict=True))


def predict_terms(terms: Terms, runs: Sequence[SampleRun]) -> Float[Tensor, "b ..."]:
    """Return what the blocks would add now: a Taylor sum over the steps since they ran.

    Args:
        terms: the terms of all samples.
        runs: where each one is.

    Returns:
        The sum of `term_j * k ** j / j!`, k being the steps since a sample was computed; with one
        term, that term.
    """
    if len(terms) == 1:
        return terms[0]
    total = terms[0].float()
    for order, term in enumerate(terms[1:], 1):
        weights = [
            run.age**order / math.factorial(order) if order < run.orders else 0.0 for run in runs
        ]
        if any(weights):
            total = total + spread(weights, term) * term.float()
    return total.to(terms[0].dtype)


def spread(values: Sequence[float] | Sequence[bool], like: Tensor) -> Tensor:
    """Return one number per sample, shaped to broadcast over the other axes of a tensor."""
    kind = torch.bool if isinstance(values[0], bool) else torch.float32
    made = torch.tensor(values, dtype=kind, device=like.device)
    return made.view(-1, *(1,) * (like.ndim - 1))
