"""Terms of a history, against a loop over single samples."""

import math

import pytest
import torch
from adaptok_cache.history import (
    Update,
    apply_change,
    extend_terms,
    measure_change,
    predict_terms,
    put_samples,
)
from adaptok_cache.runs import SampleRun, follow

from adaptok import BlockCall


class TaylorOracle:
    """Differences and predictions of one sample, in lists, from the description."""

    def __init__(self, order):
        self.order, self.computed = order, []  # (step, terms)

    def compute(self, step, value):
        terms = [value.double()]
        if self.computed:
            before, old = self.computed[-1]
            for known in old[: self.order]:
                terms.append((terms[-1] - known) / (step - before))
        self.computed.append((step, terms))

    def predict(self, step):
        before, terms = self.computed[-1]
        k = step - before
        return sum(term * k**j / math.factorial(j) for j, term in enumerate(terms))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_histories_of_samples_are_those_of_a_loop(order):
    generator = torch.Generator().manual_seed(order)
    b, terms = 3, None
    runs, oracles = [None] * b, [TaylorOracle(order) for _ in range(b)]
    for step in range(14):
        runs = [follow(run, 999.0 - step) for run in runs]
        value = torch.randn(b, 2, 5, generator=generator)
        if step:
            found = predict_terms(terms, runs)
            for i in range(b):
                torch.testing.assert_close(found[i].double(), oracles[i].predict(step))
        chosen = [i for i in range(b) if step == 0 or (step * (i + 2)) % (i + 3) == 0]
        if not chosen:
            continue
        rows = None if len(chosen) == b else torch.tensor(chosen)
        update = Update(rows, [runs[i] for i in chosen])
        terms = extend_terms(terms, value[chosen], update, order + 1)
        for i in chosen:
            oracles[i].compute(step, value[i])
            runs[i] = runs[i].after_compute(order + 1)


def test_a_new_run_of_a_sample_uses_no_difference_of_the_old_one():
    first = torch.full((2, 1), torch.nan)
    terms = extend_terms(None, first, Update(None, [SampleRun(9.0)] * 2), 2)
    terms = extend_terms(terms, torch.ones(2, 1), Update(None, [SampleRun(9.0)] * 2), 2)
    runs = [SampleRun(8.0, step=1, computed=0, orders=1)] * 2
    assert predict_terms(terms, runs).tolist() == [[1.0], [1.0]]
    assert terms[1].tolist() == [[0.0], [0.0]]


def test_changes_of_all_sequences_are_kept_and_applied():
    before = BlockCall(
        torch.randn(2, 5, 3),
        grid=(2, 2),
        start=1,
        streams={"text": torch.randn(2, 4, 3), "no": None},
    )
    after = BlockCall(
        torch.randn(2, 5, 3),
        grid=(2, 2),
        start=1,
        streams={"text": torch.randn(2, 4, 3), "no": None},
    )
    again = apply_change(before, measure_change(after, before))
    torch.testing.assert_close(again.x, after.x)
    torch.testing.assert_close(again.streams["text"], after.streams["text"])
    assert again.streams["no"] is None


def test_a_stream_of_another_length_is_taken_as_it_came_out():
    before = BlockCall(torch.zeros(1, 4, 3), grid=(2, 2), streams={"text": torch.zeros(1, 4, 3)})
    after = BlockCall(torch.zeros(1, 4, 3), grid=(2, 2), streams={"text": torch.ones(1, 2, 3)})
    again = apply_change(before, measure_change(after, before))
    assert torch.equal(again.streams["text"], torch.ones(1, 2, 3))


def test_samples_go_where_they_belong():
    whole = BlockCall(torch.zeros(3, 4, 2), grid=(2, 2), streams={"text": torch.zeros(3, 1, 2)})
    part = BlockCall(torch.ones(2, 4, 2), grid=(2, 2), streams={"text": torch.ones(2, 1, 2)})
    found = put_samples(whole, part, torch.tensor([2, 0]))
    assert found.x[:, 0, 0].tolist() == [1, 0, 1]
    assert found.streams["text"][:, 0, 0].tolist() == [1, 0, 1]
