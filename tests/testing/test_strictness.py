"""What the kit once let through, each caught by the check that says what is wrong."""

import pytest
import torch
from testing import dechunker_twins, router_twins, stage_twins
from testing.test_causes import note_of

from adaptok.chunk_stage import ChunkStage
from adaptok.dc.host import HostChunker, HostDechunker, HostRouter
from adaptok.testing import check_dechunker, check_router, check_stage
from adaptok.testing.cases import make_call, make_tokens
from adaptok.testing.toy_blocks import ToyHalves, make_range, mix_tokens

CAUGHT = [
    (
        check_stage,
        stage_twins.KeepsAllIfUneven,
        "budgets",
        "asks for [24, 1, 7] tokens, [24, 24, 24] ran",
    ),
    (
        check_stage,
        stage_twins.NeverFewer,
        "effects",
        "changes_count is declared, and of 24 tokens the blocks got [24, 24, 24]: the last ones",
    ),
    (
        check_stage,
        stage_twins.EndsFull,
        "effects",
        "of 24 tokens the blocks got [12, 24]: the last ones get fewer, and none gets more",
    ),
    (
        check_stage,
        stage_twins.WrongBias,
        "extremes",
        "one number for each of 12 keys is (3, 12)",
    ),
    (
        check_stage,
        stage_twins.FirstInputs,
        "batch",
        "sample 1 has another answer beside others than alone",
    ),
    (
        check_stage,
        stage_twins.FirstCondition,
        "batch",
        "sample 1 has another answer beside others than alone",
    ),
    (
        check_stage,
        stage_twins.ForgetsText,
        "identity",
        "with every cell kept, the text behind the blocks is not theirs",
    ),
    (
        check_dechunker,
        dechunker_twins.FollowsBackwards,
        "pruned",
        "keep=0.5, dense tokens: 12 of 12 cells of sample 0 that no token stands for change with",
    ),
    (
        check_router,
        router_twins.OverOne,
        "context",
        "timesteps of 900 to 100 (torch.float32) it fails: RoutingError: keep_prob needs",
    ),
    (
        check_router,
        router_twins.NoSteps,
        "context",
        "timesteps of 900 to 100 (torch.float32) it fails: ZeroDivisionError",
    ),
    (
        check_router,
        router_twins.ScalesSteps,
        "context",
        "sample 1 has another answer beside others than alone",
    ),
    (
        check_router,
        router_twins.ReadsFirstCondition,
        "context",
        "sample 1 has another answer beside others than alone",
    ),
    (
        check_router,
        router_twins.ManyCells,
        "odd_grids",
        "on a grid (7, 9) it fails: RuntimeError: The size of tensor a (63)",
    ),
]


@pytest.mark.parametrize(
    ("function", "part", "check", "message"), CAUGHT, ids=[part.__name__ for _, part, *_ in CAUGHT]
)
def test_what_is_caught_is_named(function, part, check, message):
    report = function(part, only=[check])
    assert report.failed == (check,), report
    assert message in note_of(report, check), report


def test_a_stage_that_is_right_passes_the_same_checks():
    names = ["effects", "budgets", "extremes", "batch", "identity"]
    for part in (stage_twins.Lowest, stage_twins.ByKeys, stage_twins.Plain):
        report = check_stage(part, only=names)
        report.raise_failed()


@pytest.mark.parametrize("part", ["evit", "dynamicvit"])
def test_prunings_pass_as_they_are_registered(part):
    report = check_stage(part, skip={"compile": "slow"})
    report.raise_failed()
    assert report.not_run == ("compile",), report


@pytest.mark.parametrize("layout", ["fixed", "bucketed", "packed"])
def test_layouts_of_chunkers_keep_budgets_or_refuse_them(layout):
    def make():
        return ChunkStage(HostRouter(96), HostChunker(layout), HostDechunker(96), "dc")

    check_stage(make, only=["budgets", "identity"]).raise_failed()


def test_toy_blocks_give_halves_to_those_who_ask():
    assert isinstance(make_range(stage_twins.Lowest()).halves, ToyHalves)
    assert make_range(stage_twins.Plain()).halves is None


def test_halves_of_toy_blocks_are_the_blocks():
    call = make_call(make_tokens())
    inner = make_range(stage_twins.Lowest())
    seen = inner.split().attend(1, call, keys=True, class_attention=True)
    assert seen.keys.shape == (3, 3, 29, 32)
    assert torch.allclose(seen.class_attention.sum(-1), torch.ones(3, 3))
    assert not torch.allclose(seen.class_attention[0], seen.class_attention[1])
    after, needed = inner.split().finish(1, seen.call), mix_tokens(call, 1, 2)
    assert torch.equal(after.x, needed.x)
    assert torch.equal(after.streams["text"], needed.streams["text"])


def test_toy_blocks_use_what_each_sample_brings():
    call = make_call(make_tokens())
    before = mix_tokens(call, 0, 1).x
    for name in ("condition", "sample_inputs"):
        value = getattr(call, name)
        moved = {k: x + 1 for k, x in value.items()} if isinstance(value, dict) else value + 1
        change = (mix_tokens(stage_twins.replace(call, **{name: moved}), 0, 1).x - before).abs()
        assert change.amax((1, 2)).min() > 0.01
