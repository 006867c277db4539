"""Nothing of another run is ever reused: each second walk is as that of a fresh model."""

import copy
import pickle

import pytest
import torch
from adaptok_cache import FirstBlockCache, TaylorSeer, TeaCache

import adaptok
from adaptok.diffusion import HybridObjective, sample

MAKERS = {
    # everything that may be reused is reused
    "teacache": lambda **options: TeaCache(float("inf"), **options),
    "firstblock": lambda **options: FirstBlockCache(float("inf"), **options),
    "taylorseer": lambda **options: TaylorSeer(interval=100, order=2, **options),
}
LONG = (999.0, 888.0, 777.0, 666.0, 555.0)

each_cache = pytest.mark.parametrize("name", MAKERS)


def require_fresh(wrapped, tools, name, before, after, branches=(None, None), exact=True):
    """A walk behind another one, under one request, is that of a fresh model.

    Where it cannot be known at once that a walk has begun, more of its steps may be computed.
    """
    used, fresh = (wrapped(MAKERS[name]()) for _ in range(2))
    tools.run_steps(used, before, branch=branches[0])
    found = tools.run_steps(used, after, branch=branches[1])
    expected = tools.run_steps(fresh, after, branch=branches[1])
    assert len(after) > 2
    # the control: without the cache, it is something else
    with adaptok.tracing.plain(fresh):
        computed = tools.run_steps(fresh, after, branch=branches[1])
    assert not torch.equal(expected[-1], computed[-1])
    if exact:
        assert all(map(torch.equal, found, expected))
        return
    for out, *allowed in zip(found, expected, computed, strict=True):
        assert any(torch.equal(out, other) for other in allowed)


@each_cache
@pytest.mark.parametrize("broken_off", [1, 2, 3, 5])
def test_another_seed(wrapped, tools, name, broken_off):
    before, after = (tools.Walk(times=LONG, seed=seed).steps for seed in (1, 2))
    require_fresh(wrapped, tools, name, before[:broken_off], after)


@each_cache
def test_another_shape(wrapped, tools, name):
    before = tools.Walk(times=LONG[:2]).steps
    turned = tools.Walk(times=(*LONG[2:], 444.0), size=(4, 24)).steps  # as many cells
    require_fresh(wrapped, tools, name, before, turned)


@each_cache
@pytest.mark.parametrize("sizes", [(3, 2), (2, 3), (4, 2), (2, 4), (1, 2)])
def test_another_batch_size(wrapped, tools, name, sizes):
    """In the middle of a walk, so that time goes on in one direction."""
    before = tools.Walk(b=sizes[0], times=LONG[:2]).steps
    after = tools.Walk(b=sizes[1], times=(*LONG[2:], 444.0), seed=3).steps
    require_fresh(wrapped, tools, name, before, after)


@each_cache
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((999.0,), LONG),
        ((1.0,), (501.0, 1.0, 0.5)),  # time goes up at first
        ((501.0, 1.0), (751.0, 501.0, 251.0, 1.0)),
        ((999.0, 500.0, 1.0), (999.0, 700.0, 400.0, 100.0)),
    ],
)
def test_another_number_of_steps(wrapped, tools, name, first, second):
    before = tools.Walk(times=first, seed=1).steps
    after = tools.Walk(times=second, seed=2).steps
    require_fresh(wrapped, tools, name, before, after, exact=first != (1.0,))


@each_cache
def test_another_guidance_branch(wrapped, tools, name):
    before = tools.Walk(times=LONG[:2], seed=1).steps
    after = tools.Walk(times=(*LONG[2:], 444.0), seed=2).steps
    require_fresh(wrapped, tools, name, before, after, ("cond", "uncond"))


@each_cache
@pytest.mark.parametrize("branches", [("cond", "uncond"), (None, None)])
def test_branches_that_take_turns(wrapped, tools, name, branches):
    """Named, each branch goes on by itself; unnamed, everything is computed."""
    walks = [tools.Walk(times=LONG, seed=seed).steps for seed in (1, 2)]
    model, found = wrapped(MAKERS[name]()), ([], [])
    stage = model.blocks.stages[0]

    def run():
        for steps in zip(*walks, strict=True):
            for outs, step, branch in zip(found, steps, branches, strict=True):
                outs.extend(tools.run_steps(model, [step], branch=branch))

    if branches[0] is None:
        with pytest.warns(UserWarning, match="same timestep twice"):
            run()
        assert stage.reused == 0
        fresh = wrapped(MAKERS[name]())
        with adaptok.tracing.plain(fresh):
            expected = [tools.run_steps(fresh, walk) for walk in walks]
    else:
        run()
        assert stage.reused == 2 * 3 * 3
        expected = [tools.run_steps(wrapped(MAKERS[name]()), walk, branch="cond") for walk in walks]
    for outs, needed in zip(found, expected, strict=True):
        assert all(map(torch.equal, outs, needed))


@each_cache
def test_two_requests_that_take_turns(wrapped, tools, name):
    walks = [
        tools.Walk(times=LONG, seed=1).steps,
        tools.Walk(times=tuple(t - 50 for t in LONG), seed=2).steps,
    ]
    model, found = wrapped(MAKERS[name]()), ([], [])
    for steps in zip(*walks, strict=True):
        for request, (outs, step) in enumerate(zip(found, steps, strict=True)):
            outs.extend(tools.run_steps(model, [step], request=str(request)))
    for outs, walk in zip(found, walks, strict=True):
        expected = tools.run_steps(wrapped(MAKERS[name]()), walk)
        assert all(map(torch.equal, outs, expected))
    assert model.blocks.stages[0].reused == 2 * 3 * 3


