"""The planner, on a clock that counts what really ran instead of time."""

import copy
import re

import pytest
import torch
from conftest import make_model, make_uneven_batch
from wrapped_vit import IMAGE, make_wrapped

import adaptok
from adaptok.budgets import Budget
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DiTConfig
from adaptok.errors import BudgetError, ConfigError, NotWrappedError, UnknownNameError
from adaptok.measure import turns
from adaptok.measure.latency import Timing
from adaptok.measure.planner import Applied, Plan, plan, set_aside
from adaptok.time_curves import CallShape, CurvePoint, TimeCurve
from adaptok.tracing import plain

N = 24


class Detour(adaptok.Stage):
    """A stage that saves nothing."""

    effects = adaptok.Effects("depth")

    def forward(self, inner, call):
        self.ran = True
        return inner(call)


def time_by_counting(monkeypatch, model, *, cell=2.0, router=8.0, detour=7.0):
    """10 ms, and some for each cell that is computed, the chunk stage and the detour."""
    seen = []

    def measure(candidates, *, repeats, warmup, device):
        assert device.type == "cpu"
        found = {}
        for name, candidate in candidates.items():
            stages = [m for m in model.modules() if isinstance(m, Detour)]
            for stage in stages:
                stage.ran = False
            with candidate.around(), adaptok.trace(model) as trace:
                candidate.call()
            step = trace.steps[0]
            ms = 10 + cell * step.kept.float().mean().item() + router * len(step.stages)
            ms += detour * sum(stage.ran for stage in stages)
            found[name] = Timing(ms, 0.99 * ms, 1.01 * ms)
        seen.append(found)
        return found

    monkeypatch.setattr(turns, "measure_interleaved", measure)
    return seen


def test_the_largest_budget_that_meets_a_target(monkeypatch):
    vit = make_wrapped()
    seen = time_by_counting(monkeypatch, vit)
    found = plan(vit, IMAGE, target_ms=49.0)
    # 18 + 2 m, and 58 for the plain model: 15 cells run in 48 ms, 20 in the time of the plain one
    assert found.budget.describe() == f"keep={15 / N}"
    assert found.expected_ms == pytest.approx(48)
    assert found.spread == pytest.approx(0.02)
    assert (found.plain_ms, found.overhead_ms) == (58, 8)
    assert found.break_even == 20 / N
    assert found.pays is True
    assert found.shape == CallShape(3, N, "float32", "cpu", torch.get_num_threads())
    first = str(found).splitlines()[0]
    assert first == (
        "keep=0.625 runs in 48.0 ms (plain 58.0 ms); below keep=0.833 it is faster than the plain "
        "model"
    )
    assert "batch 3 of 24 cells, float32 on cpu" in str(found)
    assert "dc saves 10.0 ms" in str(found)
    assert all("plain model" in run for run in seen[:2])


def test_the_model_stays_as_it_was_and_remembers_the_curve(monkeypatch):
    vit = make_wrapped(budget={"drop": 0.25}).train()
    before, keys = vit.blocks.extra_repr(), list(vit.state_dict())
    time_by_counting(monkeypatch, vit)
    found = plan(vit, IMAGE)
    assert vit.blocks.extra_repr() == before
    assert vit.training
    assert not vit.blocks.plain
    assert list(vit.state_dict()) == keys
    assert vit.blocks.adaptok["dc"].curves == (found.curve,)
    assert found.budget is None
    assert found.expected_ms is None
    assert found.pays is True  # some budget does
    plan(vit, IMAGE)
    plan(vit, IMAGE[:2])
    batches = [curve.shape.batch for curve in vit.blocks.adaptok["dc"].curves]
    assert batches == [3, 2]  # one per shape


