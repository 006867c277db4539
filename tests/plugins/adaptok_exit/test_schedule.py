"""The schedule of a diffusion transformer: depth by noise, sample by sample."""

import copy

import pytest
import torch
from adaptok_exit.schedules import ASE, count_blocks, find_row, measure_noise, read_schedule
from adaptok_exit.tuning import scheduled_loss, tune_schedule, weigh_noise
from exit_oracles import count_samples, run_traced

import adaptok
from adaptok.errors import ConfigError, DataError, HandOverError, NotWrappedError, ShapeError
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights
from benchmarks.architectures.facebook_models import DiT

DEPTH = 7
TABLE = ((0.0, 1.0), (0.3, 0.7), (0.8, 0.4))  # 7, 5 and 3 of 7 blocks
LATENTS = torch.randn(6, 4, 8, 12, generator=torch.Generator().manual_seed(2))
TIMES = torch.tensor([900, 20, 400, 999, 500, 0])
CLASSES = torch.tensor([1, 2, 3, 4, 5, 10])
DEPTHS = [3, 7, 5, 3, 5, 7]


def make_dit():
    return fill_weights(DiT((8, 12), depth=DEPTH)).eval()


def wrap_dit(stack=(), **options):
    spec = {"name": "schedule", "schedule": TABLE, "scale": (999, 0)} | options
    return adaptok.wrap(make_dit(), stack=[spec, *stack])


def run_cut(dit, sample, adapters=None):
    """What a plain DiT answers one sample after the blocks of its row, in a loop."""
    noise = float(TIMES[sample]) / 999
    row = 2 if noise >= 0.8 else 1 if noise >= 0.3 else 0
    x, t, y = LATENTS[sample, None], TIMES[sample, None], CLASSES[sample, None]
    with torch.no_grad():
        h = dit.x_embedder(x) + dit.pos_embed
        c = dit.t_embedder(t) + dit.y_embedder(y, False)
        for block in dit.blocks[: (7, 5, 3)[row]]:
            h = block(h, c)
        if adapters is not None and row:
            adapter = adapters[str(row)]
            h = h + adapter.norm(h) @ adapter.linear.weight.T + adapter.linear.bias
        return dit.unpatchify(dit.final_layer(h, c))[0]


@pytest.mark.parametrize("adapt", [False, True])
def test_it_is_the_loop_over_single_samples(adapt):
    model = wrap_dit(adapt=adapt)
    stage = fill_weights(model.blocks.adaptok["schedule"])
    counts = count_samples(model.blocks.blocks)
    out, step = run_traced(model, LATENTS, TIMES, CLASSES)
    assert step.depths.tolist() == DEPTHS
    assert counts == [6, 6, 6, 4, 4, 2, 2]
    dit = make_dit()
    expected = [run_cut(dit, sample, stage.adapters if adapt else None) for sample in range(6)]
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-5, atol=1e-5)
    full = dit(LATENTS, TIMES, CLASSES)
    assert (out - full)[[0, 2]].abs().max() > 0.05  # blocks that are left out matter


def test_nobody_matters_to_anybody_else_also_with_tokens_chosen_inside():
    model = wrap_dit(stack=[{"name": "dc"}])
    fill_weights(model.blocks.adaptok["dc"], seed=3)
    keeps = [0.3, 0.8, 0.5, 0.6, 0.9, 0.4]
    adaptok.set_budget(model, keep=keeps)
    together, step = run_traced(model, LATENTS, TIMES, CLASSES)
    assert step.depths.tolist() == DEPTHS
    assert step.kept.tolist() == [7, 19, 12, 14, 22, 10]
    for i, keep in enumerate(keeps):
        with adaptok.budget(model, keep=keep):
            one = (value[i : i + 1] for value in (LATENTS, TIMES, CLASSES))
            alone, single = run_traced(model, *one)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)
        assert torch.equal(single.provenance.token[0], step.provenance.token[i])


@pytest.mark.parametrize("schedule", ["full", ((0.0, 1.0), (0.5, 1.0))])
def test_at_full_depth_it_is_the_identity(schedule):
    model = wrap_dit(schedule=schedule, adapt=True)
    out, step = run_traced(model, LATENTS, TIMES, CLASSES)
    assert torch.equal(out, make_dit()(LATENTS, TIMES, CLASSES))
    assert step.depths.tolist() == [7] * 6


