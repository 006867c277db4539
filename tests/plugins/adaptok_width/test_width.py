"""The width stage against loops, and what it saves."""

import copy
import pickle

import pytest
import torch
from width_oracles import (
    DEPTH,
    HEADS,
    WIDTH,
    make_dc,
    make_diffusers,
    make_inputs,
    make_research,
    run_oracle,
    step_masks,
    wrap_width,
)

import adaptok
from adaptok.counting import count_operations

HOSTS = {"dc": make_dc, "research": make_research}


def run(model, inputs):
    with torch.no_grad():
        return model(*inputs)


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def count(model, inputs):
    with torch.no_grad(), count_operations() as counter:
        model(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("tabulated", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 4}, {"gate_heads": False}, {"gate_tokens": False}, {"groups": 1}],
    ids=str,
)
@pytest.mark.parametrize("host", HOSTS)
def test_equals_masks_in_a_loop(host, options, tabulated):
    plain = HOSTS[host]()
    model, stage = wrap_width(copy.deepcopy(plain), **options)
    inputs = make_inputs(model)
    if tabulated:
        stage.tabulate(inputs[1])
    expected = run_oracle(plain, stage, inputs)
    assert error(run(model, inputs), expected) < 1e-5
    assert error(run(model, inputs), expected) < 1e-5  # with weights that were cut before
    assert error(run(plain, inputs), expected) > 0.01  # the masks matter
    assert (stage.table.memory_bytes > 0) is tabulated


def test_masks_differ_by_step_block_and_kind():
    _, stage = wrap_width(make_dc())
    masks = stage.read_masks((900.0, 420.0, 30.0))
    assert masks.heads.shape == (3, DEPTH, HEADS)
    assert bool(masks.heads[..., 0].all() and masks.groups[..., 0].all())
    for found in (masks.heads, masks.groups):
        assert 0.2 < found[..., 1:].float().mean() < 0.8
        assert not torch.equal(found[0], found[1])
        assert not torch.equal(found[:, 0], found[:, 1])
    for step, t in enumerate(masks.timesteps):
        for block in range(DEPTH):
            heads, groups = step_masks(stage, block, t)
            assert torch.equal(masks.heads[step, block].float(), heads)
            assert torch.equal(masks.groups[step, block].float(), groups)


@pytest.mark.parametrize("keep", [0.5, 0.11, [0.9, 0.2, 0.5]])
def test_tokens_by_rank_equal_the_loop(keep):
    plain = make_research()
    model, stage = wrap_width(copy.deepcopy(plain))
    inputs = make_inputs(model)
    stage.limit_tokens(keep=keep)
    expected = run_oracle(plain, stage, inputs, keep)
    assert error(run(model, inputs), expected) < 1e-5
    natural = run_oracle(plain, stage, inputs)
    assert error(natural, expected) > 0.005


@pytest.mark.parametrize("make", [make_dc, make_research])
def test_fewer_operations_and_rows_of_the_mlp(make):
    model, stage = wrap_width(make(), gate_tokens=False)
    inputs = make_inputs(model, times=(420.0,))
    with adaptok.trace(model) as seen:
        run(model, inputs)
    found = seen.steps[0].flops
    masks = stage.read_masks((420.0,))
    heads = masks.heads[0].float().mean(1)
    groups = masks.groups[0].float().mean(1)
    b, n = 3, 16 if make is make_dc else 24
    attention = 2 * b * n * (4 * WIDTH * WIDTH + 2 * n * WIDTH)
    mlp = 2 * b * n * 8 * WIDTH * WIDTH
    modulation = DEPTH * 2 * b * 6 * WIDTH * WIDTH
    routers = 2 * DEPTH * (HEADS + HEADS - 2) * 32
    expected = float((attention * heads + mlp * groups).sum()) + modulation + routers
    assert found == pytest.approx(expected, rel=1e-6)


