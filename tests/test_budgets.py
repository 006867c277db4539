import copy

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from oracles import keep_loop

import adaptok
from adaptok import Budget, Routing
from adaptok.budgets import apply_budget, count_kept, rank_cells, select_cells
from adaptok.errors import BudgetError

# few distinct values, so that ties are common
probs = st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.50001, 0.8, 1.0]), min_size=1, max_size=12)


@given(prob=probs, keep=st.floats(0.01, 1.0))
def test_keep_is_an_exact_count_with_ties_to_the_lower_index(prob, keep):
    prob = torch.tensor([prob])
    routing = apply_budget(Routing(prob), Budget(keep=keep))
    expected = keep_loop(prob[0], prob[0] > 0.5, keep=keep)
    assert set(routing.keep_mask[0].nonzero().flatten().tolist()) == expected
    assert routing.kept.item() == max(1, int(keep * prob.shape[1] + 0.5))
    assert routing.kept.item() == Budget(keep=keep).count(prob.shape[1])


@given(prob=probs, data=st.data())
def test_tokens_is_an_exact_count(prob, data):
    tokens = data.draw(st.integers(1, len(prob)))
    prob = torch.tensor([prob])
    routing = apply_budget(Routing(prob), Budget(tokens=tokens))
    expected = keep_loop(prob[0], prob[0] > 0.5, tokens=tokens)
    assert set(routing.keep_mask[0].nonzero().flatten().tolist()) == expected
    assert select_cells(prob, tokens)[0].tolist() == sorted(expected)


@given(prob=probs, drop=st.floats(0.0, 0.99))
def test_drop_takes_the_least_probable_natural_cells(prob, drop):
    prob = torch.tensor([prob])
    routing = apply_budget(Routing(prob), Budget(drop=drop))
    expected = keep_loop(prob[0], prob[0] > 0.5, drop=drop)
    assert set(routing.keep_mask[0].nonzero().flatten().tolist()) == expected
    assert torch.equal(routing.natural_mask, prob > 0.5)


@given(prob=probs)
def test_the_natural_budget_is_the_threshold_or_the_best_cell(prob):
    prob = torch.tensor([prob])
    kept = apply_budget(Routing(prob), Budget()).keep_mask
    expected = keep_loop(prob[0], prob[0] > 0.5, drop=0.0)
    assert set(kept[0].nonzero().flatten().tolist()) == expected


def test_nothing_above_the_threshold_keeps_one_cell_and_an_empty_natural_mask():
    routing = Routing(torch.tensor([[0.1, 0.4, 0.4], [0.1, 0.9, 0.2]]))
    for budget in (Budget(), Budget(drop=0.5)):
        kept = apply_budget(routing, budget)
        assert kept.keep_mask.tolist() == [[False, True, False], [False, True, False]]
        assert kept.natural_mask.sum(1).tolist() == [0, 1]


def test_drop_floors_a_float32_product():
    # 0.29 * 100 = 28.999999... in double, but 29 in float32; 0.7 * 9 = 6.3 is floored, not rounded
    natural = torch.tensor([100, 9, 1])
    counts = count_kept(Budget(drop=torch.tensor([0.29, 0.7, 0.99])), natural, 128)
    assert counts.tolist() == [71, 3, 1]
    assert count_kept(Budget(drop=0.6), torch.tensor([9]), 16).item() == 9 - 5  # 5.4, not 5


def test_one_value_per_sample():
    routing = Routing(torch.tensor([[0.9, 0.8, 0.7, 0.6]] * 3))
    assert apply_budget(routing, Budget(keep=[0.25, 0.5, 1.0])).kept.tolist() == [1, 2, 4]
    assert apply_budget(routing, Budget(tokens=torch.tensor([4, 1, 2]))).kept.tolist() == [4, 1, 2]
    assert apply_budget(routing, Budget(drop=(0.0, 0.5, 0.9))).kept.tolist() == [4, 2, 1]


@given(prob=probs, keep=st.sampled_from([0.0625, 0.25, 0.375, 0.5, 0.875, 1.0]))
def test_keep_as_a_tensor_is_the_same_exact_count(prob, keep):
    # fractions that float32 holds exactly
    routing = Routing(torch.tensor([prob, prob]))
    as_tensor = apply_budget(routing, Budget(keep=torch.tensor([keep, 1.0]))).keep_mask
    as_number = apply_budget(routing, Budget(keep=keep)).keep_mask
    assert torch.equal(as_tensor[0], as_number[0])
    assert as_tensor[1].all()


def test_a_natural_mask_that_does_not_follow_the_probabilities_is_respected():
    natural = torch.tensor([[True, False, True, False]])
    routing = Routing(torch.tensor([[0.2, 0.9, 0.1, 0.8]]), natural_mask=natural)
    assert apply_budget(routing, Budget()).keep_mask.tolist() == natural.tolist()
    assert apply_budget(routing, Budget(drop=0.5)).keep_mask[0].nonzero().item() == 0


