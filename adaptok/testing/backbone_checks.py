"""Checks of backbones: adapters of a family of hosts, each with a host."""

import inspect
import math
import pickle
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from adaptok.blocks import find_adaptive
from adaptok.budgeted import budget as budget_for
from adaptok.budgets import Budget
from adaptok.errors import AdaptokError
from adaptok.hosts import Backbone, HostInputs, NoMatch
from adaptok.testing.backbone_cases import (
    BackboneCase,
    InputSpec,
    ModelSpec,
    Shuffle,
    find_image,
    listen,
    measure_change,
    pick_sample,
    replace_tensors,
)
from adaptok.testing.cases import HALF, measure_error
from adaptok.testing.host_checks import TOLERANCE
from adaptok.testing.module_checks import tensors_in
from adaptok.testing.report import NotRun, Report, require, run_checks
from adaptok.testing.wrapped_checks import WRAPPED_CHECKS
from adaptok.tracing import trace

REORDERED = 1e-4  # relative: attention over other orders and batches sums in another order
CONTROL = 0.01  # what leaving out half of the tokens must change at least
SWITCHES = (
    "set_grad_checkpointing",
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
    "enable_gradient_checkpointing",
)


def check_match(case: BackboneCase) -> None:
    """It fits this host, reads off its sizes, and no other model."""
    model = case.make_model()
    host, call = case.resolve(model), case.watch()
    blocks = [b for path in host.containers for b in model.get_submodule(path).children()]
    depth, width = len(blocks), call.x.shape[-1]
    require(host.depth == depth, f"it says {host.depth} blocks, the host has {depth}")
    require(host.width == width, f"it says tokens of {host.width} features, they have {width}")
    axes = len(call.grid)
    require(host.grid_axes == axes, f"it says a grid of {host.grid_axes} axes, it has {axes}")
    try:
        found = type(host).match(nn.Sequential(nn.Linear(3, 3)))
    except NoMatch:
        return
    require(False, f"it matches a plain nn.Sequential as {type(found).__name__}: raise NoMatch")


def check_plain(case: BackboneCase) -> None:
    """The adapter of a host holds plain values only, and can be pickled."""
    host = case.resolve(case.make_model())
    held = [name for name, value in vars(host).items() if list(tensors_in(value))]
    require(not held, f"it holds tensors in {', '.join(held)}: they would go stale")
    pickle.loads(pickle.dumps(host))


def check_example(case: BackboneCase) -> None:
    """Its own example has two samples, and passes the probe of `adaptok.wrap`."""
    model = case.make_model()
    example = case.resolve(model).example(model)
    b = case.watch(example).x.shape[0]
    require(b == 2, f"its example has {b} samples: two are needed")
    case.attach(model, HALF, verify=True)


def check_reacts(case: BackboneCase) -> None:
    """Leaving out half of the tokens changes the output; otherwise nothing here means anything."""
    model = case.make_model()
    inputs = case.inputs(model)
    full = case.run(model, inputs)
    error = measure_error(case.run(case.attach(model, HALF), inputs), full)
    require(
        error > CONTROL,
        f"without half of its tokens the host changes by {error:.2g} (relative) only: give it "
        "larger weights",
    )


def check_identity(case: BackboneCase) -> None:
    """With every cell kept, the host computes what it computed before."""
    model = case.make_model()
    inputs = case.inputs(model)
    expected = case.run(model, inputs)
    error = measure_error(case.run(case.attach(model, Budget(keep=1.0)), inputs), expected)
    require(error <= TOLERANCE, f"with every cell kept it differs by {error:.2g} (relative)")


def check_trace(case: BackboneCase) -> None:
    """One call of the host enters its blocks once, with its grid."""
    model = case.make_model()
    inputs = case.inputs(model)
    case.attach(model, HALF)
    with trace(model) as steps:
        case.run(model, inputs)
        case.run(model, inputs)
    entries = len(steps.steps)
    require(entries == 2, f"two calls entered the blocks {entries} times")
    n = math.prod(steps.steps[0].grid)
    kept = steps.steps[0].kept.tolist()
    require(set(kept) == {HALF.count(n)}, f"of {n} cells {kept} were kept")


