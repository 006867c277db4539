"""Checks of every kind of part inside a small host."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adaptok.budgets import Budget
from adaptok.calls import BlockCall
from adaptok.testing.cases import (
    HALF,
    PartCase,
    make_call,
    make_images,
    make_tokens,
    measure_error,
    with_budget,
)
from adaptok.testing.models import DEPTH
from adaptok.testing.report import require
from adaptok.testing.toy_blocks import make_range
from adaptok.wrapping import unwrap

NEW_KEYS = ".adaptok."
TOLERANCE = 1e-5  # relative, where new weights lie on the path


def run_host(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a host makes of images, with fixed random numbers and without gradients."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        out: Tensor = model(images)
        return out


def check_identity(case: PartCase) -> None:
    """With every cell kept, a host computes what it computed before."""
    model, images = case.make_host(), make_images()
    expected = run_host(model, images)
    part = case.make()
    exact = not list(case.stage(part).parameters())
    case.attach(model, part, Budget(keep=1.0))
    error = measure_error(run_host(model, images), expected)
    allowed = 0.0 if exact else TOLERANCE
    require(
        error <= allowed,
        f"with every cell kept the host differs by {error:.2g} (relative) from what it computed "
        f"before; {allowed:g} is allowed",
    )


def check_keys(case: PartCase) -> None:
    """A wrap keeps the names of the state dict, new ones all contain `.adaptok.`."""
    model = case.make_host()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    case.attach(model, case.make())
    require_keys(model, base)


def require_keys(model: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Raise a `ConformanceError` unless a wrapped model has its old keys, and takes old weights."""
    now = list(model.state_dict())
    lost = [name for name in base if name not in now]
    added = [name for name in now if name not in base and NEW_KEYS not in name]
    require(not lost, f"the wrap took {', '.join(lost)} out of the state dict")
    require(not added, f"the wrap added {', '.join(added)}, without {NEW_KEYS} in it")
    answer = model.load_state_dict(base, strict=False)
    stray = [name for name in answer.missing_keys if NEW_KEYS not in name]
    require(
        not stray and not answer.unexpected_keys,
        f"weights from before the wrap do not load: {', '.join(stray + answer.unexpected_keys)}",
    )


def check_unwrap(case: PartCase) -> None:
    """After wrap, run and unwrap, the host is what it was, bit for bit."""
    model, images = case.make_host(), make_images()
    before, expected = describe_tree(model), run_host(model, images)
    case.attach(model, case.make())
    run_host(model, images)
    unwrap(model)
    require_tree(model, before)
    require(
        torch.equal(run_host(model, images), expected),
        "after unwrap the host computes something else than before",
    )


def describe_tree(model: nn.Module) -> dict[str, object]:
    """Return what a model is made of: classes, attributes, hooks and weights."""
    tree: dict[str, object] = {}
    for path, module in model.named_modules():
        hooks = {name: len(value) for name, value in vars(module).items() if name.endswith("hooks")}
        tree[path] = (type(module).__qualname__, sorted(vars(module)), hooks, module.training)
    weights = copy.deepcopy(dict(model.state_dict()))
    return tree | {f"weight {name}": value for name, value in weights.items()}


def require_tree(model: nn.Module, before: Mapping[str, object]) -> None:
    """Raise a `ConformanceError` unless a model is made of what it was made of before."""
    now = describe_tree(model)
    changed = [name for name in {**before, **now} if not is_equal(before.get(name), now.get(name))]
    require(not changed, f"after unwrap something is left or lost in {', '.join(changed[:5])}")
    names = [name for name in before if name.startswith("weight ")]
    require(
        names == [name for name in now if name.startswith("weight ")],
        "after unwrap the state dict has another order",
    )


def is_equal(first: object, second: object) -> bool:
    """Say whether two descriptions or tensors are equal."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        same = first is second or torch.equal(first, second)
        return same and first.dtype == second.dtype
    return first == second


def keep_tokens(x: Tensor, ragged: object, condition: object = None) -> Tensor:
    """Be the packed form of a block that changes nothing."""
    return x


def check_prefix(case: PartCase) -> None:
    """Tokens that are no grid cells (class, register, text) reach the blocks and come back."""
    stage = with_budget(case.stage(case.make_filled()), HALF)
    call = make_call(make_tokens(width=case.width))
    if getattr(getattr(stage, "chunker", None), "layout", None) == "packed":
        # packed forms take tokens and a condition only
        call = BlockCall(call.x, call.grid, call.start, condition=call.condition)
    expected = call.rest_x.clone()
    seen = []

    def change_nothing(call: BlockCall, first: int, last: int) -> BlockCall:
        seen.append(call.rest_x)
        return call

    with torch.no_grad():
        after = stage(make_range(stage, change_nothing, (keep_tokens,) * DEPTH), call)
    require(
        all(torch.equal(rest, expected) for rest in seen),
        "the blocks got other tokens in front of or behind the grid than came",
    )
    require(
        torch.equal(call.rest_x, expected),
        "tokens in front of or behind the grid changed in place",
    )
    require(
        after.rest_x.shape == expected.shape and torch.equal(after.rest_x, expected),
        "tokens in front of or behind the grid changed, though the blocks change nothing",
    )


HOST_CHECKS = (check_identity, check_keys, check_unwrap)