def test_a_schedule_can_be_paused_for_a_teacher():
    model = wrap_dit(adapt=True)
    stage = fill_weights(model.blocks.adaptok["schedule"])
    with stage.at_full_depth():
        full, step = run_traced(model, LATENTS, TIMES, CLASSES)
    assert torch.equal(full, make_dit()(LATENTS, TIMES, CLASSES))
    assert step.depths.tolist() == [7] * 6
    assert run_traced(model, LATENTS, TIMES, CLASSES)[1].depths.tolist() == DEPTHS


def test_both_halves_of_a_guided_call_run_alike():
    model = wrap_dit()
    x, t, y = LATENTS[:4], torch.tensor([900, 20, 900, 20]), torch.tensor([1, 2, 10, 10])
    with torch.no_grad(), adaptok.trace(model) as seen:
        model.forward_with_cfg(x, t, y, 1.5)
    assert seen.steps[0].depths.tolist() == [3, 7, 3, 7]


def test_pixart_with_text_runs_by_its_schedule():
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 6, "sample_size": 8}
    model = diffusers.PixArtTransformer2DModel(
        **sizes, in_channels=4, cross_attention_dim=32, caption_channels=24, out_channels=8
    )
    model = fill_weights(model).eval()
    x, text = torch.randn(3, 4, 8, 12), torch.randn(3, 5, 24)
    given = {
        "encoder_hidden_states": text,
        "timestep": torch.tensor([999, 0, 600]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]),
    }
    spec = {"name": "schedule", "schedule": TABLE, "scale": (999, 0), "adapt": True}
    adaptok.wrap(model, stack=[spec])
    fill_weights(model.transformer_blocks.adaptok)
    with torch.no_grad(), adaptok.trace(model) as seen:
        together = model(x, **given).sample
    assert seen.steps[0].depths.tolist() == [2, 6, 4]
    for i in range(3):
        one = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        with torch.no_grad():
            alone = model(x[i : i + 1], **one).sample[0]
        torch.testing.assert_close(alone, together[i], rtol=1e-5, atol=1e-5)


def test_the_preset_of_the_paper():
    counts = [count_blocks(ASE[find_row(t / 1000, ASE)][1], 28) for t in range(50, 1000, 100)]
    assert counts == [28, 28, 24, 24, 20, 20, 16, 16, 12, 12]
    assert read_schedule("full") == ((0.0, 1.0),)
    assert [count_blocks(0.01, blocks) for blocks in (1, 2, 12)] == [1, 2, 2]


def test_noise_is_measured_on_any_scale():
    assert measure_noise(torch.tensor([1.0, 0.25, 0.0]), (0.0, 1.0)) == [0.0, 0.75, 1.0]
    with pytest.raises(HandOverError, match="step 500 of sample 1 does not lie between 0"):
        measure_noise(torch.tensor([0.5, 500.0]), (1.0, 0.0))
    with pytest.raises(HandOverError, match="step nan"):
        measure_noise(torch.tensor([float("nan")]), (1.0, 0.0))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"schedule": "demo"}, "no schedule 'demo'.*'full' or 'ase'"),
        ({"schedule": ((0.5, 1.0),)}, r"from noise 0 .*got \[0.5\]"),
        ({"schedule": ((0.0, 1.0), (0.6, 0.5), (0.4, 0.3))}, "rise from 0 and stay below 1"),
        ({"schedule": ((0.0, 1.0), (1.0, 0.5))}, "rise from 0 and stay below 1"),
        ({"schedule": ((0.0, 1.2),)}, r"share of the blocks in \(0, 1\], got 1.2"),
        ({"schedule": ((0.0, 0.0),)}, r"share of the blocks in \(0, 1\], got 0"),
        ({"schedule": ()}, "got no row"),
        ({"scale": (5, 5)}, "two different numbers"),
        ({"scale": (float("nan"), 0)}, "two different numbers"),
    ],
)
def test_tables_that_are_none_are_refused(options, problem):
    dit = make_dit()
    with pytest.raises(ConfigError, match=problem):
        adaptok.wrap(dit, stack=[{"name": "schedule", "scale": (999, 0)} | options])
    assert not adaptok.is_wrapped(dit)


