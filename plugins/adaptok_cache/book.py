"""The book of what caches keep: by request and guidance branch, bounded, and dropped when stale."""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptok import BlockCall, BlockRange
from adaptok_cache.history import Terms
from adaptok_cache.runs import SampleRun

Signature = tuple[Hashable, ...]
Branches = tuple[str, ...]


@dataclass(slots=True, eq=False)
class CacheState:
    """What one request keeps of one guidance branch, or of a batch of branches.

    Args:
        signature: shapes, precision and device of the call that it belongs to.
        runs: where each sample is; None before its first step.
        terms: by sequence, what the blocks added and its differences.
        signal: what the next step is compared with, `(b ...)`.
    """

    signature: Signature
    runs: list[SampleRun | None]
    terms: dict[str, Terms] = field(default_factory=dict)
    signal: Tensor | None = None

    def take(self, rows: Sequence[int] | None) -> "CacheState":
        """Return the state of some samples.

        Args:
            rows: which samples; None means all, and gives this state itself.
        """
        if rows is None:
            return self
        runs = [self.runs[row] for row in rows]
        terms = {name: tuple(term[rows] for term in kept) for name, kept in self.terms.items()}
        return CacheState(
            self.signature, runs, terms, None if self.signal is None else self.signal[rows]
        )

    def put(self, rows: Sequence[int] | None, part: "CacheState") -> None:
        """Take over the state of some samples, as `take` gave it and a step changed it.

        Args:
            rows: which samples; None means that it is this state itself.
            part: their state.
        """
        if rows is None:
            return
        b = len(self.runs)
        for row, run in zip(rows, part.runs, strict=True):
            self.runs[row] = run
        for name, kept in part.terms.items():
            old = self.terms.get(name) or (None,) * len(kept)
            self.terms[name] = tuple(
                put_some(whole, rows, term, b) for whole, term in zip(old, kept, strict=True)
            )
        if part.signal is not None:
            self.signal = put_some(self.signal, rows, part.signal, b)

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are held."""
        for terms in self.terms.values():
            yield from terms
        if self.signal is not None:
            yield self.signal


def put_some(whole: Tensor | None, rows: Sequence[int], part: Tensor, b: int) -> Tensor:
    """Return a tensor of all samples with some rows replaced; zero where nothing is known yet."""
    if whole is None:
        whole = part.new_zeros(b, *part.shape[1:])
    return whole.index_copy(0, torch.tensor(rows, device=part.device), part)


class StateBook:
    """States of requests, the ones used latest at the end.

    Args:
        max_requests: how many requests are kept.

    Example:
        >>> book = StateBook(1)
        >>> state = book.open("a", ("cond",), (2, 3), 2)
        >>> book.open("a", ("cond",), (2, 3), 2) is state
        True
        >>> book.open("a", ("cond",), (4, 3), 4) is state  # another shape
        False
        >>> _ = book.open("b", ("cond",), (2, 3), 2)
        >>> list(book.requests)
        ['b']
    """

    def __init__(self, max_requests: int) -> None:
        self.max_requests = max_requests
        self.requests: OrderedDict[str | None, dict[Branches, CacheState]] = OrderedDict()
        self.steps: dict[str | None, int] = {}

    def open(
        self, request: str | None, branches: Branches, signature: Signature, b: int
    ) -> CacheState:
        """Return the state of a call; a fresh one if there is none that fits.

        Args:
            request: whose step it is; None where only the branch is known.
            branches: guidance branches of the batch.
            signature: see `sign`.
            b: samples of the batch.
        """
        states = self.requests.setdefault(request, {})
        self.requests.move_to_end(request)
        while len(self.requests) > self.max_requests:
            oldest, _ = self.requests.popitem(last=False)
            self.steps.pop(oldest, None)
        state = states.get(branches)
        if state is None or state.signature != signature:
            state = states[branches] = CacheState(signature, [None] * b)
        return state

    def drop(self, request: str | None, branches: Branches) -> None:
        """Forget the state of one branch."""
        self.requests.get(request, {}).pop(branches, None)

    def forget(self, request: str | None = None) -> None:
        """Forget a request; None means all."""
        if request is None:
            self.requests.clear()
            self.steps.clear()
        else:
            self.requests.pop(request, None)
            self.steps.pop(request, None)

    def list_runs(self, request: str | None) -> list[SampleRun]:
        """Return where the samples of a request are, of all its branches."""
        states = self.requests.get(request, {}).values()
        return [run for state in states for run in state.runs if run is not None]

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors that are held."""
        states = [state for found in self.requests.values() for state in found.values()]
        return sum(x.numel() * x.element_size() for state in states for x in state.tensors)


def sign(inner: BlockRange, call: BlockCall) -> Signature:
    """Return what must stay the same from step to step, so that a state fits.

    Args:
        inner: the blocks.
        call: what goes into them.
    """
    streams = [
        (name, None if x is None else (tuple(x.shape), x.dtype)) for name, x in call.streams.items()
    ]
    shape, places = tuple(call.x.shape), (call.grid, call.start)
    if call.standing is not None:  # other tokens, and perhaps other batch mates, in each step
        batch = count_batch(call)
        shape, places = (batch, call.standing.num_cells, shape[2]), (call.standing.grid, call.start)
    return (shape, call.x.dtype, call.x.device, places, tuple(streams), inner.first, inner.last)


def find_rows(call: BlockCall) -> list[int] | None:
    """Return which samples of the host's batch a call has; None means all.

    Args:
        call: the call; a host that shortens its own sequence gives samples of equal length in one.
    """
    if call.standing is None or call.part is None:
        return None
    rows: list[int] = call.part.samples.tolist()
    return rows


def count_batch(call: BlockCall) -> int:
    """Return how many samples the batch has that `find_rows` counts in."""
    apart = call.standing is not None and call.part is not None
    return call.part.batch if apart and call.part is not None else call.x.shape[0]
