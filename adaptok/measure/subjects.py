"""What a benchmark runs: an adaptive model with its inputs, and how its tokens are seen."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptok.blocks import AdaptiveBlocks, find_adaptive
from adaptok.budgeted import budget as budgeted
from adaptok.budgets import AMOUNTS, Amount, Budget, listed
from adaptok.calls import BlockCall
from adaptok.chunking import ChunkPlan
from adaptok.dc.baseline import DiT
from adaptok.dc.model import DCDiT
from adaptok.errors import BudgetError, ConfigError, NotWrappedError, ShapeError
from adaptok.hosts import HostInputs, bind_arguments, first_tensor
from adaptok.measure.flops import count_flops
from adaptok.observers import Observer
from adaptok.routing import Routing
from adaptok.tracing import observe, plain

Inputs = Tensor | Sequence[Any] | Mapping[str, Any] | HostInputs


@dataclass(frozen=True, slots=True)
class SeenTokens:
    """The grid tokens of the samples of one call.

    Args:
        cells: cells of a sample.
        requested: what the budget asked for, per sample.
        computed: what really ran, per sample.
        formula_flops: operations of the call by a closed form, where there is one.
    """

    cells: int
    requested: tuple[int, ...]
    computed: tuple[int, ...]
    formula_flops: float | None = None


class Subject(ABC):
    """An adaptive model with the inputs of a call.

    Args:
        model: the model.
        inputs: what it is called with.
    """

    def __init__(self, model: nn.Module, inputs: HostInputs) -> None:
        self.model = model
        self.inputs = inputs

    @property
    @abstractmethod
    def method(self) -> str:
        """What makes the model adaptive, in words."""

    @property
    @abstractmethod
    def full(self) -> str:
        """What the model is compared with if nothing else is given, in words."""

    @abstractmethod
    def run_full(self) -> AbstractContextManager[object]:
        """Let the model run as what it is compared with, for a while."""

    @abstractmethod
    def see_tokens(self) -> tuple[SeenTokens, Tensor]:
        """Run one uncompiled call with the budget of the moment and look at its tokens.

        Returns:
            The tokens and the output.
        """

    def see_baseline_tokens(self, baseline: object) -> SeenTokens | None:
        """Return the tokens of a baseline that was given, where they are known."""
        return None

    def output(self, out: Any) -> Tensor:  # noqa: ANN401
        """Return the tensor of an output that is compared."""
        return first_tensor(out)

    def call(self, run: Callable[..., Any]) -> Any:  # noqa: ANN401
        """Call something with the inputs."""
        return run(*self.inputs.args, **self.inputs.kwargs)


class TokenMeter(Observer):
    """Notes how many grid tokens each sample of the calls of a wrapped model ran with."""

    def __init__(self) -> None:
        self.cells = 0
        self.requested: list[int] = []
        self.computed: list[int] = []
        self.last: ChunkPlan | None = None

    def note_entry(self, call: BlockCall) -> None:
        """Begin a call."""
        self.last, self.cells = None, call.num_cells

    def note_plan(self, stage: str, routing: Routing, plan: ChunkPlan) -> None:
        """Take in a decision; the last one counts."""
        self.last = plan

    def note_exit(self, call: BlockCall) -> None:
        """End a call; without a decision all cells ran."""
        b = call.x.shape[0]
        plan = self.last
        self.requested += [self.cells] * b if plan is None else plan.requested.tolist()
        self.computed += [self.cells] * b if plan is None else plan.computed.tolist()


class WrappedSubject(Subject):
    """A wrapped model; it is compared with itself without its stages."""

    def __init__(self, model: nn.Module, inputs: HostInputs, blocks: AdaptiveBlocks) -> None:
        super().__init__(model, inputs)
        self.blocks = blocks

    @property
    def method(self) -> str:
        """The stages in words (see `Subject.method`)."""
        parts = [
            ", ".join(
                f"{name} {text}" for name, text in stage.describe().items() if name != "budget"
            )
            for stage in self.blocks.stages
        ]
        first, last = self.blocks.span
        count = len(self.blocks.all_blocks)
        span = "all" if (first, last) == (0, count) else f"{first} to {last - 1} of"
        return f"{'; '.join(parts)}; around {span} {count} blocks"

    @property
    def full(self) -> str:
        """See `Subject.full`."""
        return "the same model without its stages"

    def run_full(self) -> AbstractContextManager[object]:
        """See `Subject.run_full`."""
        return plain(self.model)

    def see_tokens(self) -> tuple[SeenTokens, Tensor]:
        """See `Subject.see_tokens`."""
        meter = TokenMeter()
        with observe(self.model, meter):
            out = self.output(self.call(self.model))
        return SeenTokens(meter.cells, tuple(meter.requested), tuple(meter.computed)), out

    def output(self, out: Any) -> Tensor:  # noqa: ANN401
        """See `Subject.output`."""
        return self.blocks.backbone.output(out)


class ReferenceSubject(Subject):
    """A DCDiT; without another baseline it is compared with itself at keep=1."""

    def __init__(self, model: DCDiT, inputs: HostInputs) -> None:
        self.given = bind_arguments(("x", "t", "y"), inputs.args, inputs.kwargs)
        if set(self.given) != {"x", "t", "y"}:
            given = ", ".join(sorted(self.given)) or "nothing"
            raise ConfigError(
                f"a DCDiT is measured with x, t and y, got {given}: budgets go into budgets="
            )
        super().__init__(model, inputs)
        self.reference = model

    @property
    def method(self) -> str:
        """See `Subject.method`."""
        return f"layout {self.reference.config.layout!r}"

    @property
    def full(self) -> str:
        """See `Subject.full`."""
        return "the same model at keep=1 (no baseline was given)"

    def run_full(self) -> AbstractContextManager[object]:
        """See `Subject.run_full`."""
        return budgeted(self.model, keep=1.0)

    def see_tokens(self) -> tuple[SeenTokens, Tensor]:
        """See `Subject.see_tokens`."""
        model = self.reference
        x, t, y = (self.given[name] for name in ("x", "t", "y"))
        out, plan = model.run(x, t, y, model.budget_setting)
        computed = tuple(plan.computed.tolist())
        h, w = plan.grid
        flops = count_flops(model.config, (h, w), computed)
        seen = SeenTokens(h * w, tuple(plan.requested.tolist()), computed, flops)
        return seen, out

    def see_baseline_tokens(self, baseline: object) -> SeenTokens | None:
        """Return the patches of a fixed-patch DiT (see `Subject.see_baseline_tokens`)."""
        if not isinstance(baseline, DiT):
            return None
        b, _, h, w = self.given["x"].shape
        patches = (h // baseline.config.patch_size) * (w // baseline.config.patch_size)
        counts = (patches,) * b
        flops = count_flops(baseline.config, (h, w), counts)
        return SeenTokens(patches, counts, counts, flops)


def open_subject(model: object, inputs: Inputs) -> Subject:
    """Return a model with its inputs, ready to be measured.

    Args:
        model: a wrapped model or a `DCDiT`.
        inputs: a tensor, a sequence of arguments, a mapping of arguments by name, or both as
            `HostInputs`.

    Returns:
        The subject.

    Raises:
        NotWrappedError: the model is neither wrapped nor a DCDiT.
        ConfigError: it is compiled already, or a DCDiT gets other inputs than x, t and y.
        ShapeError: there are no inputs.
    """
    given = read_inputs(inputs)
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ConfigError(
            "this model is compiled already: give the model itself and compile=True, so that both "
            "sides are compiled alike"
        )
    if isinstance(model, nn.Module):
        blocks = find_adaptive(model)
        if blocks is not None:
            return WrappedSubject(model, given, blocks)
    if isinstance(model, DCDiT):
        return ReferenceSubject(model, given)
    raise NotWrappedError(
        f"a {type(model).__name__} is neither wrapped nor an adaptok.DCDiT, so that there are no "
        "tokens to save: call adaptok.wrap(model, chunker=...) first"
    )


def read_inputs(inputs: Inputs) -> HostInputs:
    """Return the arguments of a call, however they were given."""
    if isinstance(inputs, HostInputs):
        given = inputs
    elif isinstance(inputs, Tensor):
        given = HostInputs((inputs,))
    elif isinstance(inputs, Mapping):
        given = HostInputs((), dict(inputs))
    elif isinstance(inputs, tuple | list):
        given = HostInputs(tuple(inputs))
    else:
        raise ShapeError(
            "inputs is a tensor, a tuple of arguments, a mapping of arguments by name or an "
            f"adaptok.HostInputs, got a {type(inputs).__name__}"
        )
    if not given.args and not given.kwargs:
        raise ShapeError("inputs is empty: give what the model is called with")
    return given


def describe_inputs(inputs: HostInputs) -> tuple[str, ...]:
    """Name the tensors of a call with their dtypes and shapes.

    Example:
        >>> describe_inputs(HostInputs((torch.zeros(2, 3),), {"scale": 1.5}))
        ('0: float32 (2, 3)', 'scale: 1.5')
    """
    given = {str(place): value for place, value in enumerate(inputs.args)} | dict(inputs.kwargs)
    return tuple(f"{name}: {describe_value(value)}" for name, value in given.items())


def describe_value(value: object) -> str:
    """Name one argument."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, bool | int | float | str) or value is None:
        return str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(dict.fromkeys(map(describe_value, value)))}] x {len(value)}"
    return type(value).__name__


