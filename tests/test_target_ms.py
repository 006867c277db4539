"""Budgets in milliseconds: settled for each call, on curves that we make up."""

import copy
import pickle

import pytest
import torch
from conftest import make_model, make_uneven_batch
from wrapped_vit import IMAGE, make_wrapped

import adaptok
from adaptok.budgeted import pair_budgets
from adaptok.budgets import Budget, apply_budget
from adaptok.errors import BudgetError
from adaptok.routing import Routing
from adaptok.time_curves import CallShape, CurvePoint, TimeCurve

N = 24


def make_curve(batch=3, cells=N, slope=48.0, **options):
    """2 ms, and 2 ms per cell with the default slope."""
    facts = {"dtype": "float32", "device": "cpu", "threads": torch.get_num_threads()} | options
    points = (CurvePoint(1 / cells, 2 + slope / cells), CurvePoint(1.0, 2 + slope))
    return TimeCurve(CallShape(batch, cells, **facts), points)


def make_planned(*curves, **options):
    vit = make_wrapped(**options).eval()
    for curve in curves or (make_curve(),):
        vit.blocks.adaptok["dc"].take_curve(curve)
    return vit


def count_cells(model, image=IMAGE):
    with adaptok.trace(model) as trace:
        model(image)
    return trace.steps[0].kept.tolist()


def test_a_target_is_the_largest_count_that_ran_in_that_time():
    vit = make_planned()
    with adaptok.budget(vit, target_ms=21.0) as same:
        assert same is vit
        assert vit.blocks.adaptok["dc"].budget_setting.describe() == "target_ms=21"
        assert count_cells(vit) == [9, 9, 9]
        with adaptok.budget(vit, target_ms=40.0):
            assert count_cells(vit) == [19, 19, 19]
        assert count_cells(vit) == [9, 9, 9]
    assert count_cells(vit) == [12, 12, 12]
    adaptok.set_budget(vit, target_ms=99.0)
    assert count_cells(vit) == [24, 24, 24]
    adaptok.set_budget(vit)
    assert vit.blocks.adaptok["dc"].budget_setting.is_natural


def test_each_shape_uses_its_own_curve_and_an_unknown_one_none():
    vit = make_planned(make_curve(3), make_curve(1, slope=24.0), make_curve(3, 16))
    adaptok.set_budget(vit, target_ms=14.0)
    assert count_cells(vit) == [6, 6, 6]
    assert count_cells(vit, IMAGE[:1]) == [12]
    assert count_cells(vit, IMAGE[..., :32]) == [4, 4, 4]
    message = (
        r"target_ms=14 came, and no time was measured for batch 2 of 24 cells, float32 on cpu.*"
        r"\(but for batch 3 of 24.*batch 1 of 24.*batch 3 of 16.*call adaptok.plan"
    )
    with pytest.raises(BudgetError, match=message):
        vit(IMAGE[:2])


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "bfloat16"},
        {"device": "cuda", "threads": 0},
        {"threads": torch.get_num_threads() + 1},
    ],
)
def test_a_curve_of_another_machine_is_not_used(other):
    vit = make_planned(make_curve(**other))
    adaptok.set_budget(vit, target_ms=14.0)
    with pytest.raises(BudgetError, match="no time was measured for batch 3 of 24 cells, float32"):
        vit(IMAGE)


