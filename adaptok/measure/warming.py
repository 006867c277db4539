"""`adaptok.warm_up`: make the graphs of a compiled model before somebody waits for them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from adaptok.blocks import find_adaptive
from adaptok.budgeted import Budgeted, Settings
from adaptok.budgeted import budget as budgeted
from adaptok.budgets import Budget
from adaptok.chunking import Chunker
from adaptok.compiling import find_regional, is_compiled
from adaptok.errors import BudgetError, ConfigError, NotWrappedError
from adaptok.hosts import HostInputs, device_of, first_tensor
from adaptok.measure.latency import Progress, wait_for_device
from adaptok.measure.subjects import BudgetLike, Inputs, read_budgets, read_inputs

MOST_ROUNDS = 5  # two are the rule: one that makes graphs, and one that makes none
LENGTHS = 16  # at most; the graphs of changing lengths serve those between them
FEWEST = 1e-6  # share of the cells that means one cell


@dataclass(frozen=True, slots=True)
class WarmCalls:
    """The calls of one budget in a warm-up.

    Args:
        name: the budget in words, or the lengths that a budget may come to.
        calls: how often the model ran.
        graphs: graphs made by these calls.
        seconds: taken, compilation included.
    """

    name: str
    calls: int = 0
    graphs: int = 0
    seconds: float = 0.0

    def plus(self, graphs: int, seconds: float) -> "WarmCalls":
        """Return the same with one more call."""
        return WarmCalls(self.name, self.calls + 1, self.graphs + graphs, self.seconds + seconds)

    def __str__(self) -> str:
        return f"{self.name}: {count(self.graphs, 'graph')} in {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What a warm-up did; print it for a sentence.

    Args:
        budgets: what ran, in the order of the first round.
        rounds: how often all of it ran.
        settled: whether the last round made no graph any more.

    Example:
        >>> print(WarmUp((WarmCalls("keep=0.5", 2, 3, 8.44),), rounds=2, settled=True))
        3 graphs in 8.4 s, none in the last of 2 rounds (keep=0.5: 3 graphs in 8.4 s)
    """

    budgets: tuple[WarmCalls, ...]
    rounds: int
    settled: bool

    @property
    def graphs(self) -> int:
        """Graphs made; graphs of the backward pass are not counted."""
        return sum(part.graphs for part in self.budgets)

    @property
    def seconds(self) -> float:
        """Seconds taken, compilation included."""
        return sum(part.seconds for part in self.budgets)

    def __str__(self) -> str:
        end = "none in the last of" if self.settled else "some even in the last of"
        return (
            f"{count(self.graphs, 'graph')} in {self.seconds:.1f} s, {end} "
            f"{count(self.rounds, 'round')} ({'; '.join(map(str, self.budgets))})"
        )


@dataclass(frozen=True, slots=True, eq=False)
class WarmStep:
    """One call of a warm-up.

    Args:
        name: which entry of the report it belongs to.
        around: makes its budget.
        optional: whether it is left out where the model refuses the budget.
    """

    name: str
    around: Callable[[], AbstractContextManager[object]]
    optional: bool = False


