"""Checks of stages."""

from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptok.budgeted import Budgeted
from adaptok.budgets import Budget, apply_budget
from adaptok.calls import BlockCall
from adaptok.errors import BudgetError
from adaptok.registry import Kind
from adaptok.stages import Effects, Stage
from adaptok.testing.cases import (
    GRID,
    HALF,
    ODD_GRIDS,
    Answer,
    PartCase,
    PartSpec,
    find_budget,
    make_call,
    make_images,
    make_tokens,
    measure_error,
    require_close,
    with_budget,
)
from adaptok.testing.host_checks import HOST_CHECKS, TOLERANCE, check_prefix, is_equal
from adaptok.testing.host_checks import check_identity as check_host_stays
from adaptok.testing.models import DEPTH, WIDTH
from adaptok.testing.module_checks import MODULE_CHECKS
from adaptok.testing.module_checks import check_inputs as check_tokens_stay
from adaptok.testing.report import NotRun, Report, require, run_checks
from adaptok.testing.router_checks import require_gradients
from adaptok.testing.toy_blocks import make_range, mix_tokens
from adaptok.tokens import Tokens
from adaptok.tracing import trace
from adaptok.wrapping import wrap

EXACT = (HALF, Budget(keep=0.13), Budget(tokens=5), Budget(tokens=1), Budget(keep=1.0))
UNEVEN = (Budget(tokens=[24, 1, 7]), Budget(keep=[0.2, 1.0, 0.55]))
UNCHANGED = (
    *("grid", "start", "cells", "numbers", "shared", "condition", "observers", "checkpoint"),
    *("timestep", "has_class", "part", "timestep_scale"),
)


class StageCase(PartCase):
    """A stage that is checked (see `PartCase`)."""

    kind: ClassVar[Kind] = "stage"

    def answer(self, part: nn.Module, tokens: Tokens, budget: Budget = HALF) -> Answer:
        """Return the tokens after blocks that mix them, the others and the text too."""
        after = with_budget(part, budget)(make_range(part), make_call(tokens))
        return (after.x, *(value for value in after.streams.values() if value is not None))

    def stage(self, part: nn.Module) -> Stage:
        """Return the stage itself."""
        assert isinstance(part, Stage)
        return part


def run_watched(case: StageCase, budget: Budget) -> tuple[BlockCall, BlockCall, list[BlockCall]]:
    """Run a stage and return the call before, the one after, and those that the blocks got."""
    part = with_budget(case.make_filled(), budget)
    before = make_call(make_tokens(width=case.width))
    seen: list[BlockCall] = []

    def watch(call: BlockCall, first: int, last: int) -> BlockCall:
        seen.append(call)
        return mix_tokens(call, first, last)

    with torch.no_grad():
        after = part(make_range(part, watch), before)
    return before, after, seen


def check_count(case: StageCase) -> None:
    """It leaves the number of tokens as it was, of the grid, around it and in other streams."""
    for budget in (HALF, Budget(tokens=1), Budget(keep=1.0)):
        call, after, _ = run_watched(case, budget)
        shape, needed = tuple(after.x.shape), tuple(call.x.shape)
        require(shape == needed, f"{needed} came, and {shape} went on")
        for name, stream in call.streams.items():
            found = after.streams.get(name)
            require(
                found is not None and stream is not None and found.shape == stream.shape,
                f"the stream {name!r} is not there, or has another shape",
            )


def check_call(case: StageCase) -> None:
    """All else that the blocks behind it need comes back as it was."""
    call, after, _ = run_watched(case, HALF)
    for name in UNCHANGED:
        require(
            is_equal(getattr(after, name), getattr(call, name)),
            f"{name} of the call changed: go on from the call that came",
        )
    for name in ("token_inputs", "sample_inputs", "depth_inputs"):
        found, needed = getattr(after, name), getattr(call, name)
        require(
            found.keys() == needed.keys() and all(found[key] is needed[key] for key in needed),
            f"{name} of the call changed: go on from the call that came",
        )