def check_fewer(case: BackboneCase) -> None:
    """The blocks really get fewer tokens, and all of those that are no cells."""
    call = case.watch()
    n, m, width = call.num_cells, HALF.count(call.num_cells), call.x.shape[-1]
    others = call.x.shape[1] - n
    model, shapes = case.make_model(), list[tuple[int, ...]]()
    inputs = case.inputs(model)
    blocks = find_adaptive(case.attach(model, HALF))
    assert blocks is not None

    listen(blocks.all_blocks, lambda x: shapes.append(tuple(x.shape)))
    case.run(model, inputs)
    rows = {shape[1] for shape in shapes if len(shape) == 3 and shape[2] == width}
    require(others + n not in rows, f"a block gets {others + n} tokens, which is all of them")
    require(
        others + m in rows,
        f"no block gets {others + m} tokens: {m} of the cells, and {others} others",
    )


def check_cells(case: BackboneCase) -> None:
    """Exactly the cells of the grid change with the image, no class, register or text token."""
    before = case.watch()
    require(
        find_image(case, before) is not None,
        f"no argument changes exactly the rows {before.start} to "
        f"{before.start + before.num_cells - 1}, which are said to be the grid {before.grid}",
    )


def check_grid(case: BackboneCase) -> None:
    """The cells lie row by row: the corners of the image change the corners of the grid."""
    before = case.watch()
    found = find_image(case, before)
    h, w = (1, *before.grid)[-2:]
    if found is None or len(found) > 1 or found[0][1].ndim < 4:
        raise NotRun("no argument is an image of this grid")
    ((path, image),) = found
    frames = range(before.start, before.start + before.num_cells, h * w)
    corners = {"upper right": (0, -1, w - 1), "lower left": (-1, 0, (h - 1) * w)}
    inputs = case.inputs(case.make_model())
    for name, (y, x, cell) in corners.items():
        changed = image.clone()
        changed[..., y, x] += 1.0
        change = measure_change(case, before, replace_tensors(inputs, {path: changed}))
        rows = [start + int(change[start : start + h * w].argmax()) for start in frames]
        needed = [start + cell for start in frames]
        require(
            rows == needed,
            f"the {name} corner of the image changes rows {rows[:4]} most, which should be "
            f"{needed[:4]} of a grid {before.grid}",
        )


def check_order(case: BackboneCase) -> None:
    """What belongs to a token (positions, masks) goes with it: shuffled cells change nothing."""
    model = case.make_model()
    inputs = case.inputs(model)
    expected = case.run(model, inputs)
    error = measure_error(case.run(case.attach(model, None, Shuffle()), inputs), expected)
    require(
        error <= REORDERED,
        f"with its cells in another order the host differs by {error:.2g} (relative): name every "
        "argument with one row per token in token_inputs, with its axes and start",
    )


def check_batch(case: BackboneCase) -> None:
    """With budgets of its own a sample is the same alone and beside others."""
    model = case.make_model()
    inputs = case.inputs(model)
    b = case.watch().x.shape[0]
    case.attach(model, HALF)
    keep = [0.25 + 0.5 * sample / max(b - 1, 1) for sample in range(b)]
    for amounts in (None, keep):
        together = run_with(case, model, amounts, inputs)
        require(together.shape[0] == b, f"{b} samples came, and {together.shape[0]} went out")
        for sample in range(b):
            own = None if amounts is None else amounts[sample]
            alone = run_with(case, model, own, pick_sample(inputs, sample, b))
            error = measure_error(together[sample : sample + 1], alone)
            said = "the natural budget" if amounts is None else f"keep={amounts}"
            require(
                error <= REORDERED,
                f"with {said}, sample {sample} differs by {error:.2g} (relative) alone: name "
                "arguments with one row per sample in sample_inputs",
            )


def run_with(
    case: BackboneCase, model: nn.Module, keep: float | list[float] | None, inputs: HostInputs
) -> Tensor:
    """Run a wrapped host with a budget."""
    with budget_for(model, keep=keep):
        return case.run(model, inputs)


