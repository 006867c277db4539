"""`adaptok.benchmark`: what each budget costs and saves, in one interleaved run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptok.budgeted import budget as budgeted
from adaptok.compiling import compile as compile_adaptive
from adaptok.compiling import is_compiled, uncompile
from adaptok.counting import count_operations
from adaptok.errors import AdaptokError, ConfigError
from adaptok.hosts import device_of, dtype_of
from adaptok.measure.agreement import compare_outputs
from adaptok.measure.latency import (
    Candidate,
    Progress,
    Timing,
    check_repeats,
    measure_interleaved,
)
from adaptok.measure.machine import describe_machine
from adaptok.measure.memory import measure_peak
from adaptok.measure.report import BenchmarkReport, BenchmarkRow, TokenCount
from adaptok.measure.subjects import (
    BudgetLike,
    Inputs,
    SeenTokens,
    Subject,
    describe_inputs,
    open_subject,
    read_budgets,
)
from adaptok.probing import undisturbed

BUDGETS = (1.0, 0.7, 0.5, 0.3)
MB = 1e6


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """One side of the comparison.

    Args:
        name: in words.
        call: runs it once on the inputs, in the form that is timed.
        around: its budget.
        see: runs it once uncompiled; returns its tokens, where known, and its output.
    """

    name: str
    call: Callable[[], Any]
    around: Callable[[], AbstractContextManager[object]]
    see: Callable[[], tuple[SeenTokens | None, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What does not depend on the clock.

    Args:
        seen: tokens, where known.
        flops: counted operations.
        output: of the form that is timed.
        peak: bytes.
    """

    seen: SeenTokens | None
    flops: int
    output: Tensor
    peak: int