def check_effects(case: StageCase) -> None:
    """Its effects are declared, and tell the truth about the token count."""
    part = case.make()
    assert isinstance(part, Stage)
    effects = getattr(part, "effects", None)
    require(isinstance(effects, Effects), "it declares no effects: adaptok.Effects(axis) is needed")
    call, _, seen = run_watched(case, HALF)
    n, counts = call.num_cells, [inner.num_cells for inner in seen]
    if not part.effects.changes_count:
        fewer = any(count < n for count in counts)
        require(not fewer, "the blocks got fewer tokens, and changes_count is not declared")
        return
    require(
        max(counts, default=n) <= n and counts and counts[-1] < n,
        f"changes_count is declared, and of {n} tokens the blocks got {counts}: the last ones get "
        "fewer, and none gets more",
    )
    model = case.attach(case.make_host(), case.make_filled())
    with trace(model) as steps, torch.no_grad():
        model(make_images())
    require(
        len(steps.steps[0].plans) > 0,
        "a trace shows no plan: tell it to call.observers by note_plan",
    )


def check_budgets(case: StageCase) -> None:
    """The blocks compute what the budget asks for, exactly, also sample by sample."""
    part = case.make_filled()
    assert isinstance(part, Stage)
    if not part.effects.changes_count or not any(isinstance(m, Budgeted) for m in part.modules()):
        raise NotRun("it takes no budget")
    model = case.attach(case.make_host(), part)
    bucketed = any(getattr(m, "layout", None) == "bucketed" for m in part.modules())
    for budget in (*EXACT, *UNEVEN):
        with_budget(part, budget)
        try:
            with trace(model) as steps, torch.no_grad():
                model(make_images())
        except BudgetError:
            if budget in EXACT:
                raise
            continue  # a stage of one static count refuses it, which is allowed
        (step,) = steps.steps
        needed = apply_budget(step.routings[0], budget).kept.tolist()
        kept = step.kept.tolist()
        enough = all(ran >= count for ran, count in zip(kept, needed, strict=True))
        if bucketed and budget in UNEVEN and enough:  # groups of samples are filled up
            kept = step.plans[0].requested.tolist()
        require(kept == needed, f"{budget.describe()} asks for {needed} tokens, {kept} ran")


def check_identity(case: StageCase) -> None:
    """With every cell kept, a host computes what it computed before, text beside it too."""
    check_host_stays(case)
    part = case.make()
    if getattr(getattr(part, "chunker", None), "layout", None) == "packed":
        return  # packed forms take no text
    call = make_call(make_tokens(width=case.width))
    with torch.no_grad():
        expected = mix_tokens(call, 0, DEPTH)
    after = case.answer_seeded(part, make_tokens(width=case.width), Budget(keep=1.0))
    text = expected.streams["text"]
    assert text is not None
    require_close(
        after[:1], (expected.x,), TOLERANCE, "with every cell kept, the blocks give other tokens"
    )
    require_close(
        after[1:],
        (text,),
        TOLERANCE,
        "with every cell kept, the text behind the blocks is not theirs: go on from the call that "
        "came out of one piece, streams and all",
    )


def check_extremes(case: StageCase) -> None:
    """Grids of every shape work with every cell kept, and with one token."""
    part = case.make_filled()
    for grid in (*ODD_GRIDS, GRID):
        for budget in (Budget(keep=1.0), Budget(tokens=1)):
            tokens = make_tokens(grid, width=case.width)
            x, *_ = case.answer_seeded(part, tokens, budget)
            require(
                x.shape[1] == make_call(tokens).x.shape[1] and bool(x.isfinite().all()),
                f"on a grid {grid}, {budget.describe()}: no finite token per cell",
            )