def warm_up(
    model: nn.Module,
    inputs: Inputs,
    budgets: Sequence[BudgetLike] | None = None,
    *,
    progress: Progress | None = None,
) -> WarmUp:
    """Make the graphs that later calls of a compiled model need, before somebody waits for them.

    The model runs as it will run later: in the train or eval mode it is in, and under the
    `torch.inference_mode`, autocast and `adaptok.request` around this call, which all decide what
    is compiled. In train mode with gradients the backward pass runs, too. Where counts depend on
    the image (a natural budget or `drop=`, layouts `"packed"` and `"bucketed"`), the lengths that
    they may come to run as well. All of it is repeated until no graph is made any more.

    Graphs belong to a size of image, and to one sample or several: call it once for each of those
    that will come.

    Args:
        model: a model that `adaptok.compile` compiled.
        inputs: what it is called with: a tensor, a tuple of arguments, a mapping of arguments by
            name, or an `adaptok.HostInputs`.
        budgets: numbers (`keep`), mappings such as `{"drop": 0.3}`, or `adaptok.Budget`s; None is
            the budget that is set.
        progress: told the calls done, and all calls as far as is known.

    Returns:
        The graphs and seconds by budget. Budget, random numbers, buffers and gradients of the
        model are as before.

    Raises:
        NotWrappedError: nothing in the model is adaptive.
        ConfigError: the model is not compiled.
        BudgetError: a budget came twice or does not fit the model.
        ShapeError: there are no inputs.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit().eval(), chunker="dc", budget=0.5)
        >>> _ = adaptok.compile(vit, backend="eager")
        >>> with torch.inference_mode():
        ...     found = warm_up(vit, torch.randn(2, 3, 32, 48))
        >>> found.settled, found.budgets[0].name
        (True, 'keep=0.5')
    """
    check_compiled(model)
    given = read_inputs(inputs)
    steps = list_steps(model, budgets)
    device = device_of(model)
    found = {step.name: WarmCalls(step.name) for step in steps}
    with untouched(model):
        steps += list_lengths(model, given, steps)
        for rounds in range(1, MOST_ROUNDS + 1):
            before = count_graphs()
            for place, step in enumerate(steps):
                made = run_step(model, given, step, device)
                if made is not None:
                    found[step.name] = found.get(step.name, WarmCalls(step.name)).plus(*made)
                if progress is not None:
                    progress((rounds - 1) * len(steps) + place + 1, max(2, rounds) * len(steps))
            if count_graphs() == before:
                break
    settled = count_graphs() == before
    return WarmUp(tuple(found.values()), rounds, settled)


def check_compiled(model: object) -> None:
    """Raise unless `adaptok.compile` compiled a model."""
    if not isinstance(model, nn.Module) or not find_regional(model):
        raise NotWrappedError(
            f"nothing in a {type(model).__name__} is adaptive: call adaptok.wrap(model, ...) and "
            "adaptok.compile(model) first"
        )
    if not is_compiled(model):
        raise ConfigError(
            "this model is not compiled by adaptok, so that there are no graphs to make: call "
            "adaptok.compile(model) first (a copy of a compiled model is not compiled)"
        )


def list_steps(model: nn.Module, budgets: Sequence[BudgetLike] | None) -> list[WarmStep]:
    """Return one call per budget."""
    if budgets is not None:
        return [
            WarmStep(name, partial(budgeted, model, **options))
            for name, options in read_budgets(budgets).items()
        ]
    parts = find_parts(model)
    set_now = dict.fromkeys(describe_setting(part) for part in parts)
    return [WarmStep("; ".join(set_now) or "no budget", nullcontext)]


def describe_setting(part: Budgeted) -> str:
    """Return the budget that is set in words."""
    shown = part.budget_setting.describe()
    uncond = part.uncond_setting
    return shown if uncond is None else f"{shown}, unconditional {uncond.describe()}"