def test_ranks_put_chosen_cells_first():
    prob = torch.tensor([[0.2, 0.9, 0.2, 0.8]])
    assert rank_cells(prob).tolist() == [[2, 0, 3, 1]]
    first = torch.tensor([[False, False, True, False]])
    assert rank_cells(prob, first=first).tolist() == [[3, 1, 0, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5, "drop": 0.1}, "keep and drop exclude each other"),
        ({"keep": 0.0}, r"keep is a fraction in \(0, 1\], got 0"),
        ({"keep": 1.01}, "got 1.01"),
        ({"keep": float("nan")}, "got nan"),
        ({"drop": 1.0}, r"drop is a fraction in \[0, 1\), got 1"),
        ({"drop": -0.1}, "got -0.1"),
        ({"drop": [0.1, 2.0]}, "got 2"),
        ({"tokens": 0}, "whole number of at least 1, got 0"),
        ({"tokens": 2.5}, "got 2.5"),
        ({"tokens": float("inf")}, "got inf"),
        ({"drop": torch.tensor([0.5, 1.5])}, "got 1.5"),
        ({"keep": torch.rand(2, 2)}, "one per sample"),
        ({"keep": []}, "at least one number"),
        ({"tokens": torch.tensor([])}, "tokens needs at least one number"),
        ({"drop": "0"}, "drop is a number or one per sample, got '0'"),
    ],
)
def test_budgets_out_of_range_are_refused(options, message):
    with pytest.raises(BudgetError, match=message):
        Budget(**options)


def test_budgets_that_do_not_fit_the_batch_are_refused():
    routing = Routing(torch.rand(3, 4))
    with pytest.raises(BudgetError, match="means 3 values here, got 2"):
        apply_budget(routing, Budget(drop=[0.1, 0.2]))
    with pytest.raises(BudgetError, match="more than the 4 cells"):
        apply_budget(routing, Budget(tokens=5))
    with pytest.raises(BudgetError, match=r"no threshold: give keep= or tokens=, got drop=0\.5"):
        apply_budget(Routing(torch.rand(3, 4), threshold=None), Budget(drop=0.5))
    with pytest.raises(BudgetError, match="same count here"):
        Budget(keep=[0.1, 0.2]).count(10)


def test_budget_context_sets_and_restores():
    model = make_model()
    adaptok.set_budget(model, drop=0.5)
    with adaptok.budget(model, keep=0.5) as inside:
        assert inside is model
        assert model.budget_setting.keep == 0.5
        with pytest.raises(RuntimeError), adaptok.budget(model, tokens=3):
            raise RuntimeError
        assert model.budget_setting.keep == 0.5
    assert model.budget_setting.drop == 0.5
    adaptok.set_budget(model)
    assert model.budget_setting.is_natural
    assert copy.deepcopy(model).budget_setting.is_natural


def test_the_context_changes_what_is_kept(tiny_model):
    x, t, y = torch.randn(2, 4, 12, 18), torch.tensor([5, 900]), torch.tensor([1, 2])
    with adaptok.budget(tiny_model, tokens=[7, 30]):
        out, routing = tiny_model(x, t, y, return_routing=True)
        assert routing.kept.tolist() == [7, 30]
        _, routing = tiny_model(x, t, y, tokens=9, return_routing=True)
        assert routing.kept.tolist() == [9, 9]
    assert torch.equal(out, tiny_model(x, t, y, tokens=[7, 30]))


def test_a_model_without_adaptive_parts_is_refused():
    with pytest.raises(BudgetError, match="Linear has no adaptive part"):
        adaptok.set_budget(torch.nn.Linear(2, 2), keep=0.5)


@given(keep=st.floats(0.0625, 1.0, width=32), n=st.integers(1, 300))
def test_the_one_count_of_a_tensor_is_that_of_its_samples(keep, n):
    budget = Budget(keep=torch.tensor([keep, keep]))
    counts = count_kept(budget, torch.zeros(2, dtype=torch.long), n)
    assert counts.tolist() == [budget.count(n)] * 2


@pytest.mark.parametrize("budget", [{"keep": 0.5}, {"tokens": 5}, {"drop": 0.3}])
def test_spreading_a_number_does_not_wait_for_the_device(budget):
    """On the meta device reading a value is an error."""
    spread = Budget(**budget).spread(3, 12, torch.device("meta"))
    assert (spread.tokens if spread.drop is None else spread.drop).shape == (3,)


def test_spread_budgets_are_the_same():
    prob = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    for budget in (Budget(keep=0.29), Budget(tokens=[2, 5, 9]), Budget(drop=[0.1, 0.5, 0.9])):
        spread = budget.spread(3, 12, prob.device)
        masks = [apply_budget(Routing(prob), given).keep_mask for given in (budget, spread)]
        assert torch.equal(*masks)


@pytest.mark.parametrize("name", ["keep", "tokens", "drop"])
@pytest.mark.parametrize("value", [True, "half", [False, 0.5], torch.tensor([True])], ids=str)
def test_wrong_values_are_shown_whole(name, value):
    with pytest.raises(BudgetError, match="is a number or one per sample") as caught:
        adaptok.Budget(**{name: value})
    assert repr(value) in str(caught.value)
