"""Pure functions of matching against loops, and numbers of merges."""

import pytest
import torch
from adaptok_merge.matching import (
    average,
    match_alternately,
    merge_best,
    merge_unevenly,
    sum_sizes,
    take_rows,
)
from adaptok_merge.rates import check_rates, count_left, list_rates, schedule_by_rates
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_oracles import merge_by_hand

from adaptok.errors import ConfigError


def draw(b, m, start, seed):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(b, m, 5, generator=generator)
    x = torch.randn(b, start + m + 2, 7, generator=generator)
    return metric, x, torch.randint(1, 9, (b, m), generator=generator).float()


def check_sample(merge, sample, x, sizes, start, metric, r, length):
    """Hold one sample against the loop."""
    groups, features, weights = merge_by_hand(
        metric[sample], x[sample, start : start + metric.shape[1]], sizes[sample].tolist(), start, r
    )
    assert merge.places[sample, :length].tolist() == [group[0] for group in groups]
    owner = {old: new for new, group in enumerate(groups) for old in group}
    assert merge.owner[sample].tolist() == [owner[i] for i in range(metric.shape[1])]
    summed = sum_sizes(sizes, merge.owner, merge.places.shape[1])
    assert summed[sample, :length].tolist() == weights
    found = average(x, sizes, summed, merge, start)[sample, :length]
    torch.testing.assert_close(found, features, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(2, 15), start=st.integers(0, 5), share=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_one_number_for_all(m, start, share, seed):
    metric, x, sizes = draw(2, m, start, seed)
    r = round(share * (m // 2))
    merge = merge_best(match_alternately(metric, start), r)
    for sample in range(2):
        if r:
            check_sample(merge, sample, x, sizes, start, metric, r, m - r)
    evens = [j for j in range(m) if (start + j) % 2 == 0]
    odds = [j for j in range(m) if (start + j) % 2 == 1]
    if r == 0:  # nothing merges, and the order is that of A and B
        assert merge.places.tolist() == [evens + odds] * 2


@settings(max_examples=60, deadline=None)
@given(m=st.integers(2, 15), start=st.integers(0, 5), seed=st.integers(0, 99), data=st.data())
def test_another_number_for_each(m, start, seed, data):
    metric, x, sizes = draw(3, m, start, seed)
    rates = data.draw(st.lists(st.integers(0, m // 2), min_size=3, max_size=3))
    merge = merge_unevenly(match_alternately(metric, start), rates)
    for sample, r in enumerate(rates):
        if r:
            check_sample(merge, sample, x, sizes, start, metric, r, m - r)
        else:
            assert merge.places[sample].tolist() == list(range(m))
            assert merge.owner[sample].tolist() == list(range(m))


def test_ties_take_the_first():
    match = match_alternately(torch.ones(2, 9, 4), start=1)
    assert match.target.tolist() == [[0] * 4] * 2
    assert match.order.tolist() == [[0, 1, 2, 3]] * 2


def test_a_batch_mate_changes_nothing():
    metric, *_ = draw(3, 14, 1, 0)
    together = match_alternately(metric, 1)
    for sample in range(3):
        alone = match_alternately(metric[sample : sample + 1], 1)
        assert torch.equal(alone.order[0], together.order[sample])


def test_gradients_of_a_mean():
    metric, x, sizes = draw(2, 8, 1, 4)
    merge = merge_best(match_alternately(metric, 1), 4)
    summed = sum_sizes(sizes, merge.owner, 4)
    x = x.double().requires_grad_()
    sizes, summed = sizes.double(), summed.double()
    assert torch.autograd.gradcheck(lambda x: average(x, sizes, summed, merge, 1), (x,))


def test_rows_of_a_slice():
    x = torch.randn(2, 9, 3)[:, 2:8]
    rows = torch.tensor([[0, 5, 5], [1, 2, 0]])
    assert torch.equal(take_rows(x, rows), x.gather(1, rows[..., None].expand(-1, -1, 3)))


@pytest.mark.parametrize(
    ("r", "rates"),
    [
        (8, [8] * 5),
        ([5, 4, 3, 2, 1], [5, 4, 3, 2, 1]),
        ((8, -1.0), [16, 12, 8, 4, 0]),
        ((8, 1.0), [0, 4, 8, 12, 16]),
        ((8, 0.0), [8] * 5),
        ((7, 0.5), [4, 5, 7, 9, 11]),
    ],
)
def test_schedules(r, rates):
    assert list(list_rates(check_rates(r), 5)) == rates


def test_a_pair_of_whole_numbers_is_a_list():
    assert list_rates(check_rates([8, 1]), 2) == (8, 1)
    with pytest.raises(ConfigError, match="has a float as its second"):
        list_rates(check_rates([8, 1]), 12)
    assert list_rates(check_rates((8, -1.0)), 1) == (8,)


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    n=st.integers(10, 99),
    data=st.data(),
)
def test_budgets_follow_a_schedule(rates, n, data):
    final = data.draw(st.integers(1, n))
    left = schedule_by_rates(rates, n, final)
    assert left[-1] == final
    assert all(a >= b for a, b in zip((n, *left), left, strict=False))
    if any(rates):
        assert all(left[i] == (n, *left)[i] for i, r in enumerate(rates) if r == 0)
    assert count_left([0] * 4, n) == n