def test_autocast_is_another_call():
    vit = make_planned(make_curve(), make_curve(dtype="bfloat16", slope=24.0))
    adaptok.set_budget(vit, target_ms=14.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert count_cells(vit) == [12, 12, 12]
    assert count_cells(vit) == [6, 6, 6]


def test_a_later_measurement_replaces_the_one_of_its_shape():
    vit = make_planned(make_curve(), make_curve(slope=96.0))
    adaptok.set_budget(vit, target_ms=14.0)
    assert count_cells(vit) == [3, 3, 3]
    vit.blocks.adaptok["dc"].take_curve(make_curve())
    assert count_cells(vit) == [6, 6, 6]


def test_nothing_measured_and_targets_out_of_reach_are_told_at_once():
    vit = make_wrapped()
    message = r"needs times, and none were measured on this model: call adaptok.plan\(model, inputs"
    for setter in (adaptok.set_budget, lambda *a, **k: adaptok.budget(*a, **k).__enter__()):
        with pytest.raises(BudgetError, match=message):
            setter(vit, target_ms=14.0)
    with pytest.raises(BudgetError, match="target_ms=14 belongs to the machine that it was measur"):
        adaptok.wrap(adaptok.unwrap(vit), chunker="dc", budget=Budget(target_ms=14.0))
    vit = make_planned()
    with pytest.raises(BudgetError, match=r"target_ms=3 is out of reach here: the fastest .* 4.00"):
        adaptok.set_budget(vit, target_ms=3.0)
    assert count_cells(vit) == [12, 12, 12]
    vit.blocks.adaptok["dc"].take_curve(make_curve(1, slope=12.0))
    adaptok.set_budget(vit, target_ms=3.0)  # one image can, three cannot
    assert count_cells(vit, IMAGE[:1]) == [2]
    with pytest.raises(BudgetError, match="out of reach"):
        vit(IMAGE)


def test_copies_and_pickles_carry_the_curves_and_no_tensor():
    vit = make_planned()
    adaptok.set_budget(vit, target_ms=21.0)
    vit(IMAGE)
    for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert count_cells(other) == [9, 9, 9]
        adaptok.set_budget(other, target_ms=14.0)
        assert count_cells(other) == [6, 6, 6]
        assert count_cells(vit) == [9, 9, 9]


def test_the_four_kinds_of_budget_exclude_each_other():
    for name, value in {"keep": 0.5, "tokens": 5, "drop": 0.5}.items():
        with pytest.raises(BudgetError, match=f"{name} and target_ms exclude each other"):
            Budget(target_ms=5.0, **{name: value})
        with pytest.raises(BudgetError, match="exclude each other"):
            adaptok.set_budget(make_planned(), target_ms=5.0, **{name: value})
    with pytest.raises(BudgetError, match="uncond_drop goes with drop=, and target_ms=5 came"):
        adaptok.set_budget(make_planned(), target_ms=5.0, uncond_drop=0.5)


@pytest.mark.parametrize("value", [0.0, -3.0, float("nan"), float("inf"), "5", [5.0], True])
def test_a_wrong_target_is_refused(value):
    with pytest.raises(BudgetError, match=r"target_ms is (one number of milliseconds|a finite)"):
        Budget(target_ms=value)


def test_a_target_that_no_model_settled_never_counts_as_natural():
    budget = Budget(target_ms=5.0)
    assert not budget.is_natural
    assert not budget.is_exact
    assert not budget.is_uniform
    with pytest.raises(BudgetError, match="target_ms=5 says nothing about cells yet"):
        apply_budget(Routing(torch.tensor([[0.9, 0.1]])), budget)
    with pytest.raises(BudgetError, match="an exact count needs keep= or tokens=, got target_ms=5"):
        budget.count(9)


def test_halves_of_a_guided_batch_share_a_target():
    assert pair_budgets(Budget(target_ms=5.0), Budget(target_ms=5.0), 2).target_ms == 5.0
    for other in (Budget(drop=0.5), Budget(), Budget(target_ms=6.0)):
        with pytest.raises(BudgetError, match="give both halves the same kind"):
            pair_budgets(Budget(target_ms=5.0), other, 2)


def test_compiled_targets_make_few_graphs_and_the_same_values():
    vit = make_planned(make_curve(3), make_curve(1, slope=24.0))
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(vit, fullgraph=True, backend=backend)
    with torch.no_grad():
        adaptok.set_budget(vit, target_ms=30.0)
        vit(IMAGE)  # as with other budgets: once before it is compiled
        for ms in range(6, 54, 4):
            adaptok.set_budget(vit, target_ms=float(ms))
            torch.testing.assert_close(compiled(IMAGE), vit(IMAGE), atol=1e-6, rtol=1e-6)
        assert len(graphs) <= 4
        one = IMAGE[:1]
        vit(one)
        torch.testing.assert_close(compiled(one), vit(one), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(compiled(IMAGE), vit(IMAGE), atol=1e-6, rtol=1e-6)
        made = len(graphs)
        for _ in range(3):
            compiled(IMAGE)
            compiled(one)
    assert len(graphs) == made


def test_a_model_compiled_before_its_first_call_meets_its_target():
    vit = make_planned()
    adaptok.set_budget(vit, target_ms=21.0)
    compiled = torch.compile(vit, fullgraph=True, backend="eager")
    with torch.no_grad():
        out = compiled(IMAGE)
        torch.testing.assert_close(out, vit(IMAGE), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layout", ["packed", "bucketed", "fixed"])
def test_a_dcdit_meets_its_target(layout):
    model = make_model(layout=layout)
    x, t, y = make_uneven_batch(model)
    model.take_curve(make_curve(3, 216, slope=216.0))
    with torch.no_grad(), adaptok.budget(model, target_ms=52.5):
        out, routing = model(x, t, y, return_routing=True)
        assert routing.kept.tolist() == [50, 50, 50]
        assert torch.equal(out, model(x, t, y, tokens=50))
        _, routing = model(x, t, y, keep=0.5, return_routing=True)  # a call may say otherwise
        assert routing.kept.tolist() == [108, 108, 108]
        with pytest.raises(BudgetError, match="no time was measured for batch 2 of 216 cells"):
            model(x[:2], t[:2], y[:2])


def test_a_guided_dcdit_meets_the_target_of_both_halves():
    model = make_model()
    x, t, y = make_uneven_batch(model)
    model.take_curve(make_curve(4, 216, slope=216.0))
    x, t, y = x[:2].repeat(2, 1, 1, 1), t[:2].repeat(2), y[:2].repeat(2)
    with torch.no_grad(), adaptok.budget(model, target_ms=52.5):
        _, routing = model.forward_with_cfg(x, t, y, 1.5, return_routing=True)
    assert routing.kept.tolist() == [50] * 4
