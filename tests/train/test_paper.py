"""The published runs, held against the published figures."""

import math

import pytest
import torch

from adaptok.dc.config import DCDiTConfig, DiTConfig
from adaptok.dc.folder import build_model
from adaptok.errors import ConfigError
from adaptok.measure import count_flops
from adaptok.train.config import check_fit
from adaptok.train.paper import STEPS, list_paper_runs, make_paper_run, match_compute

WIDTHS = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
MILLIONS = {"S": 34.7, "B": 137, "L": 469, "XL": 689}
BASELINE_MILLIONS = {"S": 33, "B": 130, "L": 458, "XL": 675}
TERAFLOPS = {  # of 250 steps, as published
    ("S", 256): 3.02, ("B", 256): 11.46, ("L", 256): 40.21, ("XL", 256): 59.00,
    ("XL", 512): 261.25,
}  # fmt: skip


def split(name):
    """Return scale, image size and whether it is the baseline."""
    words = name.removeprefix("paper/").split("-")
    return (words[1] if words[0] == "DiT" else words[0]), int(words[-1]), words[0] == "DiT"


@pytest.mark.parametrize("name", list_paper_runs())
def test_every_run_has_the_published_setting(name):
    run, (scale, size, is_baseline) = make_paper_run(name), split(name)
    model = run.model
    assert (model.depth, model.hidden_size, model.num_heads) == WIDTHS[scale]
    assert (model.grid, model.in_channels, model.num_classes) == ((size // 8,) * 2, 4, 1000)
    assert model.learn_sigma
    assert (run.image_size, run.latents.channels, run.latents.factor) == (size, 4, 8)
    assert run.latents.is_any
    assert (run.learning_rate, run.weight_decay, run.batch_size) == (1e-4, 0, 256)
    assert (run.ema_decay, run.gradient_clip, run.class_dropout) == (0.9999, 1, 0.1)
    assert (run.objective, run.learning_rate_warmup) == ("hybrid", 0)
    if is_baseline:
        assert isinstance(model, DiTConfig)
        assert (model.patch_size, run.steps) == (2, 400_000)
    else:
        assert isinstance(model, DCDiTConfig)
        assert (model.target, model.dechunk_sigma) == (4, {256: 1, 512: 2}[size])
        assert (run.budget_warmup, run.ratio_weight, run.ratio_group) == (5000, 0.03, 16)
        assert run.drops == (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
        assert run.steps == STEPS[scale, size]
    check_fit(run, 1000)
    assert type(run).from_json(run.to_json()) == run


def test_there_are_eight_runs_and_as_many_baselines():
    names = list_paper_runs()
    assert len(set(names)) == 16
    assert {split(name) for name in names} == {
        (scale, size, baseline)
        for scale in WIDTHS
        for size in (256, 512)
        for baseline in (False, True)
    }


def count_millions(run):
    """Count the parameters of a model, its frozen position table included, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(run.model).parameters()) / 1e6


@pytest.mark.parametrize("scale", WIDTHS)
def test_models_have_the_published_size(scale):
    ours = count_millions(make_paper_run(f"paper/{scale}-256"))
    assert ours == pytest.approx(MILLIONS[scale], rel=0.003)
    baseline = count_millions(make_paper_run(f"paper/DiT-{scale}-2-256"))
    assert baseline == pytest.approx(BASELINE_MILLIONS[scale], rel=0.01)


def test_the_largest_model_at_512_px_has_the_published_size():
    assert count_millions(make_paper_run("paper/XL-512")) == pytest.approx(693, rel=0.001)


@pytest.mark.parametrize(("scale", "size"), list(STEPS))
def test_steps_are_those_that_the_counter_gives_now(scale, size):
    match = match_compute(scale, size)
    assert match.steps == STEPS[scale, size]
    if (scale, size) in TERAFLOPS:
        assert 250 * match.baseline / 1e12 == pytest.approx(TERAFLOPS[scale, size], rel=0.015)


@pytest.mark.parametrize("size", [256, 512])
def test_steps_cost_as_much_as_the_baseline(size):
    ours, cells = make_paper_run(f"paper/S-{size}"), (size // 8) ** 2
    spent = 0.0
    for drop in ours.drops:
        kept = cells // 4 - math.floor(drop * (cells // 4))
        share = (ours.steps - 5000) / len(ours.drops) + (5000 if drop == 0 else 0)
        spent += share * count_flops(ours.model, ours.model.grid, [kept])
    baseline = make_paper_run(f"paper/DiT-S-2-{size}").model
    wanted = 400_000 * count_flops(baseline, baseline.grid, [cells // 4])
    assert spent == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["paper/S-128", "paper/s-256", "paper/DiT-S-4-256", "paper/"])
def test_an_unknown_name_is_refused_with_all_that_there_are(name):
    with pytest.raises(ConfigError, match="there is no published run") as caught:
        make_paper_run(name)
    for known in list_paper_runs():
        assert known in str(caught.value)
