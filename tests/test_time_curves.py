"""Curves of time over budget: pure values, on made-up times."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptok.errors import ConfigError
from adaptok.time_curves import (
    CallShape,
    CurvePoint,
    TimeCurve,
    fit_curve,
    raise_monotone,
    show_ms,
)

N = 96
SHAPE = CallShape(3, N, "float32", "cpu", 2)
times = st.floats(0.01, 1e4)
noisy_points = st.dictionaries(st.integers(1, N), times, min_size=1, max_size=12).map(
    lambda found: [CurvePoint(count / N, ms) for count, ms in found.items()]
)


@given(values=st.lists(times, min_size=1, max_size=12))
def test_raised_values_never_fall_and_are_the_nearest(values):
    raised = raise_monotone(values)
    assert len(raised) == len(values)
    assert raised == sorted(raised)
    assert sum(raised) == pytest.approx(sum(values))
    # the nearest: each run of equal values is the mean of its own, and a value that rises stays
    for level in set(raised):
        own = [v for v, r in zip(values, raised, strict=True) if r == level]
        assert level == pytest.approx(sum(own) / len(own))
    if sorted(values) == values:
        assert raised == values


@given(points=noisy_points, target=times)
def test_a_budget_never_exceeds_its_target_and_one_cell_more_does(points, target):
    curve = fit_curve(SHAPE, points)
    keep = curve.find_keep(target)
    if keep is None:
        assert target < curve.fastest_ms
        return
    count = round(keep * N)
    assert count / N == keep
    assert curve.ms_at(keep) <= target * (1 + 1e-9)
    if keep < curve.points[-1].keep:
        assert curve.ms_at((count + 1) / N) > target or (count + 1) / N > curve.points[-1].keep


@given(points=noisy_points, keeps=st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6))
def test_time_never_falls_with_the_share_and_meets_every_point(points, keeps):
    curve = fit_curve(SHAPE, points)
    along = [curve.ms_at(keep) for keep in sorted(keeps)]
    assert along == sorted(along)
    for point in curve.points:
        assert curve.ms_at(point.keep) == point.ms
    assert (curve.fastest_ms, curve.full_ms) == (curve.points[0].ms, curve.points[-1].ms)


def test_times_that_fall_are_pooled_and_repeated_points_averaged():
    curve = fit_curve(
        SHAPE,
        [
            CurvePoint(1.0, 80.0, 0.1),
            CurvePoint(0.5, 52.0, 0.2),
            CurvePoint(0.75, 50.0, 0.05),
            CurvePoint(0.25, 10.0),
            CurvePoint(0.25, 20.0, 0.3),
        ],
    )
    assert [point.ms for point in curve.points] == [15.0, 51.0, 51.0, 80.0]
    assert [point.spread for point in curve.points] == [0.3, 0.2, 0.05, 0.1]
    assert curve.find_keep(51.0) == 0.75  # a plateau: the largest
    assert curve.spread_at(0.6) == 0.2
    assert curve.spread_at(0.75) == 0.05


def test_a_curve_without_order_is_refused():
    for points in ((), (CurvePoint(0.5, 2.0), CurvePoint(0.25, 3.0)),
                   (CurvePoint(0.5, 2.0), CurvePoint(0.75, 1.0))):  # fmt: skip
        with pytest.raises(ConfigError, match="make it with fit_curve"):
            TimeCurve(SHAPE, points)


def test_a_shape_says_on_what_a_time_depends():
    cpu = torch.device("cpu")
    shape = CallShape.of(3, N, torch.float32, cpu)
    assert shape == CallShape(3, N, "float32", "cpu", torch.get_num_threads())
    assert CallShape.of(3, N, torch.float32, torch.device("cuda", 1)).describe() == (
        "batch 3 of 96 cells, float32 on cuda"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert CallShape.of(3, N, torch.float32, cpu).dtype == "bfloat16"
    assert SHAPE.fits(CallShape(3, N, "float32", "cpu", None))
    for other in (
        CallShape(2, N, "float32", "cpu", 2),
        CallShape(3, 95, "float32", "cpu", 2),
        CallShape(3, N, "bfloat16", "cpu", 2),
        CallShape(3, N, "float32", "cuda", 2),
        CallShape(3, N, "float32", "cpu", 1),
    ):
        assert not SHAPE.fits(other)
        assert not other.fits(SHAPE)


def test_a_curve_is_plain_numbers_and_is_pickled():
    curve = fit_curve(SHAPE, [CurvePoint(0.5, 2.0), CurvePoint(1.0, 3.0)])
    assert pickle.loads(pickle.dumps(curve)) == curve


def test_milliseconds_in_words():
    assert [show_ms(ms) for ms in (0.0, 0.05, 9.996, 41.84, 1349.7)] == [
        "0 ms", "0.0500 ms", "10.00 ms", "41.8 ms", "1350 ms",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "ms", "message"),
    [
        (0.5, float("nan"), r"finite and not negative, got nan ms at keep=0.5: measure again"),
        (0.5, float("inf"), r"got inf ms at keep=0.5"),
        (0.5, -1.0, r"got -1 ms at keep=0.5"),
        (float("nan"), 20.0, r"got 20 ms at keep=nan"),
    ],
)
def test_a_time_that_is_no_number_is_refused(keep, ms, message):
    with pytest.raises(ConfigError, match=message):
        CurvePoint(keep, ms)
