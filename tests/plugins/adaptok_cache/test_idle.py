"""A cache that reuses nothing says so: when, once, and with what it saw."""

import warnings
from itertools import pairwise

import pytest
import torch
from adaptok_cache import FirstBlockCache, IdleCacheWarning, TaylorSeer, TeaCache
from adaptok_cache.distances import relative_change

from adaptok.diffusion import HybridObjective, sample

CACHES = {"teacache": TeaCache, "firstblock": FirstBlockCache}
SMALL = 1e-6
each_cache = pytest.mark.parametrize("name", CACHES)


def nearest_input(model, walk):
    """The smallest step that the input of the blocks makes behind the warmup."""
    with torch.no_grad():
        steps = [model.x_embedder(x).flatten(2).mT + model.pos_embed for x, _, _ in walk.steps]
    moves = [relative_change(now, old) for old, now in pairwise(steps)]
    return min(min(move) for move in moves[1:])


def silently(run, *args, **options):
    """Run something that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run(*args, **options)


@each_cache
def test_the_last_step_that_is_known_tells_once(wrapped, tools, dit, name):
    stage, walk = CACHES[name](SMALL, steps=9), tools.Walk()
    model = wrapped(stage)
    silently(tools.run_steps, model, walk.steps[:8])
    with pytest.warns(IdleCacheWarning, match=f"^'{name}' computed all 9 steps of a walk and") as w:
        tools.run_steps(model, walk.steps[8:])
    (message,) = (str(one.message) for one in w)
    assert "reused none: the smallest distance was 0." in message
    assert "threshold=1e-06 reuses what is below it: give a larger one" in message
    assert ("`adaptok.calibrate`" in message) == (name == "teacache")
    if name == "teacache":
        assert f"distance was {nearest_input(dit, walk):.3g}," in message
    assert (stage.computed, stage.reused) == (27, 0)
    silently(tools.run_steps, model, walk.steps)
    silently(tools.run_steps, model, walk.steps, request="two")


@each_cache
@pytest.mark.parametrize("end", ["again", "another", "forget", "forget all"])
def test_where_the_number_of_steps_is_not_known_what_follows_tells(wrapped, tools, name, end):
    stage, walk = CACHES[name](SMALL), tools.Walk()
    model = wrapped(stage)
    silently(tools.run_steps, model, walk.steps)
    follows = {
        "again": lambda: tools.run_steps(model, walk.steps[:1], request="one"),
        "another": lambda: tools.run_steps(model, walk.steps[:1], request="two"),
        "forget": lambda: stage.forget("one"),
        "forget all": stage.forget,
    }
    with pytest.warns(IdleCacheWarning, match="computed all 9 steps of a walk"):
        follows[end]()


def test_a_long_walk_is_not_waited_for(wrapped, tools):
    stage = TeaCache(SMALL)
    model = wrapped(stage)
    walk = tools.Walk(b=1, times=tuple(range(1000, 0, -40)))
    assert len(walk.steps) == 25
    silently(tools.run_steps, model, walk.steps[:23])
    with pytest.warns(IdleCacheWarning, match="computed all 24 steps of a walk"):
        tools.run_steps(model, walk.steps[23:24])
    known = wrapped(TeaCache(SMALL, steps=40))
    silently(tools.run_steps, known, walk.steps)


@each_cache
def test_what_is_wanted_is_not_told(wrapped, tools, name):
    """Threshold 0, few steps, and a walk in which one sample, or one branch, was reused."""
    walk, make = tools.Walk(), CACHES[name]
    for stage in (make(0.0, steps=9), make(0.0)):
        model = wrapped(stage)
        silently(tools.run_steps, model, walk.steps)
        silently(tools.run_steps, model, walk.steps[:1], request="end")
    short = wrapped(make(SMALL, steps=7))
    silently(tools.run_steps, short, walk.steps[:7])
    some = make({"teacache": 0.06, "firstblock": 0.37}[name], steps=9)
    model, decisions = wrapped(some), []
    for step in walk.steps:
        silently(tools.run_steps, model, [step])
        decisions.append(some.last_computed)
    reused = [not all(row) for row in zip(*decisions, strict=True)]
    assert any(reused)
    if name == "teacache":
        assert not all(reused), "one sample should have reused nothing"


def test_a_branch_that_reuses_speaks_for_the_others(wrapped, tools):
    slow = tools.Walk(b=1, speeds=(0.02,)).steps
    fast = tools.Walk(b=1, speeds=(0.6,), seed=1).steps
    stage = TeaCache(0.06, steps=9)
    model, flags = wrapped(stage), {"cond": [], "uncond": []}
    for steps in zip(slow, fast, strict=True):
        for branch, step in zip(flags, steps, strict=True):
            silently(tools.run_steps, model, [step], branch=branch)
            flags[branch] += stage.last_computed
    assert not all(flags["cond"])
    assert all(flags["uncond"])
    with pytest.warns(IdleCacheWarning, match="computed all 9 steps"):
        tools.run_steps(wrapped(TeaCache(0.06, steps=9)), fast, branch="uncond")


def test_other_reasons_are_named(wrapped, tools):
    walk = tools.Walk()
    with pytest.warns(IdleCacheWarning, match="none: warmup=9 leaves none to reuse, give a small"):
        tools.run_steps(wrapped(TeaCache(1e9, steps=9, warmup=9)), walk.steps)
    with pytest.warns(IdleCacheWarning, match="'taylorseer' computed all 9 .* warmup=9 leaves"):
        tools.run_steps(wrapped(TaylorSeer(steps=9, warmup=9)), walk.steps)
    silently(tools.run_steps, wrapped(TaylorSeer(interval=1, steps=9)), walk.steps)
    nothing = [(x * torch.nan, t, y) for x, t, y in walk.steps]
    with pytest.warns(IdleCacheWarning, match="no distance was a finite number: look at what"):
        tools.run_steps(wrapped(TeaCache(0.5, steps=9)), nothing)


def test_where_other_processes_compute_the_threshold_is_not_blamed(wrapped, tools, monkeypatch):
    monkeypatch.setattr("adaptok_cache.stage.agree_on", lambda compute, _: [True] * len(compute))
    for stage in (TeaCache(1e9, steps=9, agree=True), TaylorSeer(steps=9, agree=True)):
        with pytest.warns(IdleCacheWarning, match="none: with agree=True other processes had to"):
            tools.run_steps(wrapped(stage), tools.Walk().steps)


@pytest.mark.parametrize("guided", [{}, {"guidance_scale": 2.0}])
def test_our_own_sampler_tells_at_its_last_step(wrapped, guided):
    stage = TeaCache(SMALL)
    model = wrapped(stage)
    options = {"objective": HybridObjective(), "scheduler": "dpm", "shape": (4, 8, 12), **guided}
    with pytest.warns(IdleCacheWarning, match="'teacache' computed all 10 steps"):
        sample(model, [0, 1], steps=10, **options)
    silently(sample, model, [0, 1], steps=10, **options)
    assert stage.reused == 0
