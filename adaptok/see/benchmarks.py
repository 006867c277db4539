"""What budgets cost: time and operations against kept tokens, and agreement below."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adaptok.measure.report import BenchmarkReport, BenchmarkRow
from adaptok.see.canvas import COLOURS, INK, QUIET, SMALL, TEXT, TITLE, make_canvas
from adaptok.see.curves import finish_axes

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

SIZE = (1120, 900)
COSTS = (112, 128, 968, 416)  # left, top, width, height
AGREEMENT = (112, 600, 968, 224)
LABEL = 21.0  # height of two lines of a label in points
ROOM = 0.09  # labels closer than this share of the axis are stacked
TIME, FLOPS, COSINE = COLOURS[1], COLOURS[0], COLOURS[2]


def draw_benchmark(report: BenchmarkReport, *, title: str = "") -> "matplotlib.figure.Figure":
    """Draw time and FLOPs relative to the baseline against kept tokens, and agreement.

    Args:
        report: what `adaptok.benchmark` found.
        title: headline; empty says what pays best.

    Returns:
        The figure, with two axes.

    Raises:
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> import adaptok, torch
        >>> from adaptok.measure import benchmark
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> report = benchmark(vit, torch.randn(2, 3, 32, 48), budgets=[1.0, 0.5], repeats=2)
        >>> [axes.get_ylabel() for axes in draw_benchmark(report).axes]
        ['relative to the baseline', 'agreement']
    """
    rows = sorted(report.rows, key=kept_of)
    canvas = make_canvas(*SIZE)
    canvas.text(28, 20, title or head(report), size=TITLE, bold=True)
    canvas.text(28, 58, "\n".join(describe_run(report)), size=SMALL, colour=QUIET)
    costs, agreement = canvas.axes(*COSTS), canvas.axes(*AGREEMENT)
    draw_costs(costs, rows, report.base)
    draw_agreement(agreement, rows)
    widest = max(report.cells, *(kept_of(row) for row in rows))
    for axes in (costs, agreement):
        axes.set_xlim(0, 1.04 * widest)
        finish_axes(axes)
    costs.set_xticklabels([])
    agreement.set_xlabel(
        f"tokens that run per sample, mean   ({report.cells} cells)", fontsize=TEXT, color=INK
    )
    return canvas.figure


def draw_costs(
    axes: "matplotlib.axes.Axes", rows: Sequence[BenchmarkRow], base: BenchmarkRow
) -> None:
    """Draw relative time with its quartiles, and relative operations."""
    kept = [kept_of(row) for row in rows]
    spread = (base.first_ms / base.ms, base.third_ms / base.ms)
    axes.axhspan(*spread, color=QUIET, alpha=0.14, linewidth=0, label="baseline, quartiles")
    axes.axhline(1, color=QUIET, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
    if base.gflops > 0:
        axes.plot(
            kept,
            [row.gflops / base.gflops for row in rows],
            color=FLOPS,
            linewidth=1.8,
            linestyle=(0, (4, 2)),
            marker="s",
            markersize=5,
            label="FLOPs",
        )
    bars = [[row.ms - row.first_ms for row in rows], [row.third_ms - row.ms for row in rows]]
    axes.errorbar(
        kept,
        [row.ms / base.ms for row in rows],
        yerr=[[length / base.ms for length in side] for side in bars],
        color=TIME,
        linewidth=1.8,
        marker="o",
        markersize=5,
        capsize=4,
        label="time, median and quartiles",
    )
    tops = [max(row.third_ms / base.ms, relative_flops(row, base)) for row in rows]
    levels = stack_labels(kept)
    axes.set_ylim(0, (1.16 + 0.11 * max(levels)) * max(1.0, spread[1], *tops))
    for row, x, top, level in zip(rows, kept, tops, levels, strict=True):
        axes.annotate(
            f"{row.name}\n{row.ms:.3g} ms",
            (x, top),
            xytext=(0, 5 + LABEL * level),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=SMALL,
            color=INK,
        )
    axes.set_ylabel("relative to the baseline", fontsize=TEXT, color=INK)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(fontsize=TEXT, frameon=False, loc="lower right", handlelength=2.6)


def draw_agreement(axes: "matplotlib.axes.Axes", rows: Sequence[BenchmarkRow]) -> None:
    """Draw the cosine with the baseline's outputs."""
    known = [(kept_of(row), row.cosine) for row in rows if row.cosine is not None]
    axes.set_ylabel("agreement", fontsize=TEXT, color=INK)
    if not known:
        axes.text(
            0.5,
            0.5,
            "the outputs cannot be compared: they do not vary, or differ in shape",
            ha="center",
            va="center",
            transform=axes.transAxes,
            fontsize=TEXT,
            color=QUIET,
        )
        return
    axes.plot(
        [x for x, _ in known],
        [y for _, y in known],
        color=COSINE,
        linewidth=1.8,
        marker="D",
        markersize=4.5,
        label="cosine with the baseline's outputs",
    )
    axes.set_ylim(min(0.0, *(y for _, y in known)) - 0.02, 1.08)
    axes.legend(fontsize=TEXT, frameon=False, loc="lower right", handlelength=2.6)


def stack_labels(places: Sequence[float]) -> list[int]:
    """Return how many labels lie below each, so that none covers its left neighbour.

    Example:
        >>> stack_labels([2, 3, 100, 101, 104])
        [0, 1, 0, 1, 2]
    """
    room = ROOM * max(places)
    levels: list[int] = []
    for index, place in enumerate(places):
        close = index > 0 and place - places[index - 1] < room
        levels.append(levels[-1] + 1 if close else 0)
    return levels


def kept_of(row: BenchmarkRow) -> float:
    """Return the tokens that ran, mean over the samples."""
    assert row.computed is not None  # only a baseline has none
    return row.computed.mean


def relative_flops(row: BenchmarkRow, base: BenchmarkRow) -> float:
    """Return the operations of a row by those of the baseline, 0 if those are not known."""
    return row.gflops / base.gflops if base.gflops > 0 else 0.0


def head(report: BenchmarkReport) -> str:
    """Say in one line what the cheapest budget saves."""
    best = min(report.rows, key=lambda row: row.ms)
    if best.saved_time is None or best.saved_flops is None:
        return report.model.rpartition(".")[2]
    if best.is_faster(report.base):
        return (
            f"{best.name} saves {100 * best.saved_flops:.0f} % of the FLOPs and "
            f"{100 * best.saved_time:.0f} % of the time"
        )
    return "No budget saves time here"


def describe_run(report: BenchmarkReport) -> list[str]:
    """Say in two lines what was measured and where."""
    machine = report.machine
    form = "compiled" if report.compiled else "eager"
    return [
        f"{report.model.rpartition('.')[2]}, batch {report.batch}, {form}, {report.precision}; "
        f"{machine.device}: {machine.name}, {count_threads(machine.threads)}, torch "
        f"{machine.torch}",
        f"baseline: {report.base.name}, {report.base.ms:.4g} ms, {report.base.gflops:.3g} GFLOPs; "
        f"medians of {report.repeats} interleaved rounds",
    ]


def count_threads(threads: int) -> str:
    """Say how many threads there are."""
    return f"{threads} thread{'s' if threads != 1 else ''}"
