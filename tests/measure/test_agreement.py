"""Agreement of outputs, against loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptok.measure import compare_outputs


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine_by_loop(found, expected):
    found, expected = found.double(), expected.double()
    total = 0.0
    for sample in range(len(found)):
        ours = [float(v - m) for v, m in zip(found[sample], found.mean(0), strict=True)]
        theirs = [float(v - m) for v, m in zip(expected[sample], expected.mean(0), strict=True)]
        dot = sum(a * b for a, b in zip(ours, theirs, strict=True))
        total += dot / math.hypot(*ours) / math.hypot(*theirs)
    return total / len(found)


@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 100))
def test_as_a_loop_computes_it(b, width, seed):
    found, expected = draw(b, width, seed=seed), draw(b, width, seed=seed + 1)
    seen = compare_outputs(found, expected)
    assert seen.cosine == pytest.approx(cosine_by_loop(found, expected), abs=1e-6)
    error = float((found - expected).norm() / expected.norm())
    assert seen.relative_error == pytest.approx(error, rel=1e-5)


def test_what_all_samples_share_hides_nothing():
    shared = 100 * draw(1, 8)
    found, expected = draw(4, 8, seed=1) + shared, draw(4, 8, seed=2) + shared
    assert compare_outputs(found, expected).cosine < 0.9
    assert compare_outputs(found, expected).relative_error < 0.1


def test_one_sample_is_not_centred():
    seen = compare_outputs(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert seen.cosine == pytest.approx(0.5**0.5)


def test_images_count_as_one_vector():
    found, expected = draw(3, 2, 4, 5), draw(3, 2, 4, 5, seed=1)
    flat = compare_outputs(found.flatten(1), expected.flatten(1))
    assert compare_outputs(found, expected) == flat


def test_what_cannot_be_compared():
    assert compare_outputs(draw(2, 3), draw(2, 4)) is None
    assert compare_outputs(torch.tensor(1.0), torch.tensor(1.0)) is None
    assert compare_outputs(torch.ones(2, 3), draw(2, 3)).cosine is None
    assert compare_outputs(draw(2, 3), torch.zeros(2, 3)).relative_error is None


def test_half_precision_is_compared_in_double():
    found = draw(2, 3).bfloat16()
    assert compare_outputs(found, found).cosine == 1.0