def test_nothing_stays_changed_after_a_call_that_failed(monkeypatch):
    vit = make_wrapped()
    set_aside(vit, "dc")
    time_by_counting(monkeypatch, vit)
    with pytest.raises(Exception, match=r"float|shape|channels"):
        plan(vit, torch.randn(2, 5, 32, 48))
    assert vit.blocks.adaptok["dc"].aside
    assert "budget=keep=0.5" in vit.blocks.extra_repr()


def test_a_target_above_the_full_time_keeps_every_cell(monkeypatch):
    vit = make_wrapped()
    time_by_counting(monkeypatch, vit)
    found = plan(vit, IMAGE, target_ms=90.0)
    assert found.budget.describe() == "keep=1.0"
    assert found.pays is False
    text = str(found)
    assert "the full budget meets 90 ms already: keep=1 runs in 66.0 ms (plain 58.0 ms)" in text
    assert found.losing == ("dc",)
    assert "dc costs 8.00 ms" in text
    applied = found.apply(vit)
    assert str(applied) == (
        "keep=1.0; dc stepped aside, adaptok.set_aside(model) brings every stage back"
    )
    with plain(vit):
        expected = vit(IMAGE)
    assert torch.equal(vit(IMAGE), expected)


def test_between_the_plain_and_the_full_time_the_plain_model_is_named(monkeypatch):
    vit = make_wrapped()
    time_by_counting(monkeypatch, vit)
    found = plan(vit, IMAGE, target_ms=60.0)
    assert found.budget.describe() == f"keep={21 / N}"
    assert "the plain model meets 60 ms with every cell" in str(found)


def test_a_target_out_of_reach_says_what_is_fastest(monkeypatch):
    vit = make_wrapped()
    time_by_counting(monkeypatch, vit)
    message = r"target_ms=19 is out of reach here: the fastest measured is 20.0 ms, at keep=0.0417"
    with pytest.raises(BudgetError, match=message):
        plan(vit, IMAGE, target_ms=19.0)
    assert "budget=keep=0.5" in vit.blocks.extra_repr()
    assert len(vit.blocks.adaptok["dc"].curves) == 1  # what was measured is not lost


def test_a_keep_is_timed(monkeypatch):
    vit = make_wrapped()
    time_by_counting(monkeypatch, vit)
    found = plan(vit, IMAGE, keep=0.3)
    assert found.keep == 7 / N
    assert found.expected_ms == 32


def test_a_slow_router_never_pays(monkeypatch):
    vit = make_wrapped()
    time_by_counting(monkeypatch, vit, router=60.0)
    found = plan(vit, IMAGE, keep=0.5)
    assert found.break_even is None
    assert found.pays is False
    assert "no budget is faster than the plain model" in str(found)
    assert found.losing == ("dc",)


def test_of_several_stages_the_one_that_loses_steps_aside(monkeypatch):
    vit = make_wrapped(stack=[Detour()])
    time_by_counting(monkeypatch, vit)
    found = plan(vit, IMAGE, target_ms=50.0)
    costs = {stage.name: stage.saved_ms for stage in found.stages}
    assert costs == {"detour": -7, "dc": pytest.approx(2 * 12 - 8)}
    assert found.losing == ("detour",)
    detour = vit.blocks.adaptok["detour"]
    assert not detour.aside
    assert found.apply(vit).aside == ("detour",)
    detour.ran = False
    with adaptok.trace(vit) as trace:
        vit(IMAGE)
    assert not detour.ran
    assert trace.steps[0].kept.tolist() == [12, 12, 12]
    assert "stage=Detour, aside=True" in vit.blocks.extra_repr()
    adaptok.set_budget(vit, keep=0.5)
    assert detour.aside  # it takes no budget
    set_aside(vit)
    vit(IMAGE)
    assert detour.ran


