"""Curves over diffusion time and over training steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from adaptok.errors import ShapeError
from adaptok.see.canvas import (
    COLOURS,
    INK,
    LINE,
    QUIET,
    SMALL,
    TEXT,
    TITLE,
    make_canvas,
)

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

SIZE = (1120, 640)
PANEL = (112, 124, 968, 412)  # left, top, width, height


@dataclass(frozen=True, slots=True, eq=False)
class KeptCurve:
    """How many cells were kept on the way from noise to an image.

    Args:
        name: the budget in words.
        noise: fraction of the diffusion time at each step, 1 is pure noise.
        kept: kept fraction of the cells by step and sample, `(s b)`.

    Raises:
        ShapeError: steps and fractions do not fit each other.
    """

    name: str
    noise: tuple[float, ...]
    kept: Float[np.ndarray, "s b"]

    def __post_init__(self) -> None:
        if self.kept.ndim != 2 or self.kept.shape[0] != len(self.noise) or not self.kept.size:
            raise ShapeError(
                f"a curve needs kept fractions of shape (steps, samples), got {self.kept.shape} "
                f"for {len(self.noise)} steps"
            )

    def mean_between(self, low: float, high: float) -> float | None:
        """Return the mean kept fraction at noise levels in [low, high], None without a step."""
        chosen = [low <= noise <= high for noise in self.noise]
        return float(self.kept[chosen].mean()) if any(chosen) else None


def draw_kept_by_time(
    curves: Sequence[KeptCurve],
    *,
    target: float | None = None,
    title: str = "How many cells are kept, from noise to image",
) -> "matplotlib.figure.Figure":
    """Draw the kept fraction along the trajectory, mean and spread over the samples.

    Args:
        curves: one per budget.
        target: the kept fraction that training aimed at, drawn as a dotted line.
        title: headline.

    Returns:
        The figure, with one axes.

    Raises:
        ShapeError: there is no curve.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> curve = KeptCurve("drop 0", (1.0, 0.5), np.array([[0.2, 0.3], [0.3, 0.5]]))
        >>> draw_kept_by_time([curve]).axes[0].get_xlabel()[:11]
        'noise level'
    """
    if not curves:
        raise ShapeError("kept fractions by time need at least one curve")
    canvas = make_canvas(*SIZE)
    canvas.text(28, 22, title, size=TITLE, bold=True)
    canvas.text(
        28,
        59,
        "line: mean over the samples   ·   band: one standard deviation",
        size=SMALL,
        colour=QUIET,
    )
    axes = canvas.axes(*PANEL)
    for curve, colour in zip(curves, COLOURS * len(curves), strict=False):
        mean, spread = curve.kept.mean(1), curve.kept.std(1)
        axes.fill_between(
            curve.noise, mean - spread, mean + spread, color=colour, alpha=0.16, linewidth=0
        )
        axes.plot(
            curve.noise,
            mean,
            color=colour,
            linewidth=1.8,
            marker="o",
            markersize=3,
            label=curve.name,
        )
    if target is not None:
        axes.axhline(
            target,
            color=QUIET,
            linewidth=1.2,
            linestyle=(0, (1, 2)),
            zorder=1,
            label=f"training target {target:.0%}",
        )
    axes.set_xlim(1, 0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(
        "noise level   (sampling goes from left, pure noise, to right, a clean image)",
        fontsize=TEXT,
        color=INK,
    )
    axes.set_ylabel("kept fraction of the cells", fontsize=TEXT, color=INK)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.yaxis.set_major_formatter("{x:.0%}")
    finish_axes(axes)
    axes.legend(
        fontsize=TEXT,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(curves) + 1,
        borderaxespad=0.2,
        handlelength=1.6,
    )
    return canvas.figure


def draw_loss(
    steps: Sequence[int],
    losses: Sequence[float],
    *,
    smooth: int = 9,
    title: str = "Loss of a few training steps",
) -> "matplotlib.figure.Figure":
    """Draw a training loss, as it came and smoothed.

    Args:
        steps: step of each loss.
        losses: the losses.
        smooth: how many steps the running mean sees.
        title: headline.

    Returns:
        The figure, with one axes.

    Raises:
        ShapeError: there is no loss, or not one per step.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> len(draw_loss([1, 2, 3], [0.9, 0.5, 0.4]).axes[0].lines)
        2
    """
    if not len(losses) or len(steps) != len(losses):
        raise ShapeError(f"a curve needs one loss per step, got {len(losses)} for {len(steps)}")
    canvas = make_canvas(*SIZE)
    canvas.text(28, 22, title, size=TITLE, bold=True)
    axes = canvas.axes(PANEL[0], PANEL[1] - 44, PANEL[2], PANEL[3] + 44)
    axes.plot(steps, losses, color=COLOURS[0], alpha=0.35, linewidth=1, label="each step")
    axes.plot(
        steps,
        running_mean(losses, smooth),
        color=COLOURS[0],
        linewidth=2,
        label=f"mean of the last {smooth} steps",
    )
    axes.set_xlim(min(steps), max(steps) if len(steps) > 1 else min(steps) + 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step", fontsize=TEXT, color=INK)
    axes.set_ylabel("loss", fontsize=TEXT, color=INK)
    finish_axes(axes)
    axes.legend(fontsize=TEXT, frameon=False, loc="upper right")
    return canvas.figure


def running_mean(values: Sequence[float], window: int) -> Float[np.ndarray, " n"]:
    """Return the mean of the last `window` values at each place, of fewer at the start."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    mean: Float[np.ndarray, " n"] = (sums[ends] - sums[starts]) / (ends - starts)
    return mean


def finish_axes(axes: "matplotlib.axes.Axes") -> None:
    """Give axes a quiet look: a light grid, no box."""
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=TEXT, colors=QUIET, length=3)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(LINE)
