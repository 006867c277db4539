"""The checks that adaptok gives to every plug-in."""

from dataclasses import replace
from typing import ClassVar

import torch
from adaptok_exit.confidence import ConfidenceExit
from adaptok_exit.scheduled import ScheduledExit

import adaptok
from adaptok.testing import StageTests

UNTRAINED = "heads decide, and a decision has no gradient: train_exits is tested by itself"

LIMIT = 0.18  # between the confidences of the kit's samples
GROUPS = "blocks get groups of samples, whose other tokens are compared by the loops in these tests"


class HalfLeave(ConfidenceExit):
    """Exits of the kit's hosts, at a threshold that divides its samples."""

    def __init__(self, width):
        super().__init__(width, blocks=(1,), threshold=LIMIT)


class SteppedSchedule(ScheduledExit):
    """A schedule on the kit's ViTs, which have no step: one is read off each sample's tokens."""

    effects = adaptok.Effects("depth")

    def __init__(self, width):
        super().__init__(width, schedule=((0.0, 1.0), (0.5, 0.5)), scale=(1000, 0), adapt=True)

    def forward(self, inner, call):
        step = (call.cell_x.detach().float().std((1, 2)) * 7.3).frac() * 1000
        after = super().forward(inner, replace(call, timestep=step))
        return replace(after, timestep=call.timestep)


class TestExit(StageTests):
    part = ConfidenceExit
    skip: ClassVar = {"gradient": UNTRAINED, "deepcopy": "without a threshold its weights are idle"}


class TestLeaving(StageTests):
    part = HalfLeave
    skip: ClassVar = {"gradient": UNTRAINED, "prefix": GROUPS}


class TestSchedule(StageTests):
    part = SteppedSchedule
    skip: ClassVar = {
        "prefix": GROUPS,
        "identity": "a schedule with early exits is not the identity; 'full' is, tested on DiTs",
        "gradient": "with two blocks nobody leaves early, and adapters do nothing",
    }


def test_options_make_the_same_stage_again():
    wanted = {"name": "exit", "blocks": (1, 2), "threshold": (0.9, 0.8)}
    for part in ("exit", wanted, {"name": "exit", "threshold": 0.5}):
        names = ["options", "identity", "checkpointing", "unwrap"]
        report = adaptok.testing.check_stage(part, only=names)
        report.raise_failed()
        assert not report.not_run
    table = ((0.0, 1.0), (0.5, 0.5))
    for part in ("schedule", {"name": "schedule", "schedule": table, "scale": (999.0, 0.0)}):
        report = adaptok.testing.check_stage(part, only=["options"])
        report.raise_failed()
        assert not report.not_run


def test_samples_of_the_kit_really_leave_apart():
    from adaptok.testing.cases import make_call, make_tokens
    from adaptok.testing.models import fill_weights

    call = make_call(make_tokens())
    judge = fill_weights(HalfLeave(96)).judges[0]
    sure = judge(call).sigmoid()
    assert (sure > LIMIT).any()
    assert not (sure > LIMIT).all()


def test_both_names_are_announced():
    assert {"exit", "schedule"} <= set(adaptok.available("stages"))
    assert adaptok.describe("exit").entries[0].origin == "exit"


def test_heads_stay_float32_and_thresholds_with_them():
    stage = ConfidenceExit(32, threshold=0.983).to(torch.bfloat16)
    assert stage.judges[0].limit.dtype == torch.float32
    assert stage.judges[0].out.weight.dtype == torch.float32
    assert stage.adapters[0].linear.weight.dtype == torch.bfloat16
