"""From features to the figures of a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .intervals import Interval, bootstrap_difference, bootstrap_mean
from .measuring import RouterRuns, Run
from .neighbours import compare_centred, match_labels

FLOOR = "random"


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A k-NN task; references are features of the unwrapped model.

    Args:
        references: features whose class is known.
        reference_labels: their classes.
        queries: features of the queries by the unwrapped model.
        query_labels: the classes of the queries.
        k: how many references vote.
        seed: seed of the intervals.
    """

    references: Float[Tensor, "r d"]
    reference_labels: Int[Tensor, " r"]
    queries: Float[Tensor, "q d"]
    query_labels: Int[Tensor, " q"]
    k: int
    seed: int

    def score(self, features: Float[Tensor, "q d"]) -> Float[Tensor, " q"]:
        """Return 1 for each query whose neighbours name its class, else 0."""
        hits = match_labels(
            features, self.query_labels, self.references, self.reference_labels, self.k
        )
        return hits.float()

    def compare(self, features: Float[Tensor, "q d"]) -> Float[Tensor, " q"]:
        """Return the cosine of each query's features to the unwrapped ones, centred."""
        return compare_centred(features, self.queries, self.references.mean(0))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Args:
        router: name of the router.
        keep: share of the cells that are kept.
        tokens: tokens that the blocks of the span computed for an image.
        gflops: operations of one image in units of 10 ** 9.
        unwrapped_gflops: the same of the unwrapped model.
        ms: median time of an image, router included.
        unwrapped_ms: that of the unwrapped twin, measured in turn.
        accuracy: share of the queries that k-NN classifies rightly.
        over_random: accuracy minus that of random routing at the same budget, paired by picture.
        cosine: of centred features to the unwrapped ones.
    """

    router: str
    keep: float
    tokens: float
    gflops: float
    unwrapped_gflops: float
    ms: float
    unwrapped_ms: float
    accuracy: Interval
    over_random: Interval
    cosine: Interval


def tabulate(task: Task, runs: Mapping[str, RouterRuns]) -> list[Row]:
    """Score all routers at all budgets against random routing.

    Args:
        task: what is classified.
        runs: what the routers did, by name; one of them is `FLOOR`.

    Returns:
        Rows, budget by budget from the largest.
    """
    rows = []
    for keep in sorted(runs[FLOOR].by_keep, reverse=True):
        floor = mean_over_seeds(task.score, runs[FLOOR].by_keep[keep])
        for name, found in runs.items():
            run = found.by_keep[keep]
            hits = mean_over_seeds(task.score, run)
            rows.append(
                Row(
                    name,
                    keep,
                    run.tokens,
                    run.flops / 1e9,
                    found.unwrapped_flops / 1e9,
                    run.ms,
                    found.unwrapped_ms,
                    bootstrap_mean(hits, task.seed),
                    bootstrap_difference(hits, floor, task.seed),
                    bootstrap_mean(mean_over_seeds(task.compare, run), task.seed),
                )
            )
    return rows


def mean_over_seeds(judge: Callable[[Tensor], Tensor], run: Run) -> Float[Tensor, " q"]:
    """Return the mean of a judgement of each query over the seeds of a run."""
    return torch.stack([judge(features) for features in run.features]).mean(0)


def choose_router(tables: Sequence[Sequence[Row]], keeps: Sequence[float]) -> str:
    """Name the router with the best k-NN accuracy, the mean over models and budgets.

    Args:
        tables: rows of each model.
        keeps: budgets that count.

    Returns:
        The name; random routing is no candidate, and a tie goes to the higher cosine.
    """
    marks: dict[str, list[tuple[float, float]]] = {}
    for row in (row for rows in tables for row in rows):
        if row.keep in keeps and row.router != FLOOR:
            marks.setdefault(row.router, []).append((row.accuracy.mean, row.cosine.mean))
    return max(marks, key=lambda name: tuple(sum(each) for each in zip(*marks[name], strict=True)))
