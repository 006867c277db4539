"""Caches outside of stages that choose tokens: who computes, what runs, what a trace tells."""

import pytest
import torch
from adaptok_cache import TaylorSeer, TeaCache

import adaptok


@pytest.mark.parametrize("inside", ["dc", "tome", "tomesd"])
@pytest.mark.parametrize("name", ["teacache", "firstblock", "taylorseer"])
def test_a_cache_stands_outside(wrapped, tools, name, inside):
    stack = [inside, name]
    model = tools.make_dit()
    adaptok.wrap(model, stack=stack, budget=0.5)
    assert [stage.name for stage in model.blocks.stages] == [name, inside]
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    outs = tools.run_steps(model, tools.Walk().steps)
    assert all(out.isfinite().all() for out in outs)
    assert model.blocks.stages[0].reused > 0 or name != "taylorseer"
    assert all(shape[1] < 24 for shape in seen)


@pytest.mark.parametrize("inside", ["dc", "tome"])
def test_what_runs_with_tokens_chosen_is_what_ran_before(wrapped, tools, inside):
    """Each sample is that of the stack without a cache, where it was computed."""
    stage = TeaCache(0.11)
    model = wrapped(stage, inside=(inside,), budget=0.5)
    plain = adaptok.wrap(tools.make_dit(), stack=[inside], budget=0.5)
    walk, partly = tools.Walk(), 0
    for step in walk.steps:
        (out,) = tools.run_steps(model, [step])
        with torch.no_grad():
            expected = plain(*step)
        for i, computed in enumerate(stage.last_computed):
            same = torch.allclose(out[i], expected[i], atol=1e-4, rtol=1e-4)
            assert same == computed
        partly += 0 < sum(stage.last_computed) < 3
    assert partly > 2


def test_a_trace_tells_of_the_samples_that_ran(wrapped, tools):
    stage = TeaCache(0.11)
    model = wrapped(stage, inside=("dc",), budget=0.5)
    for step in tools.Walk().steps:
        with adaptok.trace(model) as seen:
            tools.run_steps(model, [step])
        (found,) = seen.steps
        ran = torch.tensor(stage.last_computed)
        if ran.any():
            assert found.plans[0].keep_mask.any(1).equal(ran)
            assert found.kept[ran].tolist() == [12] * int(ran.sum())
        else:
            assert not found.plans
            assert found.flops == 0


def test_flops_go_down_with_the_samples_that_run(wrapped, tools):
    stage = TaylorSeer(interval=3)
    model = wrapped(stage)
    flops = []
    for step in tools.Walk().steps:
        with adaptok.trace(model) as seen:
            tools.run_steps(model, [step])
        flops.append(seen.steps[0].flops)
    assert [value > 0 for value in flops] == [
        True,
        True,
        False,
        False,
        True,
        False,
        False,
        True,
        False,
    ]


def test_a_budget_per_sample_goes_with_its_sample(wrapped, tools):
    stage = TeaCache(0.11)
    model = wrapped(stage, inside=("dc",), budget={"tokens": [4, 8, 20]})
    for step in tools.Walk().steps:
        with adaptok.trace(model) as seen:
            tools.run_steps(model, [step])
        for i, ran in enumerate(stage.last_computed):
            if ran:
                assert seen.steps[0].kept[i] == [4, 8, 20][i]
