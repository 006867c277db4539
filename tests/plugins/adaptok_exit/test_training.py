"""Heads and adapters learn from the host's own answers, and thresholds keep their promise."""

import math

import pytest
import torch
from adaptok_exit.calibration import (
    ExitCalibration,
    calibrate_thresholds,
    choose_thresholds,
)
from adaptok_exit.comparing import compare, distance_between
from adaptok_exit.training import judge_loss, token_loss, train_exits
from exit_oracles import (
    IMAGES,
    count_samples,
    draw_task,
    make_task_vit,
    run_traced,
    stage_of,
    wrap_exits,
)

import adaptok
from adaptok.errors import ConfigError, DataError, NotWrappedError
from adaptok.testing import make_vit


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = adaptok.wrap(make_task_vit(), stack=["exit"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = draw_task(960, seed=1).split(64)
    report = train_exits(model, batches, epochs=6, learning_rate=3e-3)
    return model, report, before


def test_training_brings_early_answers_nearer_and_leaves_the_host(trained):
    model, report, before = trained
    assert report.steps == 90
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert min(report.agreement) > 0.6
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert all(".adaptok.exit." in name for name in changed)
    for part in ("judges.0", "judges.1", "adapters.0", "adapters.1"):
        assert any(part in name for name in changed)
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training


def test_heads_foretell_who_agrees(trained):
    model, _, _ = trained
    images = draw_task(300, seed=11)
    stage = stage_of(model)
    with torch.no_grad(), stage.record() as records:
        full = model(images)
        sure = stage.judges[0](records[0].exits[0])
        with stage.replay(0, records[0]):
            agrees = compare(model(images), full)
    assert 0.3 < agrees.float().mean() < 0.95
    assert sure[agrees].mean() > sure[~agrees].mean() + 0.25
    rate = agrees.float().mean()
    knows_the_rate = -(rate * rate.log() + (1 - rate) * (1 - rate).log())
    assert judge_loss(sure, agrees) < knows_the_rate


def test_calibrated_thresholds_keep_their_promise_on_other_data(trained):
    model, _, _ = trained
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = calibrate_thresholds(model, draw_task(800, seed=2).split(100), agreement=0.9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (made.chosen_on, made.held_out) == (400, 400)
    assert made.holds
    assert sum(made.left) > 0.05
    assert ExitCalibration.from_json(made.to_json()) == made
    images = draw_task(800, seed=3)
    full, _ = run_traced(model, images)
    made.apply(model)
    early, step = run_traced(model, images)
    stage_of(model).set_threshold(None)
    left = step.depths < 6
    assert left.float().mean() > 0.05
    assert compare(early, full)[left].float().mean() >= 0.9
    # who stays answers as before
    torch.testing.assert_close(early[~left], full[~left], rtol=1e-4, atol=1e-4)


def test_what_calibration_measures_is_what_a_forward_does(trained):
    model, _, _ = trained
    images = draw_task(200, seed=4)
    made = calibrate_thresholds(model, [images], 0.8, held_out=[images], certainty=0.6)
    full, _ = run_traced(model, images)
    made.apply(model)
    early, step = run_traced(model, images)
    stage_of(model).set_threshold(None)
    left = step.depths < 6
    share = tuple(float((step.depths == block).float().mean()) for block in (3, 4))
    assert made.left == pytest.approx(share)
    assert made.measured == pytest.approx(float(compare(early, full)[left].float().mean()))


def test_thresholds_are_those_of_a_loop_over_ever_larger_sets():
    generator = torch.Generator().manual_seed(1)
    sure = torch.rand(2, 200, generator=generator)
    agrees = torch.rand(2, 200, generator=generator) < (2 * sure).clamp(max=0.97)
    found = choose_thresholds(sure, agrees, 0.8, certainty=0.9)
    here = torch.ones(200, dtype=torch.bool)
    for number, threshold in enumerate(found):
        order = [i for i in sure[number].argsort(descending=True).tolist() if here[i]]
        passed = 0
        for start in (17, len(order) // 8, len(order) // 4, len(order) // 2):
            for count in [*range(max(17, start), len(order), 10), len(order)]:
                right = int(agrees[number][order[:count]].sum())
                ways = (
                    math.comb(count, k) * 0.8**k * 0.2 ** (count - k)
                    for k in range(right, count + 1)
                )
                if sum(ways) > 0.1 / 4:  # .8 ** 17 < .025 < .8 ** 16
                    break
                passed = max(passed, count)
        leaves = here & (sure[number] > torch.tensor(threshold))
        assert sorted(order[:passed]) == leaves.nonzero().flatten().tolist()
        assert passed < len(order)
        assert passed > 16 or number == 1
        here &= ~leaves


def test_promises_are_kept_as_often_as_said():
    generator = torch.Generator().manual_seed(2)
    kept = []
    for _ in range(200):
        sure = torch.rand(1, 300, generator=generator)
        agrees = torch.rand(1, 300, generator=generator) < sure.sqrt()
        (threshold,) = choose_thresholds(sure, agrees, 0.9, certainty=0.9)
        # the true agreement of those above it: the mean of the root over (threshold, 1)
        true = 1.0 if threshold == 1.0 else (2 / 3) * (1 - threshold**1.5) / (1 - threshold)
        kept.append(true >= 0.9)
    assert sum(kept) >= 170


def test_equal_confidences_leave_together_or_not_at_all():
    sure = torch.tensor([[0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5]])
    agrees = torch.tensor([[True, True, True, True, False, False, False]])
    (threshold,) = choose_thresholds(sure, agrees, 0.5, certainty=0.5)
    assert 0.5 <= threshold < 0.9
    assert choose_thresholds(sure, ~agrees, 0.5, certainty=0.5) == (1.0,)


def test_a_sure_head_that_is_always_right_lets_everybody_leave():
    sure = torch.full((1, 200), 1.0)  # a sigmoid that rounds to one
    (threshold,) = choose_thresholds(sure, torch.ones(1, 200, dtype=torch.bool), 0.98)
    assert 0.0 < threshold < 1.0


def test_few_samples_promise_nothing():
    sure, agrees = torch.full((1, 20), 0.99), torch.ones(1, 20, dtype=torch.bool)
    assert choose_thresholds(sure, agrees, 0.98) == (1.0,)
    for count, leaves in ((182, False), (183, True)):  # .98 ** 183 < .025
        ones = torch.ones(1, count)
        (threshold,) = choose_thresholds(0.9 * ones, ones.bool(), 0.98)
        assert (threshold < 0.9) is leaves


def test_the_losses():
    logits = torch.tensor([2.0, -1.0])
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert float(judge_loss(logits, torch.tensor([True, False]))) == pytest.approx(expected)
    x, y = torch.randn(2, 2, 3, 16)
    x.requires_grad_()
    y.requires_grad_()
    token_loss(x, y).backward()
    assert x.grad is not None
    assert y.grad is None
    out, full = torch.randn(2, 4, 5)
    p, q = full.softmax(1), out.softmax(1)
    torch.testing.assert_close(distance_between(out, full), (p * (p / q).log()).sum() / 4)


def test_features_are_taught_where_there_are_no_classes():
    model = adaptok.wrap(make_vit(6, width=48), stack=["exit"])
    model.reset_classifier(0)
    batches = draw_task(96, seed=1).split(32)
    report = train_exits(model, batches, epochs=4, compared="features", similarity=0.9)
    assert report.losses[-1] < report.losses[0]
    made = calibrate_thresholds(model, batches, 0.8, compared="features", similarity=0.9)
    assert made.compared == "features"


def test_arguments_by_name_and_outputs_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=64, image_size=32, patch_size=8, num_labels=5
    )
    model = transformers.ViTForImageClassification(config).eval()
    adaptok.wrap(model, stack=["exit"])
    report = train_exits(model, [{"pixel_values": draw_task(8, seed=1)}], epochs=3)
    assert report.steps == 3
    assert report.losses[-1] < report.losses[0]


def test_it_trains_beside_dc():
    model = wrap_exits(stack=["dc"], leave=False)
    adaptok.set_budget(model, keep=0.5)
    assert train_exits(model, [IMAGES], epochs=6).losses[-1] > 0
    assert calibrate_thresholds(model, [IMAGES]).held_out == 2


@pytest.mark.parametrize("run", [train_exits, calibrate_thresholds])
def test_bad_batches_are_named(run):
    model = wrap_exits(leave=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    bad = IMAGES.clone()
    bad[2, 0, 5, 5] = math.nan
    with pytest.raises(DataError, match="batch 0 holds NaN"):
        run(model, [bad])
    with pytest.raises(DataError, match="batch 0 holds NaN"):
        run(model, [bad / 0.0])
    with pytest.raises(DataError, match="no batch"):
        run(model, [])
    with pytest.raises(ConfigError, match="got a tuple: leave labels out"):
        run(model, [(IMAGES, torch.zeros(5))])
    with pytest.raises(ConfigError, match="'classes' or 'features', got 'logits'"):
        run(model, [IMAGES], compared="logits")
    with pytest.raises(NotWrappedError, match=r"has no exits.*stack=\['exit'\]"):
        run(make_vit(), [IMAGES])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert stage_of(model).records is None
    assert stage_of(model).answer is None


def test_a_model_that_answers_nan_is_told_of():
    model = wrap_exits(leave=False)
    with torch.no_grad():
        model.head.bias[0] = math.nan
    with pytest.raises(DataError, match="the model answers batch 0 with NaN"):
        calibrate_thresholds(model, [IMAGES])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"agreement": 1.0}, r"agreement is a share in \(0, 1\), got 1.0"),
        ({"agreement": math.nan}, "agreement is a share"),
        ({"certainty": 0.0}, "certainty is a share"),
    ],
)
def test_promises_out_of_range_are_refused(options, problem):
    with pytest.raises(ConfigError, match=problem):
        calibrate_thresholds(wrap_exits(leave=False), [IMAGES], **options)


