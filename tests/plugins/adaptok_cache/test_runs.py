"""Which calls are successive steps of one sample."""

import pytest
from adaptok_cache.runs import SampleRun, follow


def walk(times, steps=None):
    runs, run = [], None
    for time in times:
        run = follow(run, time, steps).after_compute(1)
        runs.append(run)
    return runs


def list_steps(times, steps=None):
    return [run.step for run in walk(times, steps)]


@pytest.mark.parametrize("times", [(999.0, 500.0, 1.0), (0.0, 0.3, 1.0)])
def test_time_may_run_either_way(times):
    assert list_steps(times) == [0, 1, 2]


@pytest.mark.parametrize(
    ("times", "steps"),
    [
        ((999, 500, 1, 999, 500, 1), [0, 1, 2, 0, 1, 2]),  # the same walk again
        ((999, 500, 999, 500, 250), [0, 1, 0, 1, 2]),  # the first one was broken off
        ((0.0, 0.5, 0.2, 0.4), [0, 1, 0, 1]),  # time upwards, as SiT has it
    ],
)
def test_time_that_turns_is_another_run(times, steps):
    assert list_steps(times) == steps


def test_the_start_once_more_begins_another_run():
    first, again, second, third = walk((999, 999, 500, 200))
    assert (first.unsure, again.unsure, again.computed) == (False, True, 0)
    assert (second.step, second.unsure, third.step) == (1, True, 2)


def test_nothing_is_kept_of_a_later_time_that_comes_twice():
    """Heun evaluates each time but the first one twice."""
    runs = walk((999, 800, 800, 800, 600, 600, 400, 400))
    assert [run.computed for run in runs] == [0, 1, None, None, 0, 0, 1, None]
    assert [run.unsure for run in runs[4:7]] == [False, True, True]
    assert runs[-1].repeats == 3


def test_a_run_ends_with_its_last_step():
    assert list_steps((900, 600, 300, 200, 100), steps=3) == [0, 1, 2, 0, 1]


def test_times_that_are_no_numbers_begin_anew():
    assert list_steps((900, float("nan"), 300, 200)) == [0, 0, 0, 1]


def test_a_computed_step_knows_one_more_term():
    run = SampleRun(900.0)
    for known in (1, 2, 3, 3):
        run = follow(run, run.last - 100).after_compute(3)
        assert run.orders == known
    assert run.age == 0
    assert follow(run, 0.0).age == 1
