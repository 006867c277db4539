"""The work of `adaptok plan`."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

from adaptok.budgeted import budget as budgeted
from adaptok.budgets import check_amount, check_target
from adaptok.cli.benching import STDOUT, Measuring, limit_threads, naming_package, open_model
from adaptok.cli.drawing import choose_device
from adaptok.cli.terminal import err, out, show_progress
from adaptok.compiling import compile as compile_adaptive
from adaptok.counting import count_operations
from adaptok.errors import BudgetError
from adaptok.hosts import HostInputs
from adaptok.measure.planner import Plan, describe_answer
from adaptok.measure.planner import plan as plan_budget
from adaptok.measure.subjects import Subject, WrappedSubject, open_subject
from adaptok.probing import undisturbed
from adaptok.storage import save_json
from adaptok.time_curves import CurvePoint, show_ms

VERSION = 1  # of the JSON


@dataclass(frozen=True, slots=True)
class Planning(Measuring):
    """What a person asked for; see `adaptok plan --help`."""

    target_ms: float | None = None
    keep: float | None = None
    points: int = 5


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What one measured budget costs; operations never stand without their time.

    Args:
        name: the budget in words, or the plain model.
        keep: share of the cells that is kept.
        tokens: cells that are kept.
        ms: milliseconds of a call.
        spread: from the first to the third quartile, as a fraction of the median.
        gflops: counted operations of a call, 10^9.
    """

    name: str
    keep: float
    tokens: int
    ms: float
    spread: float
    gflops: float


def run_plan(asked: Planning) -> None:
    """Plan as a person asked on the command line.

    Args:
        asked: the options.

    Raises:
        AdaptokError: an option is wrong, the model does not run with it, or the time is out of
            reach.
    """
    check_wish(asked)
    asked.check_dtype()
    device = choose_device(asked.device)
    with limit_threads(asked.threads), naming_package():
        model, inputs = open_model(asked, device)
        if asked.compile:
            compile_adaptive(model)
        with show_elapsed("measuring budgets in turns"):
            found = plan_budget(
                model,
                inputs,
                target_ms=asked.target_ms,
                keep=asked.keep,
                repeats=asked.repeats,
                points=asked.points,
            )
        rows = list_rows(model, inputs, found)
    if asked.json == STDOUT:
        typer.echo(json.dumps(describe_plan(asked, found, rows), indent=2))
        return
    typer.echo("\n".join(write_plan(found, rows)))  # as text, without markup or wrapping
    if asked.json is not None:
        save_json(asked.json, describe_plan(asked, found, rows))
        out.print(f"plan: {asked.json}", soft_wrap=True)


def check_wish(asked: Planning) -> None:
    """Raise a `BudgetError` for a wish that no model can meet, before one is made."""
    if asked.target_ms is not None and asked.keep is not None:
        raise BudgetError("--target-ms and --keep exclude each other: give one of them")
    if asked.target_ms is not None:
        check_target(asked.target_ms)
    if asked.keep is not None:
        check_amount("keep", asked.keep)


@contextmanager
def show_elapsed(description: str) -> Iterator[None]:
    """Show that something is going on, and since when; how long it takes is not known before."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        progress.add_task(description, total=None)
        yield


def list_rows(model: nn.Module, inputs: HostInputs, found: Plan) -> list[PlanRow]:
    """Count the operations of what was measured, the plain model first.

    Args:
        model: the model that was measured.
        inputs: what it is called with.
        found: the measured times.

    Returns:
        One row per measured budget.
    """
    subject = open_subject(model, inputs)
    sides: list[tuple[str, CurvePoint, Callable[[], AbstractContextManager[object]]]] = []
    if found.plain is not None and isinstance(subject, WrappedSubject):
        sides.append(("plain model", found.plain, subject.run_full))
    sides += [
        (f"keep={point.keep:.3g}", point, partial(budgeted, model, keep=point.keep))
        for point in reversed(found.points)
    ]
    rows = []
    with show_progress("counting operations", len(sides)) as bar:
        for done, (name, point, around) in enumerate(sides):
            tokens = round(point.keep * found.shape.num_cells)
            with around():
                gflops = count_gflops(subject)
            rows.append(PlanRow(name, point.keep, tokens, point.ms, point.spread, gflops))
            bar.move_to(done + 1, len(sides))
    return rows


def count_gflops(subject: Subject) -> float:
    """Count the operations of one call."""
    with undisturbed(subject.model), torch.no_grad(), count_operations() as counter:
        subject.call(subject.model)
    return int(counter.get_total_flops()) / 1e9


def write_plan(found: Plan, rows: Sequence[PlanRow]) -> list[str]:
    """Return what a person reads: the answer, the figures, and what does not pay."""
    first = rows[0]
    head = ["", "tokens", "ms", "spread", "GFLOPs", "time", "FLOPs"]
    table = [head] + [
        [
            row.name,
            str(row.tokens),
            f"{row.ms:.4g}",
            f"{row.spread:.0%}",
            f"{row.gflops:.3g}",
            f"{row.ms / first.ms:.2f}",
            f"{row.gflops / first.gflops:.2f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[place]) for line in table) for place in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    ]
    return [
        f"{describe_answer(found)}.",
        "",
        *lines,
        "",
        f"columns time and FLOPs: a whole call, by the first row; {found.shape.describe()}",
        f"medians of {found.repeats} calls in turns; {found.machine}",
        *(f"{stage}." for stage in found.stages),
        *list_losses(found),
    ]


def list_losses(found: Plan) -> list[str]:
    """Say what does not pay, in a sentence each; nothing if all of it pays."""
    lines = [
        f"{name} does not pay here: in Python, Plan.apply(model) lets it step aside."
        for name in found.losing
    ]
    if found.pays is False and found.plain is not None:
        if found.expected_ms is None:
            lines.append("No budget pays here: run the plain model.")
        else:
            assert found.keep is not None
            lines.append(
                f"keep={found.keep:.3g} does not pay here: it takes {show_ms(found.expected_ms)}, "
                f"and the plain model {show_ms(found.plain.ms)}."
            )
    return lines


def describe_plan(asked: Planning, found: Plan, rows: Sequence[PlanRow]) -> dict[str, Any]:
    """Return a plan as plain values, for JSON.

    Args:
        asked: the options.
        found: the plan.
        rows: figures of each measured budget.

    Returns:
        The values; None where there is nothing to say.
    """
    return {
        "version": VERSION,
        "model": asked.model,
        "target_ms": found.target_ms,
        "keep": found.keep,
        "expected_ms": found.expected_ms,
        "spread": found.spread,
        "plain_ms": found.plain_ms,
        "overhead_ms": found.overhead_ms,
        "break_even": found.break_even,
        "pays": found.pays,
        "losing": list(found.losing),
        "stages": [asdict(stage) for stage in found.stages],
        "rows": [asdict(row) for row in rows],
        "shape": asdict(found.shape),
        "repeats": found.repeats,
        "machine": found.machine,
    }