@each_cache
def test_another_precision(wrapped, tools, name):
    model = wrapped(MAKERS[name]())
    tools.run_steps(model, tools.Walk(times=LONG[:3]).steps)
    model.to(torch.float64)
    assert model.blocks.stages[0].memory_bytes == 0
    walk = tools.Walk(times=(*LONG[3:], 444.0, 333.0), dtype=torch.float64).steps
    found = tools.run_steps(model, walk)
    expected = tools.run_steps(wrapped(MAKERS[name]()).to(torch.float64), walk)
    assert all(map(torch.equal, found, expected))


@each_cache
def test_inference_mode_and_no_grad_take_turns(wrapped, tools, name):
    model, walk = wrapped(MAKERS[name]()), tools.Walk(times=LONG).steps
    expected = tools.run_steps(wrapped(MAKERS[name]()), walk)
    for i, (step, needed) in enumerate(zip(walk, expected, strict=True)):
        with torch.inference_mode(i % 2 == 0):
            (out,) = tools.run_steps(model, [step])
        assert torch.equal(out, needed)


@each_cache
def test_blocks_that_fail_leave_everything_as_it_was(wrapped, tools, name):
    model, walk = wrapped(MAKERS[name](warmup=4)), tools.Walk(times=LONG).steps
    expected = tools.run_steps(wrapped(MAKERS[name](warmup=4)), walk)
    found = tools.run_steps(model, walk[:2])

    def fail(module, args):
        raise RuntimeError("no memory")

    handle = model.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        tools.run_steps(model, walk[2:3])
    handle.remove()
    found += tools.run_steps(model, walk[2:])
    assert all(map(torch.equal, found, expected))


@each_cache
def test_copies_and_pickles_and_weights_are_without_state(wrapped, tools, name):
    model, walk = wrapped(MAKERS[name]()), tools.Walk(times=LONG).steps
    keys = set(model.state_dict())
    tools.run_steps(model, walk[:3])
    stage = model.blocks.stages[0]
    assert stage.memory_bytes > 0
    assert set(model.state_dict()) == keys
    assert not any(".adaptok." in key for key in keys)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.blocks.stages[0].memory_bytes == 0
        assert all(
            map(
                torch.equal,
                tools.run_steps(twin, walk),
                tools.run_steps(wrapped(MAKERS[name]()), walk),
            )
        )
    assert stage.memory_bytes > 0


@each_cache
def test_a_stage_that_is_wrapped_again_begins_anew(wrapped, tools, name, template):
    stage = MAKERS[name]()
    model, walk = wrapped(stage), tools.Walk(times=LONG).steps
    tools.run_steps(model, walk[:3])
    assert stage.memory_bytes > 0
    adaptok.unwrap(model)
    adaptok.wrap(model, stack=[stage])
    assert stage.memory_bytes == 0


@each_cache
def test_memory_is_bounded_told_and_forgotten(wrapped, tools, name):
    stage = MAKERS[name](max_requests=2)
    model, walk = wrapped(stage), tools.Walk(times=LONG).steps
    sizes = []
    for request in "abc":
        tools.run_steps(model, walk[:3], request=request)
        sizes.append(stage.memory_bytes)
    one = 3 * 24 * 64 * 4
    tensors = {"teacache": 2, "firstblock": 2, "taylorseer": 3}[name]
    assert sizes == [tensors * one, 2 * tensors * one, 2 * tensors * one]
    assert list(stage.book.requests) == ["b", "c"]
    assert f"2 of 2 requests, {sizes[-1]} B" in repr(model.blocks)
    held = [x for s in stage.book.requests["c"].values() for x in s.tensors]
    assert not any(x.requires_grad or x.grad_fn for x in held)
    stage.forget("b")
    assert stage.memory_bytes == sizes[0]
    tools.run_steps(model, walk[3:4], request="c")
    assert stage.last_computed == (False,) * 3
    stage.forget()
    assert stage.memory_bytes == 0
    tools.run_steps(model, walk[4:], request="c")
    assert stage.last_computed == (True,) * 3


@each_cache
def test_our_own_sampler_opens_requests(wrapped, dit, name):
    stage = MAKERS[name]()
    model = wrapped(stage)
    options = {"objective": HybridObjective(), "scheduler": "dpm", "shape": (4, 8, 12)}
    for guided in ({}, {"guidance_scale": 2.0}):
        before = stage.computed, stage.reused
        first = sample(model, [0, 1, 2], steps=6, seed=5, **guided, **options).latents
        rows = 3 * (1 + len(guided))
        # two to warm up, and the last one, which the sampler announces
        assert (stage.computed - before[0], stage.reused - before[1]) == (3 * rows, 3 * rows)
        assert stage.memory_bytes == 0
        assert model.blocks.request is None
        sample(model, [0, 1, 2], steps=4, seed=9, **guided, **options)
        again = sample(model, [0, 1, 2], steps=6, seed=5, **guided, **options).latents
        assert torch.equal(first, again)
        plain = sample(dit, [0, 1, 2], steps=6, seed=5, **guided, **options).latents
        assert not torch.equal(first, plain)


def test_a_request_of_the_user_holds_in_our_sampler(wrapped):
    stage = TeaCache(float("inf"))
    model = wrapped(stage)
    options = {"objective": HybridObjective(), "scheduler": "dpm", "shape": (4, 8, 12)}
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(model.blocks.request))
    with adaptok.request(model, "mine"):
        sample(model, [0], steps=4, **options)
        assert model.blocks.request == ("mine", None)
    assert set(seen) == {("mine", None)}


def test_a_wrap_without_a_cache_is_given_no_request(dit):
    model = adaptok.wrap(dit, "dc", budget=0.5)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(model.blocks.request))
    options = {"objective": HybridObjective(), "scheduler": "dpm", "shape": (4, 8, 12)}
    sample(model, [0], steps=2, **options)
    assert seen == [None, None]
