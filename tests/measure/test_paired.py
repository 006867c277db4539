"""Paired distances: the interval of a difference knows that the samples belong together."""

import pytest
import torch

from adaptok.errors import ConfigError, ShapeError
from adaptok.measure import compare_features, compare_pairs, kernel_distance


def draw(n, seed, d=12):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_figures_are_those_of_all_images():
    first, second, real = draw(60, 0) + 0.3, draw(60, 1) + 0.5, draw(90, 2)
    found = compare_pairs(first, second, real, resamples=20)
    a, b = kernel_distance(first, real), kernel_distance(second, real)
    assert found.first.value == pytest.approx(a)
    assert found.second.value == pytest.approx(b)
    assert found.difference.value == pytest.approx(b - a)
    assert found.change.value == pytest.approx((b - a) / a)
    assert (found.pairs, found.real) == (60, 90)
    alone = compare_features(first, real, resamples=20, frechet_resamples=2)
    assert found.first == alone.kid


def test_pairs_tell_what_separate_sets_cannot():
    """A small shift of the same samples is certain; of other samples it drowns in their spread."""
    real, drawn = draw(300, 3), draw(150, 4) + 0.3
    paired = compare_pairs(drawn, drawn + 0.03, real, resamples=300)
    assert paired.difference.low > 0
    other = compare_pairs(drawn[torch.randperm(150)], drawn + 0.03, real, resamples=300)
    width = paired.difference.high - paired.difference.low
    assert other.difference.high - other.difference.low > 2 * width


def test_the_interval_covers_the_difference_of_the_distributions():
    """Two shifts of one distribution: the difference of many images lies in most intervals."""
    truth = kernel_distance(draw(4000, 98) + 0.6, draw(4000, 99)) - kernel_distance(
        draw(4000, 98) + 0.5, draw(4000, 99)
    )
    held = 0
    for seed in range(40):
        drawn, real = draw(80, 100 + seed), draw(160, 200 + seed)
        found = compare_pairs(drawn + 0.5, drawn + 0.6, real, resamples=200)
        held += found.difference.low <= truth <= found.difference.high
    assert held >= 34


def test_equal_sets_lose_nothing():
    x, real = draw(40, 5) + 0.2, draw(50, 6)
    found = compare_pairs(x, x.clone(), real, resamples=10)
    assert found.change.value == found.change.high == 0
    assert found.loses_less_than(0.0)


def test_wrong_input_is_refused():
    x, real = draw(10, 0), draw(12, 1)
    with pytest.raises(ShapeError, match="drawn from the same noise"):
        compare_pairs(x, x[:9], real)
    with pytest.raises(ConfigError, match="at least 2 resamples"):
        compare_pairs(x, x, real, resamples=1)
