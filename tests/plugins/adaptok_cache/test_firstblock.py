"""The first-block cache against an oracle of one sample, and what really runs."""

import pytest
import torch
from adaptok_cache import FirstBlockCache

from adaptok.errors import StackError


def run_oracle(model, steps, threshold):
    """The first-block cache of one sample, on a model that is not wrapped."""
    kept, change, decisions, outs = None, None, [], []
    for i, (x, t, y) in enumerate(steps):
        tokens = model.x_embedder(x).flatten(2).transpose(1, 2) + model.pos_embed
        condition = model.t_embedder(t) + model.y_embedder(y)
        first = model.blocks[0](tokens, condition)
        added = first - tokens
        d = 0.0 if kept is None else float((added - kept).abs().mean() / kept.abs().mean())
        compute = i < 2 or not d < threshold
        if compute:
            z = first
            for block in list(model.blocks)[1:]:
                z = block(z, condition)
            change, kept = z - first, added
        outs.append((first + change)[0])
        decisions.append(compute)
    return decisions, outs


def test_each_sample_follows_the_oracle(wrapped, dit, tools):
    stage = FirstBlockCache(0.42)
    model, walk, found, decisions = wrapped(stage), tools.Walk(), [], []
    model.final_layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for step in walk.steps:
        tools.run_steps(model, [step])
        decisions.append(stage.last_computed)
    for i in range(walk.b):
        with torch.no_grad():
            expected, outs = run_oracle(dit, walk.sample(i), 0.42)
        assert [flags[i] for flags in decisions] == expected
        for seen, out in zip(found, outs, strict=True):
            torch.testing.assert_close(seen[i], out, atol=2e-5, rtol=2e-5)
    assert len({tuple(row) for row in zip(*decisions, strict=True)}) > 1
    assert stage.reused > 0


def test_threshold_0_is_bit_exact(wrapped, dit, tools):
    walk, stage = tools.Walk(), FirstBlockCache(0.0)
    with torch.no_grad():
        expected = [dit(*step) for step in walk.steps]
    for found, needed in zip(tools.run_steps(wrapped(stage), walk.steps), expected, strict=True):
        assert torch.equal(found, needed)
    assert stage.reused == 0


def test_the_first_block_always_runs_and_the_others_on_few(wrapped, tools):
    stage = FirstBlockCache(0.42)
    model = wrapped(stage)
    seen = tools.count_samples(model)
    for step in tools.Walk().steps:
        seen.clear()
        tools.run_steps(model, [step])
        n = sum(stage.last_computed)
        assert seen == [3] + ([n] * (tools.DEPTH - 1) if n else [])


def test_one_block_leaves_nothing_to_reuse(wrapped):
    with pytest.raises(StackError, match="has one block only: give a longer span, or 'teacache'"):
        wrapped("firstblock", span=(1, 2))