def list_lengths(model: nn.Module, inputs: HostInputs, steps: Sequence[WarmStep]) -> list[WarmStep]:
    """Return calls that run the lengths which budgets that depend on the image may come to.

    Args:
        model: the model.
        inputs: what it is called with.
        steps: the calls of the budgets.

    Returns:
        For each length, a call in which all samples have it; then calls in which each sample has
        another one, and a call with two lengths. None if every budget has an exact count.
    """
    parts = list(dict.fromkeys(part for step in steps for part in find_ragged(model, step)))
    if not parts:
        return []
    b = see_batch(model, inputs, chunker_of(parts[0]))
    lengths = min(LENGTHS, *(buckets_of(part) for part in parts))
    shares = [FEWEST, *((place + 1) / lengths for place in range(lengths))]
    rows = [[share] * b for share in shares]
    if b > 1:
        # from both ends, so that a row has short ones and long ones
        mixed = [shares[place // 2] if place % 2 else shares[-1 - place // 2] for place in range(b)]
        starts = range(0, len(shares), b)
        rows += [[shares[(at + i) % len(shares)] for i in range(b)] for at in starts]
        rows += [[shares[len(shares) // 2]] * (b - 1) + [shares[-1]], mixed]
    name = f"{lengths} lengths"
    return [WarmStep(name, partial(with_shares, parts, row), optional=True) for row in rows]


def find_ragged(model: nn.Module, step: WarmStep) -> list[Budgeted]:
    """Return the parts whose counts depend on the image with the budget of a call."""
    with step.around():
        return [
            part
            for part in find_parts(model)
            if chunker_of(part) is not None and not part.aside
            for budgets in [(part.budget_setting, part.uncond_setting)]
            if any(depends_on_image(part, budget) for budget in budgets if budget is not None)
        ]


def depends_on_image(part: Budgeted, budget: Budget) -> bool:
    """Say whether the image decides how many cells a part keeps."""
    chunker = chunker_of(part)
    known = budget.is_exact or budget.target_ms is not None
    return chunker is not None and not known and chunker.waits_for_device(budget)


def find_parts(model: nn.Module) -> list[Budgeted]:
    """Return the parts of a model that take a budget; a wrap may have none."""
    return [module for module in model.modules() if isinstance(module, Budgeted)]


def chunker_of(part: Budgeted) -> Chunker | None:
    """Return what decides over the cells of a part, where it has such a thing."""
    chunker = getattr(part, "chunker", None)
    return chunker if isinstance(chunker, Chunker) else None


def buckets_of(part: Budgeted) -> int:
    """Return how many lengths a part may come to."""
    chunker = chunker_of(part)
    buckets = getattr(chunker, "buckets", None)
    bucketed = getattr(chunker, "layout", None) == "bucketed"
    return buckets if bucketed and isinstance(buckets, int) else LENGTHS


def see_batch(model: nn.Module, inputs: HostInputs, chunker: Chunker | None) -> int:
    """Return the samples of the calls of a chunker, which need not be those of the inputs."""
    assert chunker is not None
    seen: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].x.shape[0])

    hook = chunker.register_forward_pre_hook(note)
    try:  # looking on makes other graphs: none of them for one call
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            model(*inputs.args, **inputs.kwargs)
    finally:
        hook.remove()
    return seen[0] if seen else 1


@contextmanager
def with_shares(parts: Sequence[Budgeted], shares: Sequence[float]) -> Iterator[None]:
    """Run parts with one share of the cells per sample."""
    before = [Settings.of(part) for part in parts]
    try:
        for part in parts:
            part.take_budget(Budget(keep=shares), None)
        yield
    finally:
        for settings in before:
            settings.restore()


def run_step(
    model: nn.Module, inputs: HostInputs, step: WarmStep, device: torch.device
) -> tuple[int, float] | None:
    """Run one call.

    Returns:
        Graphs made and seconds taken; None where an optional budget was refused.
    """
    start, before = time.perf_counter(), count_graphs()
    try:
        with step.around():
            run_call(model, inputs)
    except BudgetError:
        if step.optional:
            return None
        raise
    except Exception as error:
        error.add_note(f"raised in adaptok.warm_up by the call of: {step.name}")
        raise
    wait_for_device(device)
    return count_graphs() - before, time.perf_counter() - start


def run_call(model: nn.Module, inputs: HostInputs) -> None:
    """Run a model once, in train mode with its backward pass."""
    out = model(*inputs.args, **inputs.kwargs)
    if not (model.training and torch.is_grad_enabled()):
        return
    blocks = find_adaptive(model)
    x = first_tensor(out) if blocks is None else blocks.backbone.output(out)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if x.requires_grad and weights:  # returned, not added to the gradients that are there
        torch.autograd.grad(x, weights, torch.ones_like(x), allow_unused=True)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave random numbers, and in train mode the buffers, as they are."""
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    changing = any(module.training for module in model.modules())
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()] if changing else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)


def count_graphs() -> int:
    """Return how many graphs this process has made."""
    return int(counters["stats"]["unique_graphs"])


def count(number: int, word: str) -> str:
    """Return a number with its word.

    Example:
        >>> count(1, "graph"), count(2, "graph")
        ('1 graph', '2 graphs')
    """
    return f"{number} {word}{'' if number == 1 else 's'}"
