"""Figures as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from .intervals import Interval, bootstrap_mean
from .scoring import Row, Task

HEADER = (
    "| router | keep | tokens | GFLOPs (of unwrapped) | ms an image (of unwrapped) | k-NN accuracy "
    "| minus random, points | cosine |\n|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """What the unwrapped model reaches on the same queries.

    Args:
        accuracy: share of the queries that k-NN classifies rightly.
        references: number of references.
        queries: number of queries.
    """

    accuracy: Interval
    references: int
    queries: int


def summarise_unwrapped(task: Task) -> Unwrapped:
    """Score the unwrapped model."""
    hits = bootstrap_mean(task.score(task.queries), task.seed)
    return Unwrapped(hits, len(task.references), len(task.queries))


def format_rows(rows: Sequence[Row], unwrapped: Unwrapped) -> str:
    """Return a Markdown table.

    Args:
        rows: its lines.
        unwrapped: the line above them.

    Returns:
        The table; brackets hold 95 % bootstrap intervals over the queries.
    """
    first = rows[0]
    top = (
        f"| unwrapped | 1 | | {first.unwrapped_gflops:.1f} | {first.unwrapped_ms:.0f} "
        f"| {format_interval(unwrapped.accuracy, '.3f')} | | 1 |"
    )
    return "\n".join([HEADER, top, *(format_row(row) for row in rows)])


def format_row(row: Row) -> str:
    """Return one line of the table."""
    return (
        f"| {row.router} | {row.keep:g} | {row.tokens:.0f} "
        f"| {row.gflops:.1f} ({row.gflops / row.unwrapped_gflops:.2f}) "
        f"| {row.ms:.0f} ({row.ms / row.unwrapped_ms:.2f}) "
        f"| {format_interval(row.accuracy, '.3f')} "
        f"| {format_interval(row.over_random, '+.1f', 100)} | {row.cosine.mean:.3f} |"
    )


def format_interval(interval: Interval, form: str, factor: float = 1) -> str:
    """Return a mean and its interval in brackets, in units of one over the factor."""
    mean, low, high = (
        format(factor * value, form) for value in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} [{low}, {high}]"