def test_tokens_that_skip_are_not_computed(monkeypatch):
    model, stage = wrap_width(make_research(), gate_heads=False, groups=1)
    inputs = make_inputs(model, times=(420.0,))
    rows = []
    linear = torch.nn.functional.linear

    def watch(x, weight, bias=None):
        if weight.shape == (4 * WIDTH, WIDTH):
            rows.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    run(model, inputs)
    assert all(0 < number < 3 * 24 for number in rows[:DEPTH])
    rows.clear()
    stage.limit_tokens(tokens=[3, 20, 9])
    run(model, inputs)
    assert rows == [32] * DEPTH


@pytest.mark.parametrize("keep", [None, [0.9, 0.2, 0.5]])
@pytest.mark.parametrize("make", [make_dc, make_research, make_diffusers])
def test_a_sample_is_the_same_alone(make, keep):
    model, stage = wrap_width(make())
    inputs = make_inputs(model, b=3)
    call = (lambda x: model(x[0], x[1].long(), x[2]).sample) if make is make_diffusers else None
    call = call or (lambda x: model(*x))
    stage.limit_tokens(keep=keep)
    with torch.no_grad():
        together = call(inputs)
        for sample in range(3):
            stage.limit_tokens(keep=None if keep is None else keep[sample])
            alone = call([value[sample : sample + 1] for value in inputs])
            assert error(alone[0], together[sample]) < 1e-5
    assert error(together[0], together[1]) > 0.01


