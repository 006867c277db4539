"""TeaCache against an oracle of one sample, and what really runs."""

import pytest
import torch
from adaptok_cache import TeaCache

import adaptok

BENT = (0.0, 3.0, 0.0, 0.5, 0.001)


def embed(model, x, y, t):
    """What goes into the first block, and the condition."""
    tokens = model.x_embedder(x).flatten(2).transpose(1, 2) + model.pos_embed
    return tokens, model.t_embedder(t) + model.y_embedder(y)


def run_oracle(model, steps, threshold, coefficients, last, signal="input"):
    """TeaCache of one sample, step by step, on a model that is not wrapped."""
    kept, change, total, decisions = None, None, 0.0, []
    head, outs = [], []
    model.final_layer.register_forward_pre_hook(lambda _, args: head.append(args[0]))
    for i, (x, t, y) in enumerate(steps):
        tokens, condition = embed(model, x, y, t)
        seen = tokens if signal == "input" else condition
        if kept is not None:
            d = float((seen - kept).abs().mean() / kept.abs().mean())
            powers = range(len(coefficients) - 1, -1, -1)
            total += max(0.0, sum(c * d**p for c, p in zip(coefficients, powers, strict=True)))
        compute = i < 2 or (last and i == len(steps) - 1) or not total < threshold
        if compute:
            z = tokens
            for block in model.blocks:
                z = block(z, condition)
            change, total = z - tokens, 0.0
        kept = seen
        outs.append((tokens + change)[0])
        decisions.append(compute)
    return decisions, outs


def catch_head(model):
    """Return a list that gets what the blocks gave in each call."""
    seen = []
    model.final_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize("signal", ["input", "condition"])
@pytest.mark.parametrize("coefficients", [(0.0, 0.0, 0.0, 1.0, 0.0), BENT])
@pytest.mark.parametrize("steps", [None, 9])
def test_each_sample_follows_the_oracle(wrapped, dit, tools, signal, coefficients, steps):
    threshold = 1.8 if signal == "condition" else 0.066 if coefficients == BENT else 0.11
    stage = TeaCache(threshold, coefficients, signal, steps=steps)
    model = wrapped(stage)
    walk = tools.Walk()
    found, decisions = catch_head(model), []
    for step in walk.steps:
        tools.run_steps(model, [step])
        decisions.append(stage.last_computed)
    for i in range(walk.b):
        with torch.no_grad():
            expected, outs = run_oracle(
                dit, walk.sample(i), threshold, coefficients, steps == 9, signal
            )
        assert [flags[i] for flags in decisions] == expected
        for seen, out in zip(found, outs, strict=True):
            torch.testing.assert_close(seen[i], out, atol=2e-5, rtol=2e-5)
    rows = list(zip(*decisions, strict=True))
    if signal == "input":
        assert len({sum(row) for row in rows}) == 3, "samples should decide differently"
    assert sum(sum(row) for row in rows) < 27, "something should be reused"


@pytest.mark.parametrize("inside", [(), ("dc",)])
def test_threshold_0_is_bit_exact(wrapped, tools, dit, inside):
    plain = adaptok.wrap(dit, stack=list(inside), budget=0.5) if inside else dit
    stage = TeaCache(0.0)
    model = wrapped(stage, inside=inside, budget=0.5 if inside else None)
    walk = tools.Walk()
    with torch.no_grad():
        expected = [plain(*step) for step in walk.steps]
    for found, needed in zip(tools.run_steps(model, walk.steps), expected, strict=True):
        assert torch.equal(found, needed)
    assert (stage.computed, stage.reused) == (27, 0)
    assert stage.memory_bytes > 0, "the path of the stage really ran"


def test_only_samples_that_are_computed_reach_the_blocks(wrapped, tools):
    stage = TeaCache(0.11)
    model = wrapped(stage)
    seen, walk = tools.count_samples(model), tools.Walk()
    for step in walk.steps:
        seen.clear()
        tools.run_steps(model, [step])
        n = sum(stage.last_computed)
        assert seen == ([n] * tools.DEPTH if n else [])
    sizes = set()
    tools.run_steps(model, walk.steps, request="two")
    sizes.update(seen)
    assert {1, 3} <= sizes


def test_where_all_are_reused_no_block_runs(wrapped, tools):
    stage = TeaCache(float("inf"))
    model = wrapped(stage)
    seen = tools.count_samples(model)
    tools.run_steps(model, tools.Walk().steps)
    assert seen == [3] * tools.DEPTH * 2
    assert (stage.computed, stage.reused) == (6, 21)


@pytest.mark.parametrize("name", ["teacache", "firstblock", "taylorseer"])
def test_batch_mates_never_matter(wrapped, tools, name):
    options = {"teacache": {"threshold": 0.11}, "firstblock": {"threshold": 0.1}}.get(name, {})
    walk = tools.Walk()
    together = tools.run_steps(wrapped({"name": name, **options}), walk.steps)
    for i in range(walk.b):
        model = wrapped({"name": name, **options})
        for whole, alone in zip(together, tools.run_steps(model, walk.sample(i)), strict=True):
            torch.testing.assert_close(whole[i], alone[0], atol=1e-5, rtol=1e-5)


def test_samples_at_different_times_have_runs_of_their_own(wrapped, tools):
    """A mate that begins anew, or is ahead, changes nothing for the others."""
    stage = TeaCache(float("inf"))
    model = wrapped(stage)
    walk = tools.Walk(b=2)
    times = [(999, 500), (900, 400), (800, 950), (700, 850), (600, 750)]
    flags, outs = [], []
    for (x, _, y), pair in zip(walk.steps, times, strict=False):
        outs += tools.run_steps(model, [(x, torch.tensor(pair, dtype=torch.float32), y)])
        flags.append(stage.last_computed)
    assert flags == [(True, True), (True, True), (False, True), (False, True), (False, False)]
    alone = wrapped(TeaCache(float("inf")))
    for i, (x, _, y) in enumerate(walk.sample(0)[:5]):
        (out,) = tools.run_steps(alone, [(x, torch.tensor([float(times[i][0])]), y)])
        torch.testing.assert_close(outs[i][0], out[0], atol=1e-5, rtol=1e-5)


def test_a_distance_that_is_no_number_is_computed(wrapped, tools):
    stage = TeaCache(0.5)
    model = wrapped(stage)
    walk = tools.Walk()
    x, t, y = walk.steps[3]
    bad = x.clone()
    bad[1] = torch.nan
    tools.run_steps(model, walk.steps[:3])
    tools.run_steps(model, [(bad, t, y)])
    assert stage.last_computed[1]
    tools.run_steps(model, walk.steps[4:5])
    assert stage.last_computed[1]
    out = tools.run_steps(model, walk.steps[5:])[-1]
    assert out.isfinite().all()


def test_half_precision_runs_and_keeps_half(wrapped, tools, template):
    stage = TeaCache(0.3)
    model = wrapped(stage).to(torch.bfloat16)
    walk = tools.Walk(dtype=torch.bfloat16)
    outs = tools.run_steps(model, walk.steps)
    assert outs[-1].dtype == torch.bfloat16
    assert stage.reused > 0
    assert stage.memory_bytes == 2 * 2 * 3 * 24 * 64
