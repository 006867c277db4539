"""Confidence exit: who leaves, what leaves, and what is not computed."""

import copy
import math
import pickle

import pytest
import torch
from adaptok_exit.confidence import ConfidenceExit
from adaptok_exit.places import find_places
from exit_oracles import (
    BLOCKS,
    DEPTH,
    IMAGES,
    count_samples,
    leave_one_by_one,
    run_traced,
    stage_of,
    wrap_exits,
)
from reducers import DropOdd, MergeEnd

import adaptok
from adaptok.errors import ConfigError, StackError
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights
from benchmarks.architectures.facebook_models import DiT


def test_it_is_the_loop_over_single_images():
    model = wrap_exits()
    out, step = run_traced(model, IMAGES)
    expected, depths = leave_one_by_one(make_vit(DEPTH), stage_of(model), IMAGES)
    assert sorted(depths) == [2, 2, 4, 6, 6]
    assert step.depths.tolist() == depths
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    # the adapters and the exits matter
    plain = make_vit(DEPTH)(IMAGES)
    assert (out - plain).abs().amax(1).sort().values[2] > 0.01


def test_blocks_compute_nothing_for_who_has_left():
    model = wrap_exits()
    counts = count_samples(model.blocks.blocks)
    _, step = run_traced(model, IMAGES)
    assert counts == [5, 5, 3, 3, 2, 2]
    stage_of(model).set_threshold(None)
    _, whole = run_traced(model, IMAGES)
    assert step.flops < 0.75 * whole.flops  # 20 of 30 block calls, and heads


def test_nobody_matters_to_anybody_else():
    model = wrap_exits()
    together, step = run_traced(model, IMAGES)
    for sample in range(5):
        alone, single = run_traced(model, IMAGES[sample : sample + 1])
        torch.testing.assert_close(alone[0], together[sample], rtol=1e-5, atol=1e-5)
        assert single.depths[0] == step.depths[sample]
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled, _ = run_traced(model, IMAGES[order])
    torch.testing.assert_close(shuffled, together[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [None, 1.0, math.inf])
def test_it_is_the_identity_when_nobody_leaves_and_the_heads_run(threshold):
    vit = make_vit(DEPTH)
    expected = vit(IMAGES)
    model = adaptok.wrap(vit, stack=[{"name": "exit", "threshold": threshold}])
    stage = fill_weights(stage_of(model))
    judged = []
    for judge in stage.judges:
        judge.register_forward_hook(lambda *args: judged.append(args[-1].shape))
    assert torch.equal(model(IMAGES), expected)
    assert judged == [(5,), (5,)]
    assert torch.equal(adaptok.unwrap(model)(IMAGES), expected)


def test_everybody_can_leave_at_the_first_exit():
    model = wrap_exits(threshold=1e-6, leave=False)
    counts = count_samples(model.blocks.blocks)
    _, step = run_traced(model, IMAGES)
    assert step.depths.tolist() == [2] * 5
    assert counts == [5, 5, 0, 0, 0, 0]


def test_what_is_no_number_stays():
    model = wrap_exits(threshold=1e-6, leave=False)
    images = IMAGES.clone()
    images[1] = math.nan
    out, step = run_traced(model, images)
    assert step.depths.tolist() == [2, 6, 2, 2, 2]
    assert bool(out[1].isnan().all())
    assert bool(out[[0, 2, 3, 4]].isfinite().all())


def test_in_training_mode_nobody_leaves_and_the_host_learns():
    model = wrap_exits().train()
    with adaptok.trace(model) as seen:
        loss = (model(IMAGES) ** 2).sum()
    loss.backward()
    assert seen.steps[0].depths.tolist() == [6] * 5
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in model.blocks.blocks)


def test_in_a_span_depths_are_block_numbers_and_the_rest_runs_for_all():
    model = adaptok.wrap(make_vit(DEPTH), stack=["exit"], span=(1, 5))
    stage = fill_weights(stage_of(model))
    stage.set_threshold((1e-6, 1.0))
    counts = count_samples(model.blocks.blocks)
    _, step = run_traced(model, IMAGES)
    assert step.depths.tolist() == [3] * 5
    assert counts == [5, 5, 5, 0, 0, 5]


def test_the_mean_of_the_cells_is_read_where_there_is_no_class_token():
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    vit = VisionTransformer(**sizes, class_token=False, global_pool="avg", num_classes=5)
    model = adaptok.wrap(fill_weights(vit).eval(), stack=["exit"])
    stage = fill_weights(stage_of(model))
    with torch.no_grad(), stage.record() as records:
        model(IMAGES)
    call = records[0].exits[0]
    judge = stage.judges[0]
    x = judge.norm(call.x.mean(1).repeat(1, 2))
    expected = judge.out(torch.nn.functional.gelu(judge.hidden(x)))[:, 0]
    torch.testing.assert_close(judge(call), expected)


@pytest.mark.parametrize(
    "inner",
    [{"name": "dc", "layout": "bucketed"}, MergeEnd(r=2), DropOdd()],
    ids=["dc", "merge", "drop"],
)
def test_stages_of_tokens_run_inside_for_those_who_are_there(inner):
    if isinstance(inner, torch.nn.Module):
        inner = copy.deepcopy(inner)
    model = wrap_exits(stack=[inner])
    adaptok.set_budget(model, keep=[0.3, 0.9, 0.5, 0.7, 0.4])
    for name, part in model.blocks.adaptok.items():
        if name != "exit":
            fill_weights(part, seed=9)
    from exit_oracles import set_apart

    set_apart(model)
    assert type(model.blocks.stages[0]) is ConfidenceExit
    together, step = run_traced(model, IMAGES)
    assert sorted(step.depths.tolist()) == [2, 2, 4, 6, 6]
    assert step.kept.max() < 24
    for sample, keep in enumerate([0.3, 0.9, 0.5, 0.7, 0.4]):
        with adaptok.budget(model, keep=keep):
            alone, single = run_traced(model, IMAGES[sample : sample + 1])
        torch.testing.assert_close(alone[0], together[sample], rtol=1e-5, atol=1e-5)
        assert single.depths[0] == step.depths[sample]
        assert torch.equal(single.provenance.token[0], step.provenance.token[sample])


