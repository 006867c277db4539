"""How deep samples went, and which steps of which samples were reused."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from adaptok.errors import ShapeError
from adaptok.see.canvas import (
    COLOURS,
    INK,
    LINE,
    MAP_COLOURS,
    QUIET,
    SMALL,
    TEXT,
    TITLE,
    frame_image,
    make_canvas,
)
from adaptok.see.cells import read_image
from adaptok.see.curves import finish_axes
from adaptok.tracing import Trace

if TYPE_CHECKING:
    import matplotlib.figure

FADED = "#dfe3ea"
MARGIN, HEAD, NAMES, ROW, GAP = 28, 96, 170, 52, 6
WIDE = 800


def show_depths(
    trace: Trace, *, blocks: int | None = None, title: str = "How deep samples go"
) -> "matplotlib.figure.Figure":
    """Draw in front of which block samples leave.

    Args:
        trace: of a model with a stage that leaves early.
        blocks: number of blocks of the model; None takes the deepest that was seen.
        title: headline.

    Returns:
        The figure, with one axes: for one step how many samples leave in front of each block, for
        several a field of steps and samples whose colour is the depth, and its colour bar.

    Raises:
        ShapeError: no stage of the trace told how deep samples went.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> import adaptok, torch
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=[{"name": "exit", "threshold": 0.2}])
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(torch.randn(4, 3, 32, 48))
        >>> show_depths(seen).axes[0].get_xlabel()
        'left in front of block'
    """
    told = [step.depths for step in trace.steps if step.depths is not None]
    if not told or len(told) != len(trace.steps) or len({len(row) for row in told}) > 1:
        raise ShapeError(
            "a picture of depths needs a trace in which each step says how deep its samples went: "
            'wrap the model with stack=["exit"] or stack=["schedule"]'
        )
    depths: Int[np.ndarray, "s b"] = np.stack([row.cpu().numpy() for row in told])
    most = int(depths.max()) if blocks is None else blocks
    canvas = make_canvas(1000, 520)
    canvas.text(MARGIN, 16, title, size=TITLE, bold=True)
    early = (depths < most).mean()
    words = (
        f"{early:.0%} leave early; {depths.clip(min=0).mean():.1f} of {most} blocks run on average"
    )
    canvas.text(MARGIN, 50, words, size=SMALL, colour=QUIET)
    if len(depths) == 1:
        draw_histogram(canvas.axes(100, HEAD, 860, 340), depths[0], most)
        return canvas.figure
    axes = canvas.axes(100, HEAD, 780, 340)
    shown = axes.imshow(
        depths.T.clip(min=0), aspect="auto", vmin=0, vmax=most, cmap=MAP_COLOURS,
        interpolation="nearest",
    )  # fmt: skip
    axes.set_xlabel("step", fontsize=TEXT, color=INK)
    axes.set_ylabel("sample", fontsize=TEXT, color=INK)
    axes.locator_params(integer=True)
    axes.tick_params(labelsize=SMALL, colors=QUIET, length=2)
    for spine in axes.spines.values():
        spine.set_color(LINE)
    bar = canvas.figure.colorbar(shown, cax=canvas.axes(900, HEAD, 14, 340))
    bar.set_label("blocks that ran", fontsize=SMALL, color=QUIET)
    bar.outline.set_edgecolor(LINE)
    bar.ax.tick_params(labelsize=SMALL, colors=QUIET, length=2)
    return canvas.figure


def draw_histogram(axes: object, depths: Int[np.ndarray, " b"], most: int) -> None:
    """Draw how many samples left in front of each block."""
    counts = np.bincount(depths.clip(min=0), minlength=most + 1)
    colours = [COLOURS[0]] * most + [QUIET] * (len(counts) - most)
    bars = axes.bar(range(len(counts)), counts, color=colours, width=0.8)  # type: ignore[attr-defined]
    for place, (bar, count) in enumerate(zip(bars, counts, strict=True)):
        if count:
            axes.annotate(  # type: ignore[attr-defined]
                f"{count}" + ("\nran all" if place == most else ""),
                (bar.get_x() + bar.get_width() / 2, count),
                ha="center", va="bottom", fontsize=SMALL, color=INK,
            )  # fmt: skip
    axes.set_xticks(range(len(counts)))  # type: ignore[attr-defined]
    axes.set_ylim(0, 1.2 * counts.max())  # type: ignore[attr-defined]
    axes.set_xlabel("left in front of block", fontsize=TEXT, color=INK)  # type: ignore[attr-defined]
    axes.set_ylabel("samples", fontsize=TEXT, color=INK)  # type: ignore[attr-defined]
    finish_axes(axes)  # type: ignore[arg-type]


def read_reuse(trace: Trace) -> list[list[bool]]:
    """Return for each step of a trace, for each sample, whether it was computed.

    Args:
        trace: of a model with a stage that reuses steps.

    Raises:
        ShapeError: no stage told of it.
    """
    steps = [step.reused for step in trace.steps]
    if any(reused is None for reused in steps):
        raise ShapeError(
            "a picture of reused steps needs a trace of a model with a stage that reuses steps, "
            'such as adaptok.wrap(dit, stack=["teacache"])'
        )
    return [(~reused).tolist() for reused in steps if reused is not None]


def show_reuse(
    computed: "Trace | Sequence[Sequence[bool]] | Bool[np.ndarray, 's b']",
    *,
    names: Sequence[str] = (),
    images: Shaped[Tensor, "b 3 h w"] | None = None,
    title: str = "Which steps are computed, sample by sample",
) -> "matplotlib.figure.Figure":
    """Draw which steps of which samples were computed, and which reused an earlier one.

    Args:
        computed: a trace of all steps; or for each step, for each sample, whether it was computed.
        names: what each sample is.
        images: what each sample became, uint8 or floats in [0, 1].
        title: headline.

    Returns:
        The figure: the legend's two axes, and for each sample its image, if there are any, and its
        row of steps.

    Raises:
        ShapeError: there is no step, no stage reuses steps, or the steps are of different batches.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> len(show_reuse([(True, True), (True, False)], names=["cat", "dog"]).axes)
        4
    """
    if isinstance(computed, Trace):
        computed = read_reuse(computed)
    if not len(computed) or len({len(step) for step in computed}) > 1 or not len(computed[0]):
        raise ShapeError("a picture of reused steps needs a flag for each sample in each step")
    flags = np.array(computed, dtype=bool)
    steps, b = flags.shape
    left = MARGIN + (NAMES if names else 0) + (ROW + 12 if images is not None else 0)
    canvas = make_canvas(left + WIDE + 100, HEAD + b * (ROW + GAP) + 40)
    canvas.text(MARGIN, 16, title, size=TITLE, bold=True)
    said = f"{flags.mean():.0%} of the steps of all samples are computed"
    canvas.text(MARGIN, 58, said, size=SMALL, colour=QUIET, anchor="center")
    for place, (colour, word) in enumerate(((COLOURS[0], "computed"), (FADED, "reused"))):
        at = left + WIDE - 250 + 130 * place
        swatch = canvas.axes(at, 48, 20, 20)
        swatch.set_facecolor(colour)
        frame_image(swatch)
        canvas.text(at + 28, 58, word, size=SMALL, anchor="center")
    for sample in range(b):
        top = HEAD + sample * (ROW + GAP)
        if names:
            canvas.text(MARGIN, top + ROW / 2, names[sample], size=SMALL, anchor="center")
        if images is not None:
            canvas.image(left - ROW - 12, top, (ROW, ROW), read_image(images, sample))
        axes = canvas.axes(left, top + 10, WIDE, ROW - 20)
        colours = [COLOURS[0] if ran else FADED for ran in flags[:, sample]]
        axes.bar(np.arange(steps) + 0.5, 1, width=0.86, color=colours)
        axes.set_xlim(0, steps)
        axes.set_ylim(0, 1)
        frame_image(axes)
        for spine in axes.spines.values():
            spine.set_color(LINE)
            spine.set_visible(False)
        share = f"{flags[:, sample].sum()} of {steps}"
        canvas.text(left + WIDE + 10, top + ROW / 2, share, size=SMALL, anchor="center")
    canvas.text(left, HEAD + b * (ROW + GAP) + 4, "first step", size=SMALL, colour=QUIET)
    canvas.text(
        left + WIDE, HEAD + b * (ROW + GAP) + 4, "last step", size=SMALL, colour=QUIET,
        align="right",
    )  # fmt: skip
    return canvas.figure