def check_inputs(case: StageCase) -> None:
    """The tokens that came, in front, behind and beside the grid too, are left as they are."""
    part = with_budget(case.make_filled(), HALF)
    call = make_call(make_tokens(width=case.width))
    given = {"x": call.x, **call.streams, **call.sample_inputs}
    before = {name: None if x is None else x.clone() for name, x in given.items()}
    with torch.no_grad():
        part(make_range(part), call)
    for name, x in given.items():
        require(is_equal(x, before[name]), f"{name} of the call changed in place: work on a copy")


def check_gradient(case: StageCase) -> None:
    """In training, a gradient reaches every weight of the host, and the stage's own."""
    part = case.make_filled()
    model = train_host(case.make_host(DEPTH + 1), case.stage(part))
    missing = [
        name
        for name, p in model.named_parameters()
        if p.grad is None and ".adaptok." not in name and not name.startswith("head")
    ]
    require(not missing, f"no gradient reaches {', '.join(missing[:5])} of the host")
    if case.has_weights(part):
        require_gradients(part)


def train_host(model: nn.Module, stage: Stage) -> nn.Module:
    """Wrap a host, run it forward and backward, and return it with its gradients.

    Args:
        model: a host of `DEPTH + 1` blocks: one is behind the span, so that the loss sees all
            cells, and in front of it are as many as a part is told that there are.
        stage: what it is wrapped with.
    """
    budget = find_budget(stage, HALF)
    wrap(model, stack=[stage], budget=budget, span=(0, DEPTH), verify=False)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (model(make_images()) ** 2).sum().backward()
    return model


def check_checkpointing(case: StageCase) -> None:
    """Under the host's gradient checkpointing gradients are the same, and blocks run again."""
    plain = gradients_of(train_host(case.make_host(DEPTH + 1), case.stage(case.make_filled())))
    model = case.make_host(DEPTH + 1)
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    runs = []
    norm = model.get_submodule("blocks.0.norm1")  # halves are not run by a block with a hook on it
    norm.register_forward_pre_hook(lambda *_: runs.append(1))
    found = gradients_of(train_host(model, case.stage(case.make_filled())))
    require(found.keys() == plain.keys(), "other weights have a gradient under checkpointing")
    for name, gradient in found.items():
        error = measure_error(gradient, plain[name])
        require(error <= TOLERANCE, f"the gradient of {name} differs by {error:.2g} (relative)")
    require(
        len(runs) >= 2,
        "blocks are not checkpointed: run inner on a call made from the one that came",
    )


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a model by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


STAGE_CHECKS = (
    check_effects,
    check_count,
    check_call,
    check_budgets,
    check_identity,
    check_extremes,
    check_inputs,
    check_gradient,
    check_checkpointing,
    check_prefix,
    *(check for check in MODULE_CHECKS if check is not check_tokens_stay),
    *(check for check in HOST_CHECKS if check is not check_host_stays),
)


def check_stage(
    part: PartSpec,
    *,
    width: int = WIDTH,
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Check whether a stage does what `adaptok.wrap` and its user rely on.

    Args:
        part: a registered name, a mapping with options, a class, a function that makes a stage,
            or an instance, of which copies are checked. A parameter called `width` is filled.
        width: features of a token, where an instance has weights of another width.
        skip: names of checks that are not run, and why.
        only: names of the only checks to run.

    Returns:
        The report; print it, or `report.raise_failed()`.

    Raises:
        ConfigError: the part is no stage, or there is no check of a name.
        UnknownNameError: there is no stage of that name.

    Example:
        >>> import adaptok
        >>> class Nothing(adaptok.Stage):
        ...     effects = adaptok.Effects("depth")
        ...     def forward(self, inner, call):
        ...         return inner(call)
        >>> check_stage(Nothing, only=["effects", "count", "budgets"])
        stage 'Nothing': 2 passed, 0 failed, 1 not run
        effects  passed   Its effects are declared, and tell the truth about the token count
        count    passed   It leaves the number of tokens as it was, of the grid, around it and ...
        budgets  not run  it takes no budget
    """
    case = StageCase(part, width)
    return run_checks(case.title, STAGE_CHECKS, case, skip, only)