BudgetLike = float | Mapping[str, Any] | Budget
BUDGET_NAMES = (*AMOUNTS, "uncond_drop")


def read_budgets(budgets: Sequence[BudgetLike]) -> dict[str, dict[str, Any]]:
    """Return the options of `adaptok.budget` for each budget, by its name in words.

    Args:
        budgets: numbers (`keep`), mappings such as `{"drop": 0.3}`, or `Budget`s.

    Returns:
        Options by name.

    Raises:
        BudgetError: there are none, one is no budget or out of range, or two are the same.

    Example:
        >>> read_budgets([1.0, {"drop": 0.3}, Budget(tokens=9), Budget()])
        {'keep=1': {'keep': 1.0}, 'drop=0.3': {'drop': 0.3}, 'tokens=9': {'tokens': 9},
         'natural': {}}
    """
    if isinstance(budgets, str | Mapping) or not isinstance(budgets, Sequence):
        raise BudgetError(f"budgets is a list of budgets, got {budgets!r}: write [{budgets!r}]")
    if not budgets:
        raise BudgetError("there are no budgets to measure: give at least one, such as [0.5]")
    found: dict[str, dict[str, Any]] = {}
    for budget in budgets:
        options = read_budget(budget)
        name = name_budget(options)
        if name in found:
            raise BudgetError(f"the budget {name} came twice: give each once")
        found[name] = options
    return found


