"""What all step caches have in common: whose step it is, which samples run, what is kept."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from adaptok import BlockCall, BlockRange, Effects, Stage
from adaptok.errors import ConfigError, HandOverError
from adaptok_cache.agreeing import agree_on
from adaptok_cache.book import (
    Branches,
    CacheState,
    StateBook,
    count_batch,
    find_rows,
    sign,
)
from adaptok_cache.history import (
    Update,
    apply_change,
    extend_terms,
    measure_change,
    predict_terms,
    put_samples,
)
from adaptok_cache.idling import IdleCacheWarning, IdleWalk, explain_distance, find_ended, find_idle
from adaptok_cache.runs import SampleRun, follow

MANY = 2  # repeated times in one run before somebody is told


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """What a cache finds about the samples of a call.

    Args:
        front: the call in front of the blocks that may be left out.
        run: runs those blocks.
        fits: whether each sample is near enough to its last computed step.
        runs: where each sample is, with what the cache summed up.
        signal: what the next step is compared with, `(b ...)`; None keeps nothing.
        distances: what was held against a threshold, sample by sample; None where nothing is.
    """

    front: BlockCall
    run: Callable[[BlockCall], BlockCall]
    fits: Sequence[bool]
    runs: Sequence[SampleRun]
    signal: Tensor | None = None
    distances: Sequence[float] | None = None


class StepCache(Stage):
    """Reuses, sample by sample, what the blocks inside it computed in an earlier step.

    A sample that is computed runs in a batch with the others that are; where all are reused, no
    block runs. What is kept belongs to one request (`adaptok.request`), its guidance branches and
    this stage, is bounded by `max_requests`, and is left out of state dicts, copies and pickles.
    In training, and where gradients are recorded, every step is computed and nothing kept.

    Args:
        steps: how many steps a run has; the last one is always computed. None means that it is not
            known, unless `announce` tells it.
        warmup: how many steps of a run are always computed at its beginning.
        max_requests: how many requests are remembered; the one that was not used for longest goes.
        agree: compute a sample in every process of `torch.distributed` where one of them has to.

    Raises:
        ConfigError: a number is out of range.
        HandOverError: (when called) the host has no diffusion step.
    """

    effects: ClassVar[Effects] = Effects("time", needs_step=True, keeps_state=True)
    name: ClassVar[str]
    threshold: float | None = None  # of those that hold a distance against one
    advice: ClassVar[str] = ""  # beside a larger threshold, where no step was reused

    def __init__(self, *, steps: int | None, warmup: int, max_requests: int, agree: bool) -> None:
        super().__init__()
        if steps is not None:
            check_count(self.name, "steps", steps)
        check_count(self.name, "warmup", warmup)
        check_count(self.name, "max_requests", max_requests)
        self.steps = steps
        self.warmup = warmup
        self.max_requests = max_requests
        self.agree = agree
        self.orders = 1
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget everything, also what was counted and said."""
        self.book = StateBook(self.max_requests)
        self.computed = 0
        self.reused = 0
        self.last_computed: tuple[bool, ...] = ()
        self.unnamed: tuple[object, ...] = ()
        self.told: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to requests: a copy begins anew."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "book": StateBook(self.max_requests), "last_computed": (), "unnamed": ()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # weights move, or a wrap takes the stage into another model: what is kept is not theirs
        self.forget()
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def forget(self, request: str | None = None) -> None:
        """Forget what is kept.

        Args:
            request: of which request; None means all.
        """
        for name in [request] if request is not None else list(self.book.requests):
            self.end_walks(name)
        self.book.forget(request)

    def announce(self, request: str, steps: int) -> None:
        """Say how many steps the next runs of a request have, so that the last one is computed.

        Args:
            request: its name.
            steps: number of steps.

        Raises:
            ConfigError: it is no positive number.
        """
        check_count(self.name, "steps", steps)
        self.book.steps[request] = steps

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors that are kept."""
        return self.book.memory_bytes

    @property
    def wants_reuse(self) -> bool:
        """Whether a step may be reused at all, so that it is told where none is."""
        return self.threshold is None or self.threshold > 0

    def describe(self) -> dict[str, str]:
        """Return options, and what is kept now."""
        kept = f"{len(self.book.requests)} of {self.max_requests} requests, {self.memory_bytes} B"
        counts = f"{self.computed} computed, {self.reused} reused"
        shown = {name: repr(value) for name, value in self.describe_options().items()}
        return {"stage": repr(self.name), **shown, "steps": counts, "kept": repr(kept)}

    @abstractmethod
    def describe_options(self) -> dict[str, object]:
        """Return the options that matter most, by name."""

    @abstractmethod
    def judge(
        self, inner: BlockRange, call: BlockCall, state: CacheState, runs: Sequence[SampleRun]
    ) -> Verdict:
        """Find out which samples are near enough to their last computed step.

        Args:
            inner: the blocks.
            call: what goes into them.
            state: what is kept of this request.
            runs: where each sample is in this step.

        Returns:
            The verdict; samples that have nothing to reuse are computed whatever it says.
        """

    def explain_idle(self, walk: IdleWalk) -> str:
        """Say why no step of a walk was reused, and what to do.

        Args:
            walk: the walk.
        """
        if not walk.tried:
            return f"warmup={self.warmup} leaves none to reuse, give a smaller one"
        if self.threshold is None:
            return "with agree=True other processes had to compute"
        return explain_distance(walk.nearest, self.threshold, self.advice)

    def check_blocks(self, inner: BlockRange) -> None:
        """Raise a `StackError` if there are too few blocks.

        Args:
            inner: the blocks.
        """

    def keep_signal(
        self, before: Tensor | None, signal: Tensor | None, rows: Tensor | None
    ) -> Tensor | None:
        """Return what the next step is compared with.

        Args:
            before: what this step was compared with.
            signal: what the verdict gave.
            rows: samples that were computed, `(m)`, perhaps none; None means all.
        """
        return signal

    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run the inner blocks on the samples that cannot be reused (see `Stage.forward`)."""
        if call.timestep is None:
            raise HandOverError(
                f"{self.name!r} reuses diffusion steps, and this host handed none over: it is for "
                "diffusion transformers; for adaptok.ListBackbone name the argument, timestep="
            )
        self.check_blocks(inner)
        b = call.x.shape[0]
        request, branches = find_owner(call)
        if self.is_idle(inner, call, request, branches):
            self.book.drop(request, branches)
            self.note_decisions(call, (True,) * b)
            return inner(call)
        rows = find_rows(call)
        if request not in self.book.requests:
            for name in list(self.book.requests):
                self.end_walks(name)
        whole = self.book.open(request, branches, sign(inner, call), count_batch(call))
        state = whole.take(rows)
        limit = self.book.steps.get(request, self.steps)
        times = call.timestep.tolist()
        latest = state.runs
        runs = [follow(*pair, limit) for pair in zip(latest, times, strict=True)]
        verdict = self.judge(inner, call, state, runs)
        free = [not self.must_compute(run, limit) for run in runs]
        compute = [not (fit and may) for fit, may in zip(verdict.fits, free, strict=True)]
        verdict = note_tries(verdict, free)
        if self.agree:
            compute = agree_on(compute, call.x.device)
        after = self.run(verdict, compute, state)
        whole.put(rows, state)
        self.tell_idle(request, find_ended(latest, state.runs, limit))
        if any(run.repeats >= MANY for run in runs):
            self.tell(
                f"{self.name!r} got the same timestep twice in a row again and again, and computes "
                "such steps: where a pipeline calls its model once per guidance branch, name the "
                'branch, adaptok.request(model, "id", branch="cond")'
            )
        self.note_decisions(call, compute)
        self.computed += sum(compute)
        self.reused += b - sum(compute)
        return after

    def note_decisions(self, call: BlockCall, compute: Sequence[bool]) -> None:
        """Note which samples of the host's batch ran; those that run apart keep their places."""
        for observer in call.observers:
            observer.note_reuse(self.name, torch.tensor([not flag for flag in compute]))
        rows, b = find_rows(call), count_batch(call)
        if rows is None:
            self.last_computed = tuple(compute)
            return
        known = list(self.last_computed) if len(self.last_computed) == b else [True] * b
        for row, flag in zip(rows, compute, strict=True):
            known[row] = flag
        self.last_computed = tuple(known)

    def is_idle(
        self, inner: BlockRange, call: BlockCall, request: str | None, branches: Branches
    ) -> bool:
        """Say whether a step is computed as if there were no cache; tell why, once."""
        if self.training:
            return True
        if request is None and len(branches) != 1:
            assert call.timestep is not None
            seen = (sign(inner, call), tuple(call.timestep.tolist()))
            before, self.unnamed = self.unnamed, seen
            if before and before[0] == seen[0] and before[1] != seen[1]:
                self.tell(
                    f"{self.name!r} does not know whose steps these are, and computes all of them: "
                    'call the model inside `with adaptok.request(model, "id"):`, with branch= '
                    "where a pipeline calls it once per guidance branch"
                )
            return True
        if torch.is_grad_enabled():
            self.tell(
                f"{self.name!r} computes every step while gradients are recorded: call the model "
                "inside torch.no_grad()"
            )
            return True
        return False

    def must_compute(self, run: SampleRun, limit: int | None) -> bool:
        """Say whether a sample is computed whatever a verdict says."""
        last = limit is not None and run.step + 1 >= limit
        early = run.step < max(self.warmup, 2 if run.unsure else 1)
        return run.computed is None or early or last

    def run(self, verdict: Verdict, compute: Sequence[bool], state: CacheState) -> BlockCall:
        """Run the samples that are computed, reuse the others, and keep what came of it."""
        front, runs = verdict.front, list(verdict.runs)
        chosen = [sample for sample, flag in enumerate(compute) if flag]
        whole = len(chosen) == len(compute)
        rows = None if whole else torch.tensor(chosen, dtype=torch.long, device=front.x.device)
        after = front if whole else apply_change(front, self.predict(state, runs))
        terms = state.terms
        if chosen:
            before = front if rows is None else front.select(rows)
            part = verdict.run(before)
            after = part if rows is None else put_samples(after, part, rows)
            update = Update(rows, [runs[sample] for sample in chosen])
            terms = {
                name: extend_terms(state.terms.get(name), change, update, self.orders)
                for name, change in measure_change(part, before).items()
            }
        for sample, flag in enumerate(compute):
            run = runs[sample]
            runs[sample] = run.after_compute(self.orders) if flag else run.after_reuse()
        # only now, so that blocks that failed leave everything as it was
        state.signal = self.keep_signal(state.signal, verdict.signal, rows)
        state.terms, state.runs = terms, list(runs)
        return after

    def predict(self, state: CacheState, runs: Sequence[SampleRun]) -> dict[str, Tensor]:
        """Return what the blocks would add to each sequence."""
        return {name: predict_terms(terms, runs) for name, terms in state.terms.items()}

    def end_walks(self, request: str | None) -> None:
        """Look back at walks of a request whose end could not be told from their steps."""
        if self.book.steps.get(request, self.steps) is None:
            self.tell_idle(request, self.book.list_runs(request))

    def tell_idle(self, request: str | None, ended: Sequence[SampleRun]) -> None:
        """Say once that nothing was reused, where that is so.

        Args:
            request: whose steps they are.
            ended: samples whose walk is over.
        """
        if not ended or not self.wants_reuse:
            return
        walk = find_idle(ended, self.book.list_runs(request))
        if walk is not None:
            self.tell(
                f"{self.name!r} computed all {walk.steps} steps of a walk and reused none: "
                f"{self.explain_idle(walk)}",
                "idle",
            )

    def tell(self, message: str, about: str = "") -> None:
        """Warn once.

        Args:
            message: what to say.
            about: what it is about, where the message is not always the same.
        """
        if (about or message) not in self.told:
            self.told |= {about or message}
            warnings.warn(message, IdleCacheWarning, stacklevel=2)


def note_tries(verdict: Verdict, free: Sequence[bool]) -> Verdict:
    """Return a verdict whose samples know which steps might have been reused.

    Args:
        verdict: what a cache found.
        free: which samples may be reused.
    """
    distances = verdict.distances or (None,) * len(free)
    runs = [
        run.after_try(distance) if may else run
        for run, distance, may in zip(verdict.runs, distances, free, strict=True)
    ]
    return replace(verdict, runs=runs)


def find_owner(call: BlockCall) -> tuple[str | None, Branches]:
    """Return whose step a call is: its request, and the guidance branches of its batch.

    Args:
        call: the call.

    Returns:
        Both; a branch without a request comes from a pipeline that names it by a cache context.
    """
    numbers = call.numbers
    return (None, ()) if numbers is None else (numbers.request, tuple(numbers.branches))


def check_count(stage: str, option: str, value: object) -> None:
    """Raise a `ConfigError` unless an option is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{option} of {stage!r} is a whole number of at least 1, got {value!r}")