def test_settings_out_of_range_and_spent_generators_are_refused():
    model = wrap_exits(leave=False)
    with pytest.raises(ConfigError, match="epochs is at least 1"):
        train_exits(model, [IMAGES], epochs=0)
    with pytest.raises(DataError, match=r"no batch in pass 2.*not a generator"):
        train_exits(model, (batch for batch in [IMAGES]), epochs=2)
    with pytest.raises(DataError, match="two samples are needed"):
        calibrate_thresholds(model, [IMAGES[:1]])
    made = calibrate_thresholds(model, [IMAGES])
    other = adaptok.wrap(make_vit(6), stack=[{"name": "exit", "blocks": (3,)}])
    with pytest.raises(ConfigError, match=r"each of the 1 exits.*got 2"):
        made.apply(other)


def test_a_host_that_runs_once_teaches_the_same():
    batches = draw_task(64, seed=1).split(16)
    reports, states = [], []
    for keep in (False, True):
        torch.manual_seed(0)
        model = adaptok.wrap(make_task_vit(), stack=["exit"])
        counts = count_samples(model.blocks.blocks)
        counts[:] = [0] * 6
        reports.append(train_exits(model, batches, epochs=2, keep=keep))
        states.append(model.state_dict())
        assert counts == [64 if keep else 3 * 64] * 6
    assert reports[0] == reports[1]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_modes_come_back():
    model = wrap_exits(leave=False).train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    train_exits(model, [IMAGES])
    assert model.training
    assert not model.blocks[0].training
    assert not model.head.weight.requires_grad
    assert model.head.bias.requires_grad