@pytest.mark.parametrize("make", [make_dc, make_research])
def test_guidance_halves_run_together(make):
    model, _ = wrap_width(make())
    x, t, y = make_inputs(model, b=2, times=(420.0,))
    y = torch.tensor([1, 5 if make is make_dc else 10])
    both = torch.cat([x[:1], x[:1]])
    with torch.no_grad():
        guided = model.forward_with_cfg(both, t, y, 3.0)
        halves = [model(both[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(2)]
    mixed = halves[1][:, :3] + 3.0 * (halves[0] - halves[1])[:, :3]
    assert error(guided[:1, :3], mixed) < 1e-5


@pytest.mark.parametrize("make", [make_dc, make_research, make_diffusers])
def test_a_fresh_wrap_is_the_host_with_every_part_run(make):
    model = make()
    inputs = make_inputs(model)
    if make is make_diffusers:
        inputs = (inputs[0], inputs[1].long(), inputs[2])
    expected = run(model, inputs)
    keys = list(model.state_dict())
    adaptok.wrap(model, stack=["width"])
    added = [key for key in model.state_dict() if key not in keys]
    assert added
    assert all(".adaptok.width." in key for key in added)
    (stage,) = (m for m in model.modules() if type(m).__name__ == "DynamicWidth")
    judged = []
    for router in stage.gates.tokens:
        router.register_forward_hook(lambda *args: judged.append(args[2]))
    found = run(model, inputs)
    found, expected = (x.sample if hasattr(x, "sample") else x for x in (found, expected))
    assert error(found, expected) < 1e-5
    assert len(judged) == 3 * DEPTH  # three steps
    assert stage.read_masks(inputs[1].tolist()).heads.all()
    adaptok.unwrap(model)
    assert list(model.state_dict()) == keys
    after = run(model, inputs)
    after = after.sample if hasattr(after, "sample") else after
    assert torch.equal(after, expected)


def test_diffusers_blocks_equal_masks():
    """Heads and groups that are off, as zeroed columns of the layers behind them."""
    plain = make_diffusers()
    model, stage = wrap_width(copy.deepcopy(plain), gate_tokens=False)
    x, t, y = make_inputs(model, times=(420.0,))
    masks = stage.read_masks((420.0,))
    with torch.no_grad():
        for block, heads, groups in zip(
            plain.transformer_blocks, masks.heads[0], masks.groups[0], strict=True
        ):
            block.attn1.to_out[0].weight *= heads.repeat_interleave(WIDTH // HEADS)
            block.ff.net[2].weight *= groups.repeat_interleave(4 * WIDTH // HEADS)
        expected, found = plain(x, t.long(), y).sample, model(x, t.long(), y).sample
    assert error(found, expected) < 1e-5
    assert count(model, (x, t.long(), y)) < 0.8 * count(plain, (x, t.long(), y))


class TestTable:
    def test_cut_weights_follow_the_host(self):
        plain = make_dc()
        model, stage = wrap_width(copy.deepcopy(plain))
        inputs = make_inputs(model)
        stage.tabulate(inputs[1])
        run(model, inputs)
        assert stage.table.memory_bytes > 0
        for one in (plain, model):
            with torch.no_grad():
                for block in list(one.get_submodule("blocks").children())[:DEPTH]:
                    block.attn.qkv.weight.mul_(1.5)
                    block.mlp.fc2.weight.add_(0.05)
        assert error(run(model, inputs), run_oracle(plain, stage, inputs)) < 1e-5

    def test_masks_follow_the_routers(self):
        plain = make_dc()
        model, stage = wrap_width(copy.deepcopy(plain))
        inputs = make_inputs(model)
        before = stage.tabulate(inputs[1])
        run(model, inputs)
        with torch.no_grad():
            stage.gates.step.bias.neg_()
            stage.gates.step.weight.neg_()
        assert not torch.equal(stage.read_masks(inputs[1].tolist()).heads, before.heads)
        assert error(run(model, inputs), run_oracle(plain, stage, inputs)) < 1e-5

    @pytest.mark.parametrize("cache_mb", [0.0, 0.02])
    def test_memory_is_bounded(self, cache_mb):
        plain = make_dc()
        model, stage = wrap_width(copy.deepcopy(plain), cache_mb=cache_mb)
        inputs = make_inputs(model)
        stage.tabulate(inputs[1])
        assert error(run(model, inputs), run_oracle(plain, stage, inputs)) < 1e-5
        assert stage.table.memory_bytes <= cache_mb * 2**20
        assert (stage.table.memory_bytes > 0) is (cache_mb > 0)

    def test_training_and_moving_forget_the_weights(self):
        model, stage = wrap_width(make_dc())
        inputs = make_inputs(model)
        stage.tabulate(inputs[1])
        for change in (lambda: model.train().eval(), lambda: model.to(torch.float64).float()):
            run(model, inputs)
            assert stage.table.memory_bytes > 0
            change()
            assert stage.table.memory_bytes == 0

    def test_fractions_of_a_step_are_found(self):
        model, stage = wrap_width(make_dc(), steps=1.0)
        x, _, y = make_inputs(model)
        stage.tabulate((0.1, 0.7))
        run(model, (x[:1], torch.tensor([0.1]), y[:1]))
        assert stage.table.memory_bytes > 0

    def test_copies_begin_without_weights(self):
        model, stage = wrap_width(make_dc())
        inputs = make_inputs(model)
        stage.tabulate(inputs[1])
        expected = run(model, inputs)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            (other,) = (m for m in twin.modules() if type(m).__name__ == "DynamicWidth")
            assert other.table.memory_bytes == 0
            assert other.timesteps == stage.timesteps
            assert torch.equal(run(twin, inputs), expected)
            with torch.no_grad():
                other.gates.step.bias.neg_()
            assert torch.equal(run(model, inputs), expected)


def test_save_and_load(tmp_path):
    plain = make_dc()
    model, stage = wrap_width(copy.deepcopy(plain), groups=4, target=0.4, timesteps=(420.0,))
    inputs = make_inputs(model)
    expected = run(model, inputs)
    adaptok.save(model, tmp_path)
    again = adaptok.load(plain, tmp_path)
    assert torch.equal(run(again, inputs), expected)
    (other,) = (m for m in again.modules() if type(m).__name__ == "DynamicWidth")
    assert (other.groups, other.target, other.timesteps) == (4, 0.4, (420.0,))
    assert torch.equal(other.read_masks((420.0,)).heads, stage.read_masks((420.0,)).heads)


def test_half_precision_keeps_float32_routers():
    model, stage = wrap_width(make_dc())
    inputs = make_inputs(model)
    expected = run(model, inputs)
    before = stage.read_masks(inputs[1].tolist())
    model.to(torch.bfloat16)
    assert stage.gates.step.weight.dtype == torch.float32
    assert stage.gates.tokens[0].score.weight.dtype == torch.float32
    after = stage.read_masks(inputs[1].tolist())
    assert torch.equal(before.heads, after.heads)
    assert error(run(model, inputs).float(), expected) < 0.2
