"""Distances between features against loops, closed forms and known orders."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptok.errors import ConfigError, DataError, DtypeError, ShapeError
from adaptok.measure import distances
from adaptok.measure.distances import (
    Estimate,
    compare_features,
    draw_halves,
    frechet_distance,
    kernel_distance,
    measure_floor,
)


def draw(n, d, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(n, d, generator=generator)


def kid_by_loops(x, y):
    x, y = x.double().tolist(), y.double().tolist()

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def mean(values):
        values = list(values)
        return math.fsum(values) / len(values)

    within = [
        mean(kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j)
        for z in (x, y)
    ]
    return sum(within) - 2 * mean(kernel(a, b) for a in x for b in y)


def frechet_by_eigenvalues(x, y):
    """By the eigenvalues of the product, which is not symmetric."""
    x, y = x.double().numpy(), y.double().numpy()
    ours, theirs = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(ours @ theirs).real.clip(min=0)).sum()
    shift = x.mean(0) - y.mean(0)
    return shift @ shift + np.trace(ours + theirs) - 2 * root


def with_covariance(n, covariance, mean, seed):
    """Points whose mean and covariance are exactly those."""
    x = draw(n, len(mean), seed).double()
    x = x - x.mean(0)
    own = torch.linalg.cholesky(x.T @ x / (n - 1))
    return x @ torch.linalg.inv(own).T @ torch.linalg.cholesky(covariance).T + mean


class TestKernelDistance:
    @given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 5), st.integers(0, 99))
    def test_loops(self, n, m, d, seed):
        x, y = draw(n, d, seed), draw(m, d, seed + 100, shift=0.7)
        assert kernel_distance(x, y) == pytest.approx(kid_by_loops(x, y), rel=1e-9, abs=1e-9)

    def test_blocks_do_not_matter(self, monkeypatch):
        x, y = draw(23, 4), draw(17, 4, 1, shift=0.3)
        whole = kernel_distance(x, y)
        floor = measure_floor(y, frechet_resamples=2)
        monkeypatch.setattr(distances, "KERNEL_ELEMENTS", 60)
        monkeypatch.setattr(distances, "WEIGHT_ROWS", 7)
        assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-12)
        assert measure_floor(y, frechet_resamples=2).kid.low == pytest.approx(floor.kid.low)

    def test_unbiased_for_equal_distributions(self):
        found = np.array(
            [kernel_distance(draw(20, 6, 2 * s), draw(25, 6, 2 * s + 1)) for s in range(300)]
        )
        assert min((found > 0).mean(), (found < 0).mean()) > 0.25  # both signs
        assert abs(found.mean()) < 3 * found.std() / len(found) ** 0.5

    def test_shifts_order(self):
        y = draw(200, 8)
        found = [kernel_distance(draw(150, 8, 1, shift=s), y) for s in (0, 0.2, 0.5, 1)]
        assert found == sorted(found)
        assert found[1] > 0

    def test_float32_features_lose_nothing(self):
        x, y = draw(40, 8, shift=30), draw(40, 8, 1, shift=30)
        assert kernel_distance(x, y) == kernel_distance(x.double(), y.double())


class TestFrechetDistance:
    @pytest.mark.parametrize(("n", "m"), [(40, 55), (40, 6), (5, 6), (6, 40)])
    def test_eigenvalues(self, n, m):
        x, y = draw(n, 8), draw(m, 8, 1, shift=0.4, scale=1.7)
        assert frechet_distance(x, y) == pytest.approx(frechet_by_eigenvalues(x, y), rel=1e-5)

    def test_closed_form_of_commuting_covariances(self):
        turn = torch.linalg.qr(draw(3, 3, 5).double()).Q
        ours, theirs = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 0.25, 1.0])
        x, y = (
            with_covariance(n, turn @ torch.diag(values.double()) @ turn.T, mean, n)
            for n, values, mean in (
                (30, ours, torch.tensor([1.0, 0.0, 2.0]).double()),
                (40, theirs, torch.tensor([0.0, 2.0, 2.0]).double()),
            )
        )
        expected = 1 + 4 + float((ours.sqrt() - theirs.sqrt()).square().sum())
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)

    def test_closed_form_of_covariances_that_do_not_commute(self):
        ours = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
        theirs = torch.diag(torch.tensor([1.0, 4.0])).double()
        x = with_covariance(20, ours, torch.zeros(2).double(), 0)
        y = with_covariance(21, theirs, torch.zeros(2).double(), 1)
        # of 2x2 matrices: tr (A B)^(1/2) = (tr A B + 2 (det A B)^(1/2))^(1/2)
        product = ours @ theirs
        root = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
        expected = float(ours.trace() + theirs.trace()) - 2 * root
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("n", [5, 50])
    def test_itself_and_symmetry(self, n):
        x, y = draw(n, 8), draw(30, 8, 1, shift=0.1)
        assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
        assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-7)

    def test_features_that_never_vary(self):
        x = torch.ones(5, 3)
        assert frechet_distance(x, x + 2) == pytest.approx(12)


class TestIntervals:
    def test_halves(self):
        taken = draw_halves(11, 400, (3, 1))
        assert set(taken.sum(1).tolist()) == {5}
        assert (taken.float().mean(0) - 5 / 11).abs().max() < 0.1  # each image as often
        assert torch.equal(taken[:20], draw_halves(11, 20, (3, 1)))
        assert not torch.equal(taken[:20], draw_halves(11, 20, (3, 0)))
        assert not torch.equal(taken[:20], draw_halves(11, 20, (4, 1)))

    def test_resamples_are_distances_of_halves(self, monkeypatch):
        given = []
        monkeypatch.setattr(
            distances,
            "enclose",
            lambda value, resampled, level, least=None: (
                given.append((value, resampled)) or Estimate(value=0, low=0, high=0, resamples=2)
            ),
        )
        x, y = draw(13, 4), draw(10, 4, 1, shift=0.5)
        compare_features(x, y, seed=7, resamples=3, frechet_resamples=5)
        halves_x, halves_y = draw_halves(13, 5, (7, 0)), draw_halves(10, 5, (7, 1))
        pairs = [(x[a], y[b]) for a, b in zip(halves_x, halves_y, strict=True)]
        (kid, kids), (frechet, frechets) = given
        assert kid == pytest.approx(kid_by_loops(x, y))
        assert kids == pytest.approx([kid_by_loops(*pair) for pair in pairs[:3]])
        assert frechet == frechet_distance(x, y)
        assert frechets == [frechet_distance(*pair) for pair in pairs]

    def test_floor_is_of_complementary_halves(self, monkeypatch):
        given = []
        monkeypatch.setattr(
            distances,
            "summarise",
            lambda values, level: (
                given.append(values) or Estimate(value=0, low=0, high=0, resamples=2)
            ),
        )
        y = draw(9, 4)
        floor = measure_floor(y, seed=2, resamples=4, frechet_resamples=3)
        halves = draw_halves(9, 4, (2, 2))
        assert given[0] == pytest.approx([kid_by_loops(y[a], y[~a]) for a in halves])
        assert given[1] == [frechet_distance(y[a], y[~a]) for a in halves[:3]]
        assert (floor.left, floor.right) == (4, 5)

    def test_coverage(self):
        """An interval that should hold the truth in 19 of 20 cases does, and is not endless."""
        truth = np.mean(
            [kernel_distance(draw(400, 3, s, shift=1), draw(400, 3, 900 + s)) for s in range(40)]
        )
        found = [
            compare_features(
                draw(60, 3, 5000 + s, shift=1),
                draw(80, 3, 7000 + s),
                resamples=100,
                frechet_resamples=2,
            ).kid
            for s in range(150)
        ]
        held = np.mean([kid.low <= truth <= kid.high for kid in found])
        assert 0.85 <= held <= 0.99
        spread = np.std([kid.value for kid in found])
        width = np.mean([kid.high - kid.low for kid in found]) / (2 * 1.96)
        assert 0.8 < width / spread < 1.25

    def test_too_wide_for_equal_distributions_but_not_much(self):
        found = [
            compare_features(
                draw(60, 5, 2 * s), draw(60, 5, 2 * s + 1), resamples=100, frechet_resamples=2
            ).kid
            for s in range(100)
        ]
        spread = np.std([kid.value for kid in found])
        width = np.mean([kid.high - kid.low for kid in found]) / (2 * 1.96)
        assert 1 < width / spread < 2

    def test_estimate_lies_inside(self):
        found = compare_features(draw(60, 6), draw(50, 6, 1, shift=0.5), frechet_resamples=10)
        for estimate in (found.kid, found.frechet):
            assert estimate.low < estimate.value < estimate.high
        assert (found.left, found.right) == (60, 50)
        assert (found.kid.resamples, found.frechet.resamples) == (1000, 10)

    def test_frechet_interval_stays_above_zero(self):
        x = draw(12, 2)
        found = compare_features(x, x + 0.01, frechet_resamples=20).frechet
        assert found.low == 0 < found.high

    def test_level_widens(self):
        x, y = draw(60, 6), draw(50, 6, 1, shift=0.5)
        narrow = compare_features(x, y, level=0.5, frechet_resamples=5).kid
        wide = compare_features(x, y, level=0.95, frechet_resamples=5).kid
        assert wide.low < narrow.low < narrow.high < wide.high

    def test_one_seed_one_answer(self):
        x, y = draw(30, 4), draw(20, 4, 1)
        options = {"resamples": 50, "frechet_resamples": 5}
        assert compare_features(x, y, **options) == compare_features(x, y, **options)
        assert compare_features(x, y, **options) != compare_features(x, y, seed=1, **options)

    def test_progress(self):
        seen = []
        x = draw(12, 3)
        compare_features(
            x, x, resamples=3, frechet_resamples=4, progress=lambda *step: seen.append(step)
        )
        assert seen == [(done, 6) for done in range(7)]
        seen.clear()
        measure_floor(x, resamples=3, frechet_resamples=4, progress=lambda *step: seen.append(step))
        assert seen == [(done, 5) for done in range(6)]

    def test_words(self):
        estimate = Estimate(value=0.98765, low=-0.5, high=123.456, resamples=3)
        assert str(estimate) == "0.9877 (-0.5000 to 123.5)"


class TestErrors:
    @pytest.mark.parametrize("measure", [kernel_distance, frechet_distance, compare_features])
    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.zeros(9, 4), ShapeError, "widths 4 and 5: take one extractor"),
            (torch.zeros(9), ShapeError, r"first features have shape \(9,\)"),
            (torch.zeros(9, 0), ShapeError, r"shape \(9, 0\)"),
            (torch.zeros(1, 5), ShapeError, "of 1 images: give at least [24]"),
            (torch.zeros(9, 5, dtype=torch.long), DtypeError, r"torch.int64: give floats"),
            (torch.tensor([[0.0] * 5] * 6 + [[math.nan] * 5]), DataError, "first in row 6"),
            (torch.tensor([[math.inf] * 5] * 7), DataError, "first in row 0"),
        ],
    )
    def test_features(self, measure, x, error, message):
        with pytest.raises(error, match=message):
            measure(x, torch.ones(9, 5))

    def test_second_set(self):
        with pytest.raises(ShapeError, match="the second features are of 3 images"):
            compare_features(torch.ones(9, 5), torch.ones(3, 5))
        with pytest.raises(ShapeError, match="of 3 images: give at least 4"):
            measure_floor(torch.ones(3, 5))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"resamples": 1}, "at least 2 resamples, got 1 for KID"),
            ({"frechet_resamples": 0}, "0 for the Frechet distance"),
            ({"level": 1.0}, "between 0 and 1, got 1.0"),
        ],
    )
    def test_resampling(self, options, message):
        x = draw(9, 3)
        with pytest.raises(ConfigError, match=message):
            compare_features(x, x, **options)
        with pytest.raises(ConfigError, match=message):
            measure_floor(x, **options)
