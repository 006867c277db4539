"""Exits through the one calibrator: the same thresholds as their own calibration finds."""

import pytest
import torch
from adaptok_exit.calibration import choose_thresholds, judge_batches, leave_by
from exit_oracles import draw_task, run_traced, stage_of, wrap_exits

from adaptok.calibrating import calibrate
from adaptok.errors import ConfigError, DataError, ProfileError

WISH = {"agreement": 0.6, "certainty": 0.8}


def draw_batches():
    scale = torch.linspace(0.3, 2.0, 120)[torch.randperm(120, generator=torch.Generator())]
    images = torch.randn(120, 3, 32, 48, generator=torch.Generator().manual_seed(2))
    return (images * scale[:, None, None, None]).split(12)


def test_the_thresholds_are_those_of_the_calibration_of_exits():
    model = wrap_exits(leave=False)
    stage = stage_of(model)
    batches = draw_batches()
    profile = calibrate(model, batches, wanted={"exit": WISH})
    confidence, agrees = judge_batches(model, batches[::2], "classes", 0.95)
    expected = choose_thresholds(confidence, agrees, WISH["agreement"], WISH["certainty"])
    fit = profile.stages["exit"]
    assert fit.settings["threshold"] == pytest.approx(expected, rel=1e-6)
    other, _ = judge_batches(model, batches[1::2], "classes", 0.95)
    exits = leave_by(other, expected)
    assert fit.figures["left"] == [float((exits == i).double().mean()) for i in range(2)]
    assert (fit.figures["fitted_on"], fit.figures["held_out"]) == (60, 60)
    assert stage.threshold is None
    assert stage.records is None
    assert stage.answer is None
    profile.apply(model)
    assert stage.limits == pytest.approx(expected, rel=1e-6)
    _, step = run_traced(model, torch.cat(batches[1::2]))
    assert step.depths.tolist() == [{-1: 6, 0: 2, 1: 4}[int(e)] for e in exits]
    assert sum(fit.figures["left"]) > 0, "some should leave, or nothing is seen"


def test_bad_input():
    model = wrap_exits(leave=False)
    images = draw_task(24, seed=1)
    with pytest.raises(ConfigError, match=r"agreement is a share in \(0, 1\), got 2"):
        calibrate(model, [images], wanted={"exit": {"agreement": 2}})
    with pytest.raises(ConfigError, match="compared is 'classes' or 'features', got 'x'"):
        calibrate(model, [images], wanted={"exit": {"compared": "x"}})
    with pytest.raises(DataError, match="judged in single calls, and a batch made 2"):
        calibrate(model, [lambda m: [m(images), m(images)]])
    profile = calibrate(model, images.split(12))
    other = wrap_exits(leave=False, blocks=(3,))
    with pytest.raises(ProfileError, match="one confidence for each of the 1 exits"):
        profile.apply(other)
    assert stage_of(other).threshold is None