def read_budget(budget: BudgetLike) -> dict[str, Any]:
    """Return the options of `adaptok.budget` for one budget."""
    if isinstance(budget, Budget):
        if budget.places is not None:
            return {"tokens": int(budget.places.shape[0])}
        if budget.target_ms is not None:
            raise BudgetError(
                f"{budget.describe()} is no budget of a benchmark: give keep=, tokens= or drop=, "
                f"or ask adaptok.plan(model, inputs, target_ms={budget.target_ms:g})"
            )
        amounts = {name: getattr(budget, name) for name in AMOUNTS}
        return {name: amount for name, amount in amounts.items() if amount is not None}
    if isinstance(budget, Mapping):
        unknown = [name for name in budget if name not in BUDGET_NAMES]
        if unknown:
            raise BudgetError(f"a budget knows {', '.join(BUDGET_NAMES)}, got {unknown[0]!r}")
        return {name: amount for name, amount in budget.items() if amount is not None}
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise BudgetError(
            f"a budget is a number (keep), a mapping or an adaptok.Budget, got {budget!r}"
        )
    return {"keep": budget}


def name_budget(options: Mapping[str, Any]) -> str:
    """Return a budget in words, and refuse what is out of range."""
    Budget(**{name: amount for name, amount in options.items() if name in AMOUNTS})
    if "uncond_drop" in options:
        Budget(drop=options["uncond_drop"])
    words = [f"{name}={show_amount(amount)}" for name, amount in options.items()]
    return ", ".join(words) or "natural"


def show_amount(amount: Amount) -> str:
    """Write one number, or one per sample.

    Example:
        >>> show_amount(1.0), show_amount([0.25, 0.5])
        ('1', '[0.25, 0.5]')
    """
    values = [f"{value:g}" for value in listed(amount)]
    return values[0] if len(values) == 1 else f"[{', '.join(values)}]"
