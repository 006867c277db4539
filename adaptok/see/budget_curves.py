"""What quality costs: agreement or distance against tokens, FLOPs and measured time."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptok.errors import ShapeError
from adaptok.measure.report import BenchmarkReport
from adaptok.optional import import_optional
from adaptok.see.canvas import COLOURS, INK, QUIET, SMALL, TEXT, TITLE, Canvas, make_canvas
from adaptok.see.curves import finish_axes

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

SIZE = (1240, 560)
LEFT, TOP, PANEL, HIGH, APART = 152, 140, 332, 330, 30
EDGE = 16  # pixels that stay free at the left of the label
MARKERS = "osD^vPX"
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


@dataclass(frozen=True, slots=True)
class CostPoint:
    """One budget: what it costs, and how good it is.

    Args:
        name: the budget in words.
        tokens: tokens that run per sample, mean.
        gflops: of a call for one sample.
        ms: measured milliseconds of the same call for one sample.
        value: how good it is, such as agreement or a distance.
        spread: half the width of an interval around `value`; 0 draws none.
    """

    name: str
    tokens: float
    gflops: float
    ms: float
    value: float
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class CostCurve:
    """The budgets of one method.

    Args:
        name: the method.
        points: one per budget.
        floor: draw it grey, as something that every other method has to beat.
    """

    name: str
    points: tuple[CostPoint, ...]
    floor: bool = False


def read_curve(name: str, report: BenchmarkReport) -> CostCurve:
    """Return the agreement of a benchmark's budgets with its baseline, by cost of a sample.

    Args:
        name: the method.
        report: what `adaptok.benchmark` found.

    Raises:
        ShapeError: the outputs cannot be compared, so that there is nothing to draw.
    """
    points = [
        CostPoint(
            row.name,
            row.computed.mean,
            row.gflops / report.batch,
            row.ms / report.batch,
            row.cosine,
        )
        for row in report.rows
        if row.cosine is not None and row.computed is not None
    ]
    if not points:
        raise ShapeError(f"no budget of {name!r} has outputs that can be compared")
    return CostCurve(name, tuple(points))


def show_budgets(
    curves: Sequence[CostCurve] | Mapping[str, BenchmarkReport],
    *,
    quality: str = "agreement (cosine with the unwrapped model)",
    higher_is_better: bool = True,
    title: str = "What quality costs: tokens, FLOPs and measured time",
    note: str = "",
) -> "matplotlib.figure.Figure":
    """Draw how good each budget is against its tokens, its FLOPs and its measured time.

    All three are always drawn: saved FLOPs that save no time are seen as such.

    Args:
        curves: one per method, or what `adaptok.benchmark` found, by the names of the methods.
        quality: what `value` is.
        higher_is_better: whether more of it is better; said at the axis.
        title: headline.
        note: where and how it was measured.

    Returns:
        The figure, with three axes: tokens, GFLOPs, milliseconds.

    Raises:
        ShapeError: there is no curve, or one without points.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> points = (CostPoint("1", 64, 2.0, 9.0, 1.0), CostPoint("0.5", 32, 1.0, 6.0, 0.9))
        >>> [axes.get_xlabel() for axes in show_budgets([CostCurve("dc", points)]).axes]
        ['tokens', 'GFLOPs', 'ms']
    """
    if isinstance(curves, Mapping):
        if not note and curves:
            first = next(iter(curves.values()))
            note = f"one sample of a batch of {first.batch}; {first.machine.name}, medians"
        curves = [read_curve(name, report) for name, report in curves.items()]
    if not curves or not all(curve.points for curve in curves):
        raise ShapeError("a picture of budgets needs at least one curve with at least one point")
    rows = -(-len(curves) // 5)
    canvas = make_canvas(SIZE[0], SIZE[1] + 26 * (rows - 1))
    canvas.text(28, 16, title, size=TITLE, bold=True)
    canvas.text(28, 50, note, size=SMALL, colour=QUIET)
    top = TOP + 26 * (rows - 1)
    panels = []
    for place, (cost, unit) in enumerate((("tokens", ""), ("gflops", "GFLOPs"), ("ms", "ms"))):
        axes = canvas.axes(LEFT + place * (PANEL + APART), top, PANEL, HIGH)
        for number, curve in enumerate(curves):
            points = sorted(curve.points, key=lambda point: getattr(point, cost))
            axes.errorbar(
                [getattr(point, cost) for point in points],
                [point.value for point in points],
                yerr=[point.spread for point in points] if any(p.spread for p in points) else None,
                color=QUIET if curve.floor else COLOURS[number % len(COLOURS)],
                linestyle=STYLES[number // len(COLOURS) % len(STYLES)],
                linewidth=1.2 if curve.floor else 1.8,
                marker=MARKERS[number % len(MARKERS)],
                markersize=4.5,
                capsize=3,
                label=curve.name,
            )
        panels.append(axes)
        axes.set_xlim(left=0)
        axes.set_xlabel(unit or "tokens", fontsize=TEXT, color=INK)
        finish_axes(axes)
        axes.grid(axis="x", color="#e6e9ef", linewidth=0.6)
        if place == 0:
            axes.yaxis.set_major_formatter(write_number)
            arrow = "higher" if higher_is_better else "lower"
            axes.set_ylabel(
                f"{textwrap.fill(quality, 30)}\n{arrow} is better", fontsize=TEXT, color=INK
            )
            axes.legend(
                fontsize=SMALL, frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0),
                ncols=5, borderaxespad=0.2, handlelength=2.4,
            )  # fmt: skip
        else:
            axes.set_yticklabels([])
            axes.set_ylim(canvas.figure.axes[0].get_ylim())
    make_room(canvas, panels)
    return canvas.figure


def write_number(value: float, _: float | None = None) -> str:
    """Write a number at an axis whole: a factor of all numbers would stand where the legend is."""
    return f"{value:.6g}".replace("-", "\N{MINUS SIGN}")


def make_room(canvas: Canvas, panels: Sequence["matplotlib.axes.Axes"]) -> None:
    """Move panels to the right, and make them narrower, where the label of the first is cut.

    Args:
        canvas: the figure.
        panels: side by side, with one label at the left of the first.
    """
    agg = import_optional("matplotlib.backends.backend_agg", extra="see")
    box = panels[0].yaxis.get_tightbbox(agg.FigureCanvasAgg(canvas.figure).get_renderer())
    if box is None or box.x0 >= EDGE:
        return
    missing = EDGE - box.x0
    width = PANEL - missing / len(panels)
    for place, axes in enumerate(panels):
        _, bottom, _, height = axes.get_position().bounds
        left = LEFT + missing + place * (width + APART)
        axes.set_position((left / canvas.width, bottom, width / canvas.width, height))
