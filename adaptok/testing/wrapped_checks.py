"""Checks of a host of somebody else once it is wrapped: copies, files, graphs, and back again."""

import copy
import pickle

import torch

from adaptok.blocks import find_adaptive
from adaptok.errors import AlreadyWrappedError
from adaptok.testing.backbone_cases import BackboneCase, map_tensors
from adaptok.testing.cases import HALF, measure_error
from adaptok.testing.host_checks import TOLERANCE, describe_tree, require_keys, require_tree
from adaptok.testing.models import fill_weights
from adaptok.testing.report import NotRun, require
from adaptok.wrapping import unwrap, wrap


def check_half(case: BackboneCase) -> None:
    """It runs in bfloat16."""
    model = case.make_model()
    inputs = map_tensors(case.inputs(model), lambda x: x.bfloat16() if x.is_floating_point() else x)
    try:
        case.run(model.to(torch.bfloat16), inputs)
    except RuntimeError as error:
        raise NotRun("the host itself does not run in bfloat16") from error
    out = case.run(case.attach(model, HALF), inputs)
    require(bool(out.isfinite().all()), "the output is not finite")


def check_deepcopy(case: BackboneCase) -> None:
    """A deep copy of a wrapped host computes the same, with its own weights."""
    model = case.make_model()
    inputs = case.inputs(model)
    expected = case.run(case.attach(model, HALF), inputs)
    twin = copy.deepcopy(model)
    require(torch.equal(case.run(twin, inputs), expected), "the copy computes something else")
    blocks = find_adaptive(twin)
    assert blocks is not None
    for block in blocks.all_blocks:
        fill_weights(block, seed=1)
    require(
        torch.equal(case.run(model, inputs), expected)
        and not torch.equal(case.run(twin, inputs), expected),
        "the copy and the original use the same weights",
    )


def check_pickle(case: BackboneCase) -> None:
    """A wrapped host survives pickle."""
    model = case.make_model()
    inputs = case.inputs(model)
    expected = case.run(case.attach(model, HALF), inputs)
    again = pickle.loads(pickle.dumps(model))
    require(torch.equal(case.run(again, inputs), expected), "it computes something else afterwards")


def check_compile(case: BackboneCase) -> None:
    """A wrapped host becomes one graph by torch.compile(fullgraph=True)."""
    model = case.make_model()
    if not getattr(case.resolve(model), "compilable", True):
        raise NotRun("compilable = False")
    inputs = case.inputs(model)
    expected = case.run(case.attach(model, HALF), inputs)
    torch.compiler.reset()
    try:
        graph = torch.compile(model, fullgraph=True, backend="eager")
        found = case.run(graph, inputs)
    finally:
        torch.compiler.reset()
    error = measure_error(found, expected)
    require(error <= TOLERANCE, f"the graph differs by {error:.2g} (relative)")


def check_keys(case: BackboneCase) -> None:
    """A wrap keeps the names of the state dict, new ones all contain `.adaptok.`."""
    model = case.make_model()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    host = case.resolve(model)
    require_keys(wrap(model, chunker="dc", budget=HALF, backbone=host, verify=False), base)


def check_unwrap(case: BackboneCase) -> None:
    """After wrap, run and unwrap, the host is what it was, bit for bit."""
    model = case.make_model()
    inputs = case.inputs(model)
    expected, before = case.run(model, inputs), describe_tree(model)
    case.run(case.attach(model, HALF), inputs)
    unwrap(model)
    require_tree(model, before)
    require(
        torch.equal(case.run(model, inputs), expected), "it computes something else than before"
    )


def check_second_wrap(case: BackboneCase) -> None:
    """A second wrap is refused, and leaves the first one as it is."""
    model = case.make_model()
    inputs = case.inputs(model)
    host = case.resolve(model)
    expected = case.run(case.attach(model, HALF), inputs)
    try:
        wrap(model, chunker="dc", budget=HALF, backbone=host, verify=False)
    except AlreadyWrappedError:
        require(torch.equal(case.run(model, inputs), expected), "the first wrap is damaged")
        return
    require(False, "a second wrap went through: the blocks must be modules of the model")


WRAPPED_CHECKS = (
    check_half,
    check_deepcopy,
    check_pickle,
    check_compile,
    check_keys,
    check_unwrap,
    check_second_wrap,
)
