"""The search for a budget, on times that we make up: no clock runs here."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptok.errors import ConfigError
from adaptok.measure.budget_search import Round, search_budgets
from adaptok.measure.latency import Timing
from adaptok.time_curves import CallShape

N = 200
SHAPE = CallShape(4, N, "float32", "cpu", 2)


class FakeMachine:
    """Answers with the times of a function, and notes what was asked."""

    def __init__(self, truth, plain=None, noise=0.0, seed=0):
        self.truth, self.plain, self.noise = truth, plain, noise
        self.random, self.rounds = random.Random(seed), []

    def time(self, ms):
        ms *= 1 + self.noise * self.random.uniform(-1, 1)
        return Timing(ms, 0.99 * ms, 1.01 * ms)

    def __call__(self, keeps):
        self.rounds.append(list(keeps))
        plain = None if self.plain is None else self.time(self.plain)
        return Round({keep: self.time(self.truth(keep)) for keep in keeps}, plain)


def kinked(floor, first, second, knee=0.5):
    """Straight on both sides of a knee that is one of the points of the first round."""

    def truth(keep):
        knee_ = round(knee * N) / N
        rise = first * min(keep, knee_) + second * max(0.0, keep - knee_)
        return floor + rise

    return truth


rises = st.floats(0.1, 500)


@given(floor=st.floats(0.1, 50), first=rises, second=rises, part=st.floats(0.01, 0.99))
def test_exact_where_the_truth_is_straight_between_the_points(floor, first, second, part):
    truth = kinked(floor, first, second)
    target = truth(1 / N) + part * (truth(1.0) - truth(1 / N))
    found = search_budgets(FakeMachine(truth), SHAPE, target_ms=target).curve.find_keep(target)
    for slack in (1e-9, -1e-9):  # of rounding, where a count meets the target exactly
        within = [c / N for c in range(1, N + 1) if truth(c / N) <= target * (1 + slack)]
        if found == within[-1]:
            return
    pytest.fail(f"{found} is not {within[-1]}")


@given(noise=st.floats(0.0, 0.3), seed=st.integers(0, 99), target=st.floats(11, 120))
def test_noise_leaves_the_curve_monotone_and_the_target_kept(noise, seed, target):
    machine = FakeMachine(lambda keep: 10 + 80 * keep, 74.0, noise, seed)
    measured = search_budgets(machine, SHAPE, target_ms=target)
    times = [point.ms for point in measured.curve.points]
    assert times == sorted(times)
    keep = measured.curve.find_keep(target)
    if keep is not None:
        assert measured.curve.ms_at(keep) <= target * (1 + 1e-9)
        assert round(keep * N) / N == keep
    even = measured.break_even
    assert even is None or measured.curve.ms_at(even) <= measured.plain.ms * (1 + 1e-9)


def test_the_second_round_looks_around_the_answers():
    machine = FakeMachine(lambda keep: 10 + 80 * keep, plain=70.0)
    measured = search_budgets(machine, SHAPE, target_ms=40.0)
    first, second = machine.rounds
    assert first == [1 / N, 0.25, 0.5, 0.75, 1.0]
    assert {0.375, 0.75, 1.0} <= set(second)  # the answer, the break-even, every cell
    assert all(0.25 < keep <= 1.0 for keep in second)
    assert 0.31 in second  # half way to 0.25, in whole cells
    assert measured.break_even == 0.75
    assert measured.curve.find_keep(40.0) == 0.375


def test_a_point_that_bends_between_the_first_points_is_corrected():
    """A knee at .4, between two points: the second round is nearer to the truth than the first."""
    truth = kinked(10, 10, 150, knee=0.4)
    machine = FakeMachine(truth)
    found = search_budgets(machine, SHAPE, target_ms=20.0).curve.find_keep(20.0)
    once = search_budgets(FakeMachine(truth), SHAPE, points=2, target_ms=20.0)
    right = max(count / N for count in range(1, N + 1) if truth(count / N) <= 20.0)
    assert abs(found - right) < 0.03
    assert abs(once.curve.find_keep(20.0) - right) > 0.03  # two points see no knee


def test_a_keep_is_measured_itself():
    machine = FakeMachine(lambda keep: 10 + 80 * keep**2)
    measured = search_budgets(machine, SHAPE, keep=0.333)
    keep = 67 / N
    assert all(keep in asked for asked in machine.rounds)
    assert measured.curve.ms_at(keep) == pytest.approx(10 + 80 * keep**2)


def test_few_cells_make_few_points():
    machine = FakeMachine(lambda keep: 1 + keep)
    measured = search_budgets(machine, CallShape(1, 3, "float32", "cpu", 2), points=9)
    assert [point.keep for point in measured.curve.points] == [1 / 3, 2 / 3, 1.0]
    assert measured.plain is None
    assert measured.break_even is None


def test_break_even_is_none_where_nothing_is_faster_and_one_where_all_is():
    assert search_budgets(FakeMachine(lambda k: 9 + k, 8.0), SHAPE).break_even is None
    assert search_budgets(FakeMachine(lambda k: 9 + k, 10.5), SHAPE).break_even == 1.0


def test_one_point_is_no_curve():
    with pytest.raises(ConfigError, match="points of at least 2, got 1"):
        search_budgets(FakeMachine(lambda keep: keep), SHAPE, points=1)