def check_keywords(case: BackboneCase) -> None:
    """The host may be called by position and by name."""
    model = case.make_model()
    inputs = case.inputs(model)
    signature = inspect.signature(model.forward)
    given = signature.bind(*inputs.args, **inputs.kwargs).arguments
    kinds = {name: signature.parameters[name].kind for name in given}
    if inspect.Parameter.VAR_POSITIONAL in kinds.values():
        raise NotRun("the host takes any number of arguments")
    named: dict[str, object] = {}
    for name, value in given.items():
        named.update(value if kinds[name] == inspect.Parameter.VAR_KEYWORD else {name: value})
    placed = []
    for name, parameter in signature.parameters.items():
        if name not in given or parameter.kind != inspect.Parameter.POSITIONAL_OR_KEYWORD:
            break
        placed.append(name)
    by_place = HostInputs(
        tuple(named[name] for name in placed),
        {name: value for name, value in named.items() if name not in placed},
    )
    case.attach(model, HALF)
    first, second = case.run(model, HostInputs((), named)), case.run(model, by_place)
    require(torch.equal(first, second), "called by name it computes something else than by place")


def check_checkpointing(case: BackboneCase) -> None:
    """Under the host's gradient checkpointing gradients are the same, and blocks run again."""
    switch = next((s for s in SWITCHES if callable(getattr(case.make_model(), s, None))), None)
    if switch is None:
        raise NotRun("the host has no gradient checkpointing")
    plain, once = find_gradients(case, None)
    found, runs = find_gradients(case, switch)
    require(found.keys() == plain.keys(), "other weights have a gradient under checkpointing")
    for name, gradient in found.items():
        error = measure_error(gradient, plain[name])
        require(error <= REORDERED, f"the gradient of {name} differs by {error:.2g} (relative)")
    require(runs > once, "the blocks are not checkpointed: nothing in them runs a second time")


def find_gradients(case: BackboneCase, switch: str | None) -> tuple[dict[str, Tensor], int]:
    """Return a wrapped host's gradients, and how often modules of its first block ran."""
    model, runs = case.make_model(), list[Tensor]()
    inputs = case.inputs(model)
    if switch is not None:
        getattr(model, switch)()
    case.attach(model, HALF)
    blocks = find_adaptive(model)
    assert blocks is not None
    listen(blocks.all_blocks[:1], runs.append)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = case.read_output(model(*inputs.args, **inputs.kwargs))
        (out.float() ** 2).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(runs)


def check_refused(case: BackboneCase) -> None:
    """Options that reach into single blocks are refused in words, never ignored."""
    if not case.refused:
        raise NotRun("no options were given: refused={words: function of the model}")
    for words, call in case.refused.items():
        model = case.attach(case.make_model(), HALF)
        try:
            with torch.no_grad():
                call(model)
        except AdaptokError:
            continue
        require(False, f"{words} went through: use adaptok's refuse_option in hand_over or read")


BACKBONE_CHECKS = (
    check_match,
    check_plain,
    check_example,
    check_reacts,
    check_identity,
    check_trace,
    check_fewer,
    check_cells,
    check_grid,
    check_order,
    check_batch,
    check_keywords,
    check_checkpointing,
    check_refused,
    *WRAPPED_CHECKS,
)


def check_backbone(
    backbone: str | Backbone | type[Backbone],
    model: ModelSpec,
    *,
    inputs: InputSpec = None,
    refused: Mapping[str, Callable[[nn.Module], object]] | None = None,
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Check whether the adapter of a family of hosts does what `adaptok.wrap` relies on.

    Args:
        backbone: a registered name, a class, or an instance.
        model: a function that makes a small host, or a host, of which copies are checked. Its
            weights are filled with values that make outputs react.
        inputs: what the host is called with, or a function of the host; best three samples and an
            image that is not square. None takes the backbone's own example.
        refused: options that reach into single blocks, in words, each with a function of the
            wrapped host that asks for it.
        skip: names of checks that are not run, and why: `cells` and `grid` of a host
            that mixes its tokens before the blocks, such as by a refiner.
        only: names of the only checks to run.

    Returns:
        The report; print it, or `report.raise_failed()`.

    Raises:
        ConfigError: there is no check of a name.
        UnknownNameError: there is no backbone of that name.

    Example:
        >>> from adaptok.testing import make_vit
        >>> check_backbone("timm-vit", make_vit, only=["identity", "cells", "grid", "refused"])
        backbone 'timm-vit' of VisionTransformer: 3 passed, 0 failed, 1 not run
        identity  passed   With every cell kept, the host computes what it computed before
        cells     passed   Exactly the cells of the grid change with the image, no class, ...
        grid      passed   The cells lie row by row: the corners of the image change the ...
        refused   not run  no options were given: refused={words: function of the model}
    """
    case = BackboneCase(backbone, model, inputs, refused)
    return run_checks(case.title, BACKBONE_CHECKS, case, skip, only)
