"""Budgets of guidance branches: two halves of one call, or two calls that name themselves."""

import copy
import pickle

import pytest
import torch
from backbones.diffusers_checks import HOSTS, find, wrap_host

import adaptok
from adaptok.backbones.diffusers_contexts import NAME, read_branch
from adaptok.errors import BudgetError

HALVES = {
    "dit": ("cond", "uncond"),
    "pixart": ("uncond", "cond"),
    "sd3": ("uncond", "cond"),
    "z_image": ("cond", "uncond"),
}
CALLS = ["flux", "wan"]
DROP = 0.9


def wrap(name, model):
    return adaptok.wrap(model, "dc", budget=1.0, backbone=HOSTS[name].match(model))


def pair(value):
    """Double the first two samples of an input, as a guided pipeline doubles its latents."""
    if isinstance(value, dict):
        return {key: pair(part) for key, part in value.items()}
    if isinstance(value, list):
        return value[:2] * 2
    if isinstance(value, torch.Tensor):
        return torch.cat([value[:2]] * 2)
    return value


def first_two(value):
    if isinstance(value, dict):
        return {key: first_two(part) for key, part in value.items()}
    return value[:2] if isinstance(value, list | torch.Tensor) else value


def run_halves(name, model):
    """Return the kept counts of a guided call of two prompts."""
    inputs = find(name).inputs(model)
    with torch.no_grad(), adaptok.trace(model) as trace:
        model(*(pair(part) for part in inputs.args), **pair(inputs.kwargs))
    return trace.steps[0].kept.tolist()


def run_batch(name, model):
    """Return the kept counts of a call of three samples."""
    inputs = find(name).inputs(model)
    with torch.no_grad(), adaptok.trace(model) as trace:
        model(*inputs.args, **inputs.kwargs)
    return trace.steps[0].kept.tolist()


@pytest.mark.parametrize("name", HALVES)
def test_halves_have_their_own_budgets(name):
    model = wrap_host(name, router="dc", budget=1.0)
    full = run_halves(name, model)[0]
    with adaptok.budget(model, drop=0.0, uncond_drop=DROP):
        kept = run_halves(name, model)
    counts = dict.fromkeys(HALVES[name])
    counts[HALVES[name][0]], counts[HALVES[name][1]] = kept[:2], kept[2:]
    assert counts["cond"] == [full, full]
    assert max(counts["uncond"]) <= 0.25 * full


@pytest.mark.parametrize("name", HALVES)
def test_halves_that_are_no_branches_are_refused(name):
    """Two prompts without guidance are no conditional and unconditional half."""
    model = wrap_host(name, router="dc", budget=1.0)
    case = find(name)
    inputs = case.inputs(model)
    args, kwargs = [first_two(part) for part in inputs.args], first_two(inputs.kwargs)
    with adaptok.budget(model, drop=0.5), torch.no_grad():
        model(*args, **kwargs)
    with adaptok.budget(model, drop=0.0, uncond_drop=DROP), torch.no_grad():
        with pytest.raises(BudgetError, match="which of the 2 samples are unconditional"):
            model(*args, **kwargs)
        with pytest.raises(BudgetError, match="which of the 3 samples are unconditional"):
            model(*inputs.args, **inputs.kwargs)
        with adaptok.request(model, "id", branch="uncond"):
            model(*args, **kwargs)


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_name_their_branch(name, ran_before):
    model = find(name).build()
    inputs = find(name).inputs(model)
    if ran_before:  # diffusers then remembers that nothing in the model has a hook
        with model.cache_context("cond"), torch.no_grad():
            model(**inputs.kwargs)
    wrap(name, model)
    full = run_batch(name, model)[0]
    with adaptok.budget(model, drop=0.0, uncond_drop=DROP):
        with model.cache_context("cond"):
            assert run_batch(name, model) == [full] * 3
        with model.cache_context("uncond", step_index=1, num_inference_steps=2):
            assert max(run_batch(name, model)) <= 0.25 * full
        with adaptok.request(model, "id", branch="uncond"):
            assert max(run_batch(name, model)) <= 0.25 * full
        with pytest.raises(BudgetError, match="the host told nothing"):
            run_batch(name, model)
        with model.cache_context("other"), pytest.raises(BudgetError, match="told nothing"):
            run_batch(name, model)
    assert run_batch(name, model) == [full] * 3  # without guidance, no name is needed


@pytest.mark.parametrize("name", CALLS)
def test_the_reader_goes_with_the_wrap(name):
    model = find(name).build()
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    wrap(name, model)
    adaptok.unwrap(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    with model.cache_context("cond"):
        assert all(
            NAME not in module._diffusers_hook.hooks
            for module in model.modules()
            if hasattr(module, "_diffusers_hook")
        )
    wrap(name, model)  # again, after a call of diffusers
    with model.cache_context("uncond"):
        assert read_branch(model.get_submodule(find(name).containers[0])) == ("uncond",)


@pytest.mark.parametrize("name", CALLS)
def test_copies_have_readers_of_their_own(name):
    model = wrap_host(name)
    path = find(name).containers[0]
    with model.cache_context("cond"):
        pass
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with other.cache_context("uncond"):
            assert read_branch(other.get_submodule(path)) == ("uncond",)
            assert read_branch(model.get_submodule(path)) == ()
        assert read_branch(other.get_submodule(path)) == ()


def test_resetting_caches_of_the_host_is_harmless():
    model = wrap_host("wan")
    model._reset_stateful_cache()  # as pipelines do when they end
    with model.cache_context("cond"):
        assert read_branch(model.blocks) == ("cond",)


def test_hooks_of_diffusers_can_be_put_beside_the_reader():
    """Such as those of group offloading, which come and go."""
    from diffusers.hooks import HookRegistry, ModelHook

    model = wrap_host("wan")
    inputs = find("wan").inputs(model)
    with torch.no_grad():
        expected = model(**inputs.kwargs).sample
        registry = HookRegistry.check_if_exists_or_initialize(model.blocks)
        registry.register_hook(ModelHook(), "mine")
        assert torch.equal(model(**inputs.kwargs).sample, expected)
        registry.remove_hook("mine", recurse=False)
        assert torch.equal(model(**inputs.kwargs).sample, expected)
    with model.cache_context("cond"):
        assert read_branch(model.blocks) == ("cond",)
