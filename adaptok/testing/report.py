"""Checks, and the table of what came of them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from adaptok.errors import AdaptokError, ConfigError

Outcome = Literal["passed", "failed", "not run"]
Case = TypeVar("Case")
LONGEST = 240  # letters of somebody else's error in the table


class ConformanceError(AdaptokError, AssertionError):
    """A part does not do what the interface of its kind promises."""


class NotRun(Exception):  # noqa: N818 - not an error: the check does not apply
    """A check does not apply to a part; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one check.

    Args:
        check: name of the check.
        outcome: `"passed"`, `"failed"` or `"not run"`.
        note: what is checked, what was wrong, or why it was not run.
    """

    check: str
    outcome: Outcome
    note: str


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """What came of all checks of a part; `str` and `repr` are a table.

    Args:
        part: the part in words.
        results: one per check, in the order of the checks.

    Example:
        >>> report = Report("router 'edges'", (Result("range", "failed", "found -0.2"),))
        >>> report
        router 'edges': 0 passed, 1 failed, 0 not run
        range  failed  found -0.2
        >>> report.raise_failed()
        Traceback (most recent call last):
            ...
        adaptok.testing.report.ConformanceError: router 'edges' fails range: found -0.2
    """

    part: str
    results: tuple[Result, ...]

    def names(self, outcome: Outcome) -> tuple[str, ...]:
        """Return the names of the checks that ended in some way."""
        return tuple(result.check for result in self.results if result.outcome == outcome)

    @property
    def passed(self) -> tuple[str, ...]:
        """Names of the checks that hold."""
        return self.names("passed")

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that do not hold."""
        return self.names("failed")

    @property
    def not_run(self) -> tuple[str, ...]:
        """Names of the checks that do not apply, or were left out."""
        return self.names("not run")

    def raise_failed(self) -> None:
        """Raise an error that names every failed check, if there is one.

        Raises:
            ConformanceError: a check failed.
        """
        failed = [f"{r.check}: {r.note}" for r in self.results if r.outcome == "failed"]
        if failed:
            raise ConformanceError(f"{self.part} fails " + "; ".join(failed))

    def __str__(self) -> str:
        counts = f"{len(self.passed)} passed, {len(self.failed)} failed, {len(self.not_run)}"
        widest = max((len(result.check) for result in self.results), default=0)
        ends = max((len(result.outcome) for result in self.results), default=0)
        rows = [f"{r.check:{widest}}  {r.outcome:{ends}}  {r.note}" for r in self.results]
        return "\n".join([f"{self.part}: {counts} not run", *rows])

    def __repr__(self) -> str:  # a notebook shows the table
        return str(self)


def name_of(check: Callable[[Case], None]) -> str:
    """Return the name of a check: that of its function without `check_`."""
    return check.__name__.removeprefix("check_")


def reason_of(check: Callable[[Case], None]) -> str:
    """Return in one line what a check looks for."""
    return (check.__doc__ or "").strip().split("\n")[0].rstrip(".")


def run_check(check: Callable[[Case], None], case: Case) -> Result:
    """Run one check; whatever it raises is a failure.

    Args:
        check: raises if something is wrong, `NotRun` if it does not apply.
        case: what is checked.

    Returns:
        The result.
    """
    name = name_of(check)
    try:
        check(case)
    except NotRun as reason:
        return Result(name, "not run", str(reason))
    except ConformanceError as error:
        return Result(name, "failed", str(error))
    except Exception as error:
        message = " ".join(str(error).split()) or "no message"
        return Result(name, "failed", f"{type(error).__name__}: {message[:LONGEST]}")
    return Result(name, "passed", reason_of(check))


def run_checks(
    part: str,
    checks: Sequence[Callable[[Case], None]],
    case: Case,
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Run checks on a part.

    Args:
        part: the part in words.
        checks: the checks.
        case: what is checked.
        skip: names of checks that are not run, and why.
        only: names of the only checks to run; the others are left out of the report.

    Returns:
        The report.

    Raises:
        ConfigError: there is no check of a name.
    """
    names = [name_of(check) for check in checks]
    left_out = dict(skip or {})
    unknown = ({*left_out} | {*(only or ())}) - {*names}
    if unknown:
        raise ConfigError(
            f"there is no check {', '.join(sorted(unknown))}: checks are {', '.join(names)}"
        )
    results = []
    for check, name in zip(checks, names, strict=True):
        if name in left_out:
            results.append(Result(name, "not run", left_out[name]))
        elif only is None or name in only:
            with torch.random.fork_rng(devices=[]):
                results.append(run_check(check, case))
    return Report(part, tuple(results))


def require(condition: object, problem: str) -> None:
    """Raise a `ConformanceError` unless a condition holds.

    Args:
        condition: what must hold.
        problem: what was found, and what is needed.

    Raises:
        ConformanceError: it does not hold.
    """
    if not condition:
        raise ConformanceError(problem)