def test_a_host_without_a_step_is_refused():
    vit = make_vit()
    with pytest.raises(adaptok.AdaptokError, match="step"):
        adaptok.wrap(vit, stack=["schedule"])
    assert not adaptok.is_wrapped(vit)


def test_a_scale_that_nobody_knows_is_asked_for():
    dit = make_dit()
    with pytest.raises(HandOverError, match=r'"scale": \(999, 0\)'):
        adaptok.wrap(dit, stack=["schedule"])
    with pytest.raises(HandOverError, match=r"not lie between 0 \(clean\) and 1 \(noise\)"):
        adaptok.wrap(dit, stack=[{"name": "schedule", "scale": (1, 0)}])
    assert not adaptok.is_wrapped(dit)


def test_weights_and_options_come_back(tmp_path):
    model = wrap_dit(adapt=True)
    fill_weights(model.blocks.adaptok["schedule"])
    out, _ = run_traced(model, LATENTS, TIMES, CLASSES)
    adaptok.save(model, tmp_path / "schedule")
    other = adaptok.load(make_dit(), tmp_path / "schedule")
    assert torch.equal(run_traced(other, LATENTS, TIMES, CLASSES)[0], out)
    assert torch.equal(run_traced(copy.deepcopy(other), LATENTS, TIMES, CLASSES)[0], out)


def test_gradients_reach_the_blocks_that_ran_and_the_adapters():
    model = wrap_dit(adapt=True)
    (model(LATENTS[:1], TIMES[:1], CLASSES[:1]) ** 2).sum().backward()
    ran = [block.mlp[0].weight.grad is not None for block in model.blocks.blocks]
    assert ran == [True] * 3 + [False] * 4
    adapters = model.blocks.adaptok["schedule"].adapters
    assert adapters["2"].linear.weight.grad.abs().sum() > 0
    assert adapters["1"].linear.weight.grad is None


def test_the_loss_is_the_weighted_sum():
    early, target, full = torch.randn(3, 3, 2, 4, 5)
    noise, table = [0.1, 0.6, 0.9], ((0.0, 2.0), (0.5, 0.5))
    expected = 0.0
    for i, weight in enumerate([2.0, 0.5, 0.5]):
        first = float(((early[i] - target[i]) ** 2).mean())
        second = float(((early[i] - full[i]) ** 2).mean())
        expected += weight * (first + 0.25 * second) / 3
    found = scheduled_loss(early, target, noise, weights=table, full=full, full_weight=0.25)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert weigh_noise(noise, table) == [2.0, 0.5, 0.5]
    assert float(scheduled_loss(early, early, noise)) == 0.0
    full.requires_grad_()
    assert not scheduled_loss(early, None, noise, full=full).requires_grad


def test_losses_of_nothing_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match="give one of them"):
        scheduled_loss(x, None, [0.0, 0.0])
    with pytest.raises(ShapeError, match="one share of noise each, got 3"):
        scheduled_loss(x, x, [0.0] * 3)
    with pytest.raises(ShapeError, match="the early answer is"):
        scheduled_loss(x, torch.zeros(2, 4), [0.0] * 2)
    with pytest.raises(ConfigError, match="at least 0"):
        scheduled_loss(x, x, [0.0] * 2, weights=((0.0, -1.0),))


def test_training_adapters_brings_early_answers_nearer_and_leaves_the_host():
    model = wrap_dit(adapt=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    batches = [(LATENTS, TIMES, CLASSES), (LATENTS.flip(0), TIMES, CLASSES)]
    report = tune_schedule(model, batches, epochs=15, learning_rate=3e-3)
    assert report.steps == 30
    assert report.losses[-1] < 0.7 * report.losses[0]
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert changed
    assert all(".adaptok.schedule.adapters." in name for name in changed)
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}


def test_training_without_adapters_or_data_is_refused():
    with pytest.raises(ConfigError, match='"adapt": True'):
        tune_schedule(wrap_dit(), [])
    with pytest.raises(DataError, match="no batch in epoch 1"):
        tune_schedule(wrap_dit(adapt=True), [])
    with pytest.raises(NotWrappedError, match="has no schedule"):
        tune_schedule(make_dit(), [])
    bad = LATENTS.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="batch 0 with NaN"):
        tune_schedule(wrap_dit(adapt=True), [(bad, TIMES, CLASSES)])
