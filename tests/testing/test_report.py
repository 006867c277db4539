import pytest
import torch

from adaptok.errors import AdaptokError, ConfigError
from adaptok.testing import ConformanceError
from adaptok.testing.report import NotRun, Report, Result, require, run_checks


def check_first(case):
    """Something holds."""
    require(case != 1, "found one")


def check_second_one(case):
    """Something else holds.

    More words.
    """
    if case == 2:
        raise NotRun("two has none")
    if case == 3:
        raise IndexError("out of\nrange")


CHECKS = (check_first, check_second_one)


def test_a_report_counts_and_shows_each_check_with_its_reason():
    report = run_checks("thing 'x'", CHECKS, 0)
    assert report.passed == ("first", "second_one")
    assert str(report) == repr(report) == (
        "thing 'x': 2 passed, 0 failed, 0 not run\n"
        "first       passed  Something holds\n"
        "second_one  passed  Something else holds"
    )  # fmt: skip
    report.raise_failed()


def test_failures_and_what_did_not_run_say_why():
    assert run_checks("x", CHECKS, 1).results[0] == Result("first", "failed", "found one")
    report = run_checks("x", CHECKS, 2)
    assert report.not_run == ("second_one",)
    assert "not run  two has none" in str(report)
    report.raise_failed()
    report = run_checks("x", CHECKS, 3)
    assert report.failed == ("second_one",)
    with pytest.raises(ConformanceError, match="x fails second_one: IndexError: out of range"):
        report.raise_failed()


def test_an_error_is_an_assertion_and_adaptoks():
    assert issubclass(ConformanceError, AssertionError)
    assert issubclass(ConformanceError, AdaptokError)


def test_checks_are_left_out_with_a_reason_or_alone():
    report = run_checks("x", CHECKS, 1, skip={"first": "known, issue 7"})
    assert report.results[0] == Result("first", "not run", "known, issue 7")
    assert run_checks("x", CHECKS, 1, only=["second_one"]).passed == ("second_one",)
    for wrong in ({"skip": {"frist": ""}}, {"only": ["frist"]}):
        with pytest.raises(ConfigError, match="no check frist: checks are first, second_one"):
            run_checks("x", CHECKS, 1, **wrong)


def test_long_errors_of_others_are_cut():
    def check_long(case):
        raise ValueError("word " * 1000)

    (result,) = run_checks("x", [check_long], 0).results
    assert len(result.note) < 300


def test_an_empty_report_is_no_error():
    assert str(Report("x", ())) == "x: 0 passed, 0 failed, 0 not run"


def test_the_kit_leaves_the_callers_random_numbers_alone():
    from adaptok.testing import check_router

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check_router("random", only=["seed", "batch", "half", "deepcopy", "identity", "unwrap"])
    assert torch.equal(torch.rand(4), expected)