def test_a_budget_brings_its_stage_back_and_a_block_of_calls_only_for_a_while():
    vit = make_wrapped()
    set_aside(vit, "dc")
    with adaptok.trace(vit) as trace:
        vit(IMAGE)
        with adaptok.budget(vit, keep=0.25):
            vit(IMAGE)
        vit(IMAGE)
        adaptok.set_budget(vit, keep=0.5)
        vit(IMAGE)
    assert [step.kept.tolist()[0] for step in trace.steps] == [24, 6, 24, 12]
    assert [step.stages for step in trace.steps] == [(), ("dc",), (), ("dc",)]
    assert copy.deepcopy(vit).blocks.adaptok["dc"].aside is False


def test_noise_makes_no_stage_lose():
    cost = turns.StageCost("dc", -0.4, 0.5)
    assert not cost.loses
    assert str(cost) == "dc makes no difference that could be measured"
    assert str(Applied(None, ())) == "the budget stays as it was; every stage takes part"


def make_latents():
    model = make_model()
    return model, make_uneven_batch(model)


def test_a_real_wrapped_vit_and_a_real_dcdit_on_the_real_clock():
    vit = make_wrapped()
    found = plan(vit, (IMAGE,), repeats=1, points=2)
    assert found.points[0].keep == 1 / N
    assert found.points[-1].keep == 1
    assert found.plain_ms > 0
    assert len(found.stages) == 1
    assert re.search(r"medians of 1 calls in turns; cpu: .*torch", str(found))

    model, (x, t, y) = make_latents()
    found = plan(model, {"x": x, "t": t, "y": y}, keep=0.25, repeats=1, points=2)
    assert found.shape == CallShape(3, 216, "float32", "cpu", torch.get_num_threads())
    assert (found.plain_ms, found.overhead_ms, found.break_even, found.pays) == (None,) * 4
    assert "there is no plain model to compare with" in str(found)
    assert found.stages == ()
    assert found.apply(model) == Applied(found.budget, ())
    assert model.budget_setting.keep == 0.25


def test_a_dcdit_is_compared_with_what_is_given():
    model, inputs = make_latents()
    dit = DiT(
        DiTConfig(hidden_size=32, depth=1, num_heads=2, latent_size=(12, 18), patch_size=2)
    ).train()
    found = plan(model, inputs, plain=dit, repeats=1, points=2)
    assert found.plain_ms > 0
    assert dit.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_ms": 5.0, "keep": 0.5}, "target_ms and keep exclude each other"),
        ({"target_ms": -1.0}, "target_ms is a finite number above 0, got -1"),
        ({"keep": 1.5}, r"keep is a fraction in \(0, 1\], got 1.5"),
        ({"points": 1}, "points of at least 2, got 1"),
        ({"repeats": 0}, "repeats >= 1"),
        ({"plain": torch.nn.Identity()}, "a wrapped model is compared with itself"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((BudgetError, ConfigError), match=message):
        plan(make_wrapped(), IMAGE, **{"repeats": 1, "points": 2} | options)


def test_models_that_cannot_be_planned():
    with pytest.raises(BudgetError, match="has no adaptive part"):
        plan(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    chunker = make_wrapped().blocks.adaptok["dc"]
    with pytest.raises(ConfigError, match="a wrapped model or a DCDiT can be measured"):
        plan(chunker, torch.zeros(1, 2))
    with pytest.raises(NotWrappedError, match="is not wrapped"):
        set_aside(torch.nn.Linear(2, 2))
    with pytest.raises(UnknownNameError, match="no stage 'cd': this model has dc"):
        set_aside(make_wrapped(), "cd")


def test_a_plan_reads_as_plain_words():
    curve = TimeCurve(
        CallShape(8, 100, "bfloat16", "cuda", 0), (CurvePoint(0.1, 10.0), CurvePoint(1.0, 19.0))
    )
    found = Plan(curve, CurvePoint(1.0, 20.0), 15.0, Budget(keep=0.6))
    assert "no budget is slower than the plain model" in str(found)
    assert "batch 8 of 100 cells, bfloat16 on cuda; keep=0.1 10.0 ms, keep=1 19.0 ms" in str(found)
