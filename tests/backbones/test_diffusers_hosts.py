"""What every transformer of diffusers must pass."""

import accelerate
import pytest
import torch
from backbones import host_checks
from backbones.diffusers_checks import HOSTS, call, check_oracles, find, wrap_host
from torch import nn

import adaptok
from adaptok.errors import HandOverError, UnsupportedModelError
from adaptok.hosts import NoMatch

every_host = pytest.mark.parametrize("name", HOSTS)


def match_host(name):
    return HOSTS[name].match


@every_host
def test_identity_keys_and_unwrap(name):
    host_checks.check_identity_keys_and_unwrap(find(name), match_host(name))


@every_host
def test_copies(name):
    host_checks.check_copies(find(name), match_host(name))


@every_host
@pytest.mark.parametrize("router", ["norm", "dc"])
def test_batch_invariance(name, router):
    host_checks.check_batch_invariance(find(name), match_host(name), router)


@every_host
def test_oracle(name):
    check_oracles(name, wrap_host(name))


# Flux has a test of its own
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3.5", "z_image", "wan2.2"])
def test_compiles_to_one_graph(name):
    torch._dynamo.reset()
    model = wrap_host(name, router="dc")
    expected = call(name, model)  # Z-Image makes its rotary table in a first call, without graphs
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(name, compiled), expected, rtol=0, atol=1e-5)
    if hasattr(model, "cache_context"):  # the graph reads which branch it is
        with model.cache_context("uncond"):
            torch.testing.assert_close(call(name, compiled), expected, rtol=0, atol=1e-5)
    torch._dynamo.reset()


@every_host
def test_router_gradient(name):
    host_checks.check_router_gradient(find(name), match_host(name))


@every_host
def test_checkpointing_gives_the_same_gradients(name):
    """Checkpointed blocks are called by place, and not recomputed as one."""
    case, gradients = find(name), []
    for checkpointing in (False, True):
        model = wrap_host(name, budget=[0.2, 0.5, 1.0]).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)  # class dropout
        case.run(model, case.inputs(model)).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for key, value in plain.items():
        torch.testing.assert_close(checkpointed[key], value, rtol=1e-4, atol=1e-6)


@every_host
def test_span_in_the_middle(name):
    model = wrap_host(name, span=(1, 3), budget=1.0)
    full = call(name, model)
    with adaptok.budget(model, keep=0.3):
        assert not torch.equal(call(name, model), full)
    assert torch.equal(call(name, adaptok.unwrap(model)), full)


@every_host
def test_first_block_stays_in_reach(name):
    model = find(name).build()
    path = find(name).containers[0]
    first = model.get_submodule(path)[0]
    adaptok.wrap(model, "dc", budget=0.5, backbone=match_host(name)(model))
    assert model.get_submodule(path)[0] is first


@every_host
def test_offload_of_single_layers(name):
    """Weights are on the meta device between calls, those of router and dechunker, too."""
    model = wrap_host(name, router="dc")
    expected = call(name, model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert torch.equal(call(name, model), expected)


@every_host
def test_needs_the_grid(name):
    model = wrap_host(name)
    inputs = find(name).inputs(model)
    with pytest.raises(HandOverError, match="called without the grid"):
        model.forward(*inputs.args, **inputs.kwargs)


@every_host
def test_other_models_do_not_match(name):
    with pytest.raises(NoMatch, match=f"no diffusers {HOSTS[name].host}"):
        HOSTS[name].match(nn.Linear(2, 2))


def test_a_wrong_adapter_by_name_is_refused():
    with pytest.raises(UnsupportedModelError, match="does not fit"):
        adaptok.wrap(find("wan").build(), "dc", backbone="diffusers-dit")


@every_host
def test_half_precision_leaves_router_and_dechunker_alone(name):
    model = wrap_host(name, router="dc").to(torch.bfloat16)
    case = find(name)
    own = [p for key, p in model.named_parameters() if ".adaptok." in key]
    assert own
    assert {p.dtype for p in own} == {torch.float32}
    inputs = case.inputs(model)
    halve = halve_floats
    with torch.no_grad(), adaptok.trace(model) as trace:
        out = case.output(model(*halve(inputs.args), **halve(inputs.kwargs)))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert trace.steps[0].kept.tolist() == [(trace.steps[0].provenance.token.shape[1] + 1) // 2] * 3


def halve_floats(value):
    if isinstance(value, torch.Tensor):
        return value.bfloat16() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: halve_floats(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(halve_floats(part) for part in value)
    return value
