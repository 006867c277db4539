import math

import pytest
import torch
from adaptok_hnet.smoothing import LEAST, smooth_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

LENGTHS = (1, 7, 33, 2)


def smooth_by_loop(h, prob, lengths):
    """The recurrence as it is written, one token after the other."""
    out, start = [], 0
    for length in lengths:
        z = None
        for k in range(start, start + length):
            p = prob[k].clamp(LEAST, 1 - LEAST)
            z = h[k] if z is None else p * h[k] + (1 - p) * z
            out.append(z)
        start += length
    return torch.stack(out)


def places(lengths):
    return torch.cat([torch.arange(length) for length in lengths])


def make_runs(lengths, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    t = sum(lengths)
    prob = torch.rand(t, generator=generator)
    prob[::5] = torch.tensor([0.0, 1.0, 1e-6])[torch.arange(len(prob[::5])) % 3]
    return torch.randn(t, d, generator=generator), prob


def test_the_doubling_is_the_loop():
    h, prob = make_runs(LENGTHS)
    found = smooth_runs(h, prob, places(LENGTHS), max(LENGTHS))
    expected = smooth_by_loop(h.double(), prob.double(), LENGTHS)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert found.dtype == torch.float32
    assert (found - h).abs().mean() > 0.1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_same_for_runs_of_any_length(lengths, seed):
    h, prob = make_runs(lengths, seed=seed)
    found = smooth_runs(h, prob, places(lengths), max(lengths))
    assert torch.allclose(found, smooth_by_loop(h, prob, lengths), atol=1e-5)


def test_gradients_are_those_of_the_loop():
    h, prob = make_runs(LENGTHS)
    weights = torch.randn(h.shape)
    found, expected = [], []
    for out, make in ((found, smooth_runs), (expected, None)):
        leaves = (h.clone().requires_grad_(), prob.clone().requires_grad_())
        if make:
            z = make(*leaves, places(LENGTHS), max(LENGTHS))
        else:
            z = smooth_by_loop(*leaves, LENGTHS)
        out += torch.autograd.grad((z * weights).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0.1
        assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.5, 1.0])
def test_long_runs_lose_nothing(p):
    """8,192 tokens: weights underflow, and sums and gradients stay what they are."""
    lengths = (8192, 1)
    h = torch.randn(8193, 2) + 3
    prob = torch.full((8193,), p)
    found = smooth_runs(h, prob, places(lengths), 8192)
    expected = smooth_by_loop(h.double(), prob.double(), lengths)
    assert found.isfinite().all()
    assert torch.allclose(found.double(), expected, rtol=1e-4)
    ones = smooth_runs(torch.ones(8193, 1), torch.rand(8193), places(lengths), 8192)
    assert (ones - 1).abs().max() < 1e-5  # weights sum to one
    leaf = prob.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(smooth_runs(h, leaf, places(lengths), 8192).sum(), leaf)
    assert gradient.isfinite().all()


def test_probabilities_are_clamped():
    """Nothing is forgotten at once, and nothing is ever ignored."""
    h = torch.tensor([[0.0], [1.0]])
    place = torch.arange(2)
    assert smooth_runs(h, torch.tensor([1.0, 0.0]), place, 2)[1].item() == pytest.approx(1e-4)
    assert smooth_runs(h, torch.tensor([1.0, 1.0]), place, 2)[1].item() == pytest.approx(1 - 1e-4)


def test_a_run_is_the_same_bit_for_bit_beside_others():
    h, prob = make_runs(LENGTHS)
    together = smooth_runs(h, prob, places(LENGTHS), max(LENGTHS))
    alone = smooth_runs(h[8:41], prob[8:41], torch.arange(33), 33)
    assert torch.equal(together[8:41], alone)
    longer = smooth_runs(h, prob, places(LENGTHS), 4096)  # more steps than are needed
    assert torch.equal(longer, together)


def test_what_is_no_number_stays_in_its_run():
    h, prob = make_runs(LENGTHS)
    expected = smooth_runs(h, prob, places(LENGTHS), max(LENGTHS))
    for value in (math.nan, math.inf):
        broken = h.clone().requires_grad_()
        with torch.no_grad():
            broken[3] = value  # in the second run
        found = smooth_runs(broken, prob, places(LENGTHS), max(LENGTHS))
        assert torch.equal(found[8:], expected[8:])
        assert not found[3:8].isfinite().any()


def test_one_graph_for_runs_of_other_lengths():
    counter = CompileCounter()
    graph = torch.compile(smooth_runs, fullgraph=True, backend=counter, dynamic=True)
    for lengths in (LENGTHS, (5, 12), (9, 9, 9)):
        h, prob = make_runs(lengths)
        found = graph(h, prob, places(lengths), 64)
        assert torch.allclose(found, smooth_by_loop(h, prob, lengths), atol=1e-5)
    assert counter.frame_count == 1