def test_dc_inside_is_the_same_as_dc_in_pieces():
    model = wrap_exits(stack=["dc"], leave=False, threshold=(1e-6, 1.0))
    fill_weights(model.blocks.adaptok["dc"], seed=2)
    adaptok.set_budget(model, keep=0.4)
    out, _ = run_traced(model, IMAGES)
    short = adaptok.wrap(make_vit(DEPTH), "dc", span=(0, 2), budget=0.4)
    fill_weights(short.blocks.adaptok["dc"], seed=2)
    adapter = stage_of(model).adapters[0]
    blocks = short.blocks.blocks
    for block in blocks[3:]:
        block.forward = lambda x, *args, **kwargs: x
    blocks[2].forward = lambda x, *args, **kwargs: adapter(x)
    with torch.no_grad():
        torch.testing.assert_close(short(IMAGES), out, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_leave_alike():
    model = wrap_exits()
    out, _ = run_traced(model, IMAGES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again, step = run_traced(twin, IMAGES)
        assert torch.equal(again, out)
        assert len(set(step.depths.tolist())) == 3


def test_saved_exits_have_their_heads_and_thresholds_again(tmp_path):
    model = wrap_exits()
    out, step = run_traced(model, IMAGES)
    adaptok.save(model, tmp_path / "exits")
    other = adaptok.load(make_vit(DEPTH), tmp_path / "exits")
    again, found = run_traced(other, IMAGES)
    assert torch.equal(again, out)
    assert found.depths.tolist() == step.depths.tolist()
    assert stage_of(other).limits == stage_of(model).limits


def test_in_half_precision_and_under_autocast():
    model = wrap_exits()
    with torch.autocast("cpu", torch.bfloat16):
        out, step = run_traced(model, IMAGES)
    assert bool(out.isfinite().all())
    out, step = run_traced(model.bfloat16(), IMAGES.bfloat16())
    assert out.dtype == torch.bfloat16
    assert len(set(step.depths.tolist())) > 1


def test_blocks_are_compiled_around_the_decisions():
    model = wrap_exits()
    out, _ = run_traced(model, IMAGES)
    adaptok.compile(model, backend="eager")
    try:
        with torch.no_grad():
            torch.testing.assert_close(model(IMAGES), out, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(IMAGES[:3]), out[:3], rtol=1e-5, atol=1e-5)
    finally:
        adaptok.unwrap(model)
        torch.compiler.reset()


def test_places():
    assert find_places(None, 0, 12) == ((0, 6), (1, 9))
    assert find_places(None, 0, 2) == ((0, 1),)
    assert find_places(None, 3, 4) == ()
    assert find_places((6, 9), 5, 7) == ((0, 6),)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"threshold": 1.5}, r"a confidence in \(0, 1\].*1.5"),
        ({"threshold": 0.0}, r"a confidence in \(0, 1\]"),
        ({"threshold": math.nan}, r"a confidence in \(0, 1\].*nan"),
        ({"threshold": (0.9,)}, "each of the 2 exits.*got 1"),
        ({"blocks": (0, 3)}, r"each at least 1.*\(0, 3\)"),
        ({"blocks": (4, 2)}, "several that rise"),
        ({"blocks": ()}, "one index or several"),
        ({"patience": 3}, "patience: this option does not exist"),
    ],
)
def test_options_out_of_range_are_refused(options, problem):
    vit = make_vit(DEPTH)
    with pytest.raises(ConfigError, match=problem):
        adaptok.wrap(vit, stack=[{"name": "exit"} | options])
    assert not adaptok.is_wrapped(vit)


def test_exits_outside_of_the_span_are_refused():
    vit = make_vit(DEPTH)
    for blocks in ((2, 6), (9,), (1, 2)):
        with pytest.raises(StackError, match="the blocks here are 1 to 5: give blocks="):
            adaptok.wrap(vit, stack=[{"name": "exit", "blocks": blocks}], span=(1, 6))
    with pytest.raises(StackError, match=r"the span \(2, 3\) has one"):
        adaptok.wrap(vit, stack=["exit"], span=(2, 3))
    assert not adaptok.is_wrapped(vit)


def test_diffusion_transformers_are_sent_to_the_schedule():
    dit = DiT((8, 12))
    with pytest.raises(StackError, match=r"diffusion transformer.*stack=\['schedule'\]"):
        adaptok.wrap(dit, stack=["exit"])
    assert not adaptok.is_wrapped(dit)


def test_two_stages_that_choose_the_depth_are_refused():
    with pytest.raises(StackError, match="both decide how many blocks run"):
        adaptok.wrap(make_vit(DEPTH), stack=["exit", "schedule"])


def test_it_shows_in_the_repr_of_a_model():
    shown = repr(wrap_exits(threshold=0.75, leave=False).blocks)
    assert "blocks 2, 4, thresholds 0.75, 0.75" in shown
    assert BLOCKS == (2, 4)