def benchmark(
    model: nn.Module,
    inputs: Inputs,
    budgets: Sequence[BudgetLike] = BUDGETS,
    *,
    repeats: int = 10,
    warmup: int = 2,
    compile: bool = False,
    baseline: Callable[..., Any] | None = None,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Measure what budgets cost and save, side by side with a baseline.

    Baseline and all budgets take turns in one run, in eval mode and without gradients; weights,
    train modes, budget and random numbers of the model are as before afterwards.

    Args:
        model: a wrapped model, or a `DCDiT`.
        inputs: what it is called with: a tensor, a tuple of arguments, a mapping of arguments by
            name, or an `adaptok.HostInputs`.
        budgets: numbers (`keep`), mappings such as `{"drop": 0.3}`, or `adaptok.Budget`s.
        repeats: measured rounds, at least 1.
        warmup: rounds before that.
        compile: run both sides compiled; a model that is compiled already always is.
        baseline: another module or callable that takes the same inputs. Default: the model without
            its stages; of a `DCDiT` the model itself at keep=1.
        progress: told the steps done and all steps.

    Returns:
        The report: tokens, FLOPs, milliseconds, memory and agreement of each budget.

    Raises:
        NotWrappedError: the model is neither wrapped nor a `DCDiT`.
        BudgetError: there are no budgets, or one does not fit the model.
        ConfigError: `repeats` is less than 1, or the model is compiled already.
        ShapeError: there are no inputs.
        Exception: whatever the model raises to inputs that do not fit; a note says in which call.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> report = benchmark(vit, torch.randn(2, 3, 32, 48), budgets=[1.0, 0.25], repeats=2)
        >>> [row.computed.mean for row in report.rows], round(report.rows[0].cosine, 4)
        ([24.0, 6.0], 1.0)
    """
    check_repeats(repeats, warmup)
    chosen = read_budgets(budgets)
    subject = open_subject(model, inputs)
    if baseline is not None and not callable(baseline):
        raise ConfigError(f"baseline is a module or a callable, got a {type(baseline).__name__}")
    device = device_of(model)
    modules = [part for part in (model, baseline) if isinstance(part, nn.Module)]
    with ExitStack() as restored:
        if compile and not is_compiled(model):
            restored.enter_context(compiled_for_now(model))
        compile = is_compiled(model)
        if not compile and any(map(is_torch_compiled, (model, baseline))):
            raise ConfigError(
                "one side is compiled already: give both as they are, and compile=True"
            )
        for module in modules:
            restored.enter_context(undisturbed(module))
        restored.enter_context(torch.no_grad())
        contenders = list_contenders(subject, chosen, baseline, compiled=compile)
        tick = count_steps(progress, len(contenders), warmup + repeats)
        facts = {}
        for place, contender in enumerate(contenders):
            facts[contender.name] = find_facts(subject, contender, device, compiled=compile)
            tick(place + 1)
        timings = measure_interleaved(
            {side.name: Candidate(side.call, side.around) for side in contenders},
            repeats=repeats,
            warmup=warmup,
            device=device,
            progress=lambda done, _: tick(len(contenders) + done),
        )
        precision = name_precision(model, device)
    base, *others = contenders
    seen = facts[others[0].name].seen
    assert seen is not None
    batch = len(seen.computed)
    base_row = make_row(base.name, facts[base.name], timings[base.name], batch)
    expected = facts[base.name].output
    rows = [
        make_row(side.name, facts[side.name], timings[side.name], batch, expected).against(base_row)
        for side in others
    ]
    return BenchmarkReport(
        model=f"{type(model).__module__}.{type(model).__qualname__}",
        method=subject.method,
        batch=batch,
        cells=seen.cells,
        inputs=describe_inputs(subject.inputs),
        precision=precision,
        compiled=compile,
        repeats=repeats,
        warmup=warmup,
        machine=describe_machine(device),
        memory="allocator" if device.type == "cuda" else "live tensors",
        weights_mb=weigh(model) / MB,
        base=base_row,
        rows=tuple(rows),
    )


def compile_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled form of the other side."""
    if isinstance(call, torch._dynamo.OptimizedModule):
        return call
    return torch.compile(call)


@contextmanager
def compiled_for_now(model: nn.Module) -> Iterator[None]:
    """Compile an adaptive model for a while."""
    before = model._compiled_call_impl
    compile_adaptive(model)
    try:
        yield
    finally:
        uncompile(model)
        model._compiled_call_impl = before


def is_torch_compiled(side: object) -> bool:
    """Say whether a model was compiled by PyTorch's own door."""
    if isinstance(side, torch._dynamo.OptimizedModule):
        return True
    return getattr(side, "_compiled_call_impl", None) is not None


def list_contenders(
    subject: Subject,
    budgets: dict[str, dict[str, Any]],
    baseline: Callable[..., Any] | None,
    *,
    compiled: bool,
) -> list[Contender]:
    """Return the baseline and then one contender per budget."""
    model = subject.model
    call = partial(subject.call, model)
    if baseline is None:
        base = Contender(subject.full, call, subject.run_full, subject.see_tokens)
    else:
        other = compile_call(baseline) if compiled else baseline

        def see_other() -> tuple[SeenTokens | None, Tensor]:
            return subject.see_baseline_tokens(baseline), subject.output(subject.call(baseline))

        name = f"the given {name_callable(baseline)}"
        base = Contender(name, partial(subject.call, other), nullcontext, see_other)
    sides = [
        Contender(name, call, partial(budgeted, model, **options), subject.see_tokens)
        for name, options in budgets.items()
    ]
    return [base, *sides]


def find_facts(
    subject: Subject, contender: Contender, device: torch.device, *, compiled: bool
) -> Facts:
    """Run one side a few times and note all that does not depend on the clock."""
    with naming_call(contender.name), contender.around():
        # uncompiled, and first: a compiled form must know the grid from a call before it
        with count_operations() as counter:
            seen, output = contender.see()
        output = output.clone()
        if compiled:
            output = subject.output(contender.call()).clone()
        peak = measure_peak(contender.call, device)
    return Facts(seen, int(counter.get_total_flops()), output, peak)


@contextmanager
def naming_call(name: str) -> Iterator[None]:
    """Say in an error which call it comes from."""
    try:
        yield
    except AdaptokError as error:
        raise type(error)(f"{name}: {error}") from error
    except Exception as error:
        error.add_note(f"raised in adaptok.benchmark by the call of: {name}")
        raise


def make_row(
    name: str, facts: Facts, timing: Timing, batch: int, expected: Tensor | None = None
) -> BenchmarkRow:
    """Put what was found of one side into a row."""
    seen = facts.seen
    agreement = None if expected is None else compare_outputs(facts.output, expected)
    formula = None if seen is None else seen.formula_flops
    return BenchmarkRow(
        name=name,
        requested=None if seen is None else TokenCount.of(seen.requested),
        computed=None if seen is None else TokenCount.of(seen.computed),
        gflops=facts.flops / 1e9,
        formula_gflops=None if formula is None else formula / 1e9,
        ms=timing.median_ms,
        first_ms=timing.first_ms,
        third_ms=timing.third_ms,
        images_per_second=1000 * batch / timing.median_ms,
        peak_mb=facts.peak / MB,
        cosine=None if agreement is None else agreement.cosine,
        relative_error=None if agreement is None else agreement.relative_error,
    )


def count_steps(progress: Progress | None, sides: int, rounds: int) -> Callable[[int], None]:
    """Return what tells a progress callback how many steps are done."""

    def tick(done: int) -> None:
        if progress is not None:
            progress(done, sides + rounds)

    return tick


def name_callable(call: object) -> str:
    """Return the name of a function, or the class of anything else."""
    return str(getattr(call, "__name__", type(call).__name__))


def name_precision(model: nn.Module, device: torch.device) -> str:
    """Return the dtype of the weights, and autocast where it is on."""
    words = str(dtype_of(model)).removeprefix("torch.")
    if torch.is_autocast_enabled(device.type):
        cast = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
        words += f" under autocast to {cast}"
    return words


def weigh(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers."""
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
