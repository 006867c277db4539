"""Strips along a trajectory: what the model was given, which cells it kept, and how many."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Shaped
from torch import Tensor

from adaptok.errors import ShapeError
from adaptok.see.canvas import COLOURS, INK, QUIET, SMALL, TEXT, TITLE, fit_box, make_canvas
from adaptok.see.cells import flat_grid, paint_groups, read_image, shade_cells
from adaptok.see.curves import finish_axes
from adaptok.see.following import follow_stages, represents_itself
from adaptok.see.panels import Panel, draw_cells
from adaptok.see.token_maps import is_whole
from adaptok.trace_step import TraceStep
from adaptok.tracing import Trace

if TYPE_CHECKING:
    import matplotlib.figure

MARGIN, GAP, LABELS, BOX, BETWEEN, CHART, HEAD, FOOT = 28, 8, 180, 128, 30, 150, 92, 62
LONGEST = 12  # steps beside each other


def show_trajectory(
    trace: Trace,
    images: Sequence[Shaped[Tensor, "*b 3 h w"]],
    *,
    samples: Sequence[int] = (0,),
    names: Sequence[str] = (),
    count: int = 7,
    title: str = "Which cells are kept, from noise to image",
) -> "matplotlib.figure.Figure":
    """Draw the way from noise to image: input, kept cells, and the kept share of all samples.

    Args:
        trace: of a whole sampling run, one step per model call.
        images: what the model was given in each step, noise first: a batch each, uint8 or floats
            in [0, 1].
        samples: which samples get a strip.
        names: what these samples show.
        count: how many steps to show, at most; evenly from the first to the last.
        title: headline.

    Returns:
        The figure: two axes per sample and shown step (input, then map), sample by sample, and
        the chart of kept shares.

    Raises:
        ShapeError: steps and images do not fit each other, or there is no such sample.
        DtypeError: the images have no pixels that can be shown.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> import adaptok, torch
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> images = [torch.rand(2, 3, 32, 48) for _ in range(3)]
        >>> with adaptok.trace(vit) as seen:
        ...     for image in images:
        ...         out = vit(image)
        >>> len(show_trajectory(seen, images, samples=[0, 1]).axes)
        13
    """
    steps = trace.steps
    if not steps or len(images) != len(steps):
        raise ShapeError(
            f"a trajectory needs the images of each step, got {len(images)} for {len(steps)} steps"
        )
    shares = share_by_step(steps)
    wrong = [sample for sample in samples if not -shares.shape[1] <= sample < shares.shape[1]]
    if wrong or not samples:
        raise ShapeError(f"there are {shares.shape[1]} samples in this trace, got {list(samples)}")
    last, most = len(steps) - 1, max(2, min(count, LONGEST))
    chosen = sorted({round(part * last / (most - 1)) for part in range(most)})
    h, w = images[0].shape[-2:]
    box = fit_box(h, w, BOX)
    wide = len(chosen) * (box[0] + GAP) - GAP
    deep = 2 * (box[1] + GAP) + BETWEEN
    left, below = MARGIN + LABELS, HEAD + len(samples) * deep
    canvas = make_canvas(max(820, left + wide + MARGIN), below + CHART + FOOT + BETWEEN)
    canvas.text(MARGIN, 16, title, size=TITLE, bold=True)
    canvas.text(
        MARGIN, 48, "cells that are not kept are dark; the share of kept cells stands below",
        size=SMALL, colour=QUIET,
    )  # fmt: skip
    for row, sample in enumerate(samples):
        top = HEAD + row * deep
        name = names[row] if row < len(names) else f"sample {sample}"
        words = f"{name}\nwhat the model\nis given"
        canvas.text(MARGIN, top + box[1] / 2, words, anchor="center", size=SMALL)
        middle = top + 1.5 * box[1] + GAP
        canvas.text(MARGIN, middle, "cells that it keeps", anchor="center", size=SMALL)
        for column, number in enumerate(chosen):
            at = left + column * (box[0] + GAP)
            pixels = read_image(images[number], sample)
            canvas.image(at, top, box, pixels)
            panel = map_step(steps[number], pixels, sample)
            draw_cells(canvas, (at, top + box[1] + GAP), box, panel)
            canvas.text(
                at + box[0] / 2, top + 2 * (box[1] + GAP) + 8, f"{shares[number, sample]:.0%}",
                size=SMALL, colour=QUIET, align="center", anchor="center",
            )  # fmt: skip
    axes = canvas.axes(left, below + BETWEEN, wide, CHART)
    # the first and last point stand below the first and last picture
    for sample in range(shares.shape[1]):
        strip = list(samples).index(sample) if sample in samples else None
        axes.plot(
            range(len(steps)),
            shares[:, sample],
            color=QUIET if strip is None else COLOURS[strip % len(COLOURS)],
            alpha=0.35 if strip is None else 1.0,
            linewidth=1.0 if strip is None else 1.8,
            marker=None if strip is None else "o",
            markersize=3,
            label=None if strip is None else names[strip] if strip < len(names)
            else f"sample {sample}",
        )  # fmt: skip
    spare = 0.5 * box[0] * last / max(1, wide - box[0])
    axes.set_xlim(-spare, last + spare) if last else axes.set_xlim(-1, 1)
    axes.set_ylim(0, 1.12 * max(0.05, float(shares.max())))
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("step   (noise at the left, the image at the right)", fontsize=TEXT, color=INK)
    axes.set_ylabel("kept share", fontsize=TEXT, color=INK)
    finish_axes(axes)
    axes.legend(fontsize=SMALL, frameon=False, loc="best")
    return canvas.figure


def share_by_step(steps: Sequence[TraceStep]) -> Float[np.ndarray, "s b"]:
    """Return the share of the cells that were computed, by step and sample.

    Raises:
        ShapeError: the steps are of different batches.
    """
    kept = [step.kept.float().cpu() / step.provenance.token.shape[1] for step in steps]
    if len({len(row) for row in kept}) > 1:
        raise ShapeError("the steps of this trace have different numbers of samples")
    shares: Float[np.ndarray, "s b"] = np.stack([row.numpy() for row in kept])
    return shares


def map_step(step: TraceStep, pixels: np.ndarray, sample: int) -> Panel:
    """Return the map of one step: kept cells, or tokens where cells are merged or pruned."""
    h, w = flat_grid(step.grid)
    first = step.plans[0] if step.plans else None
    if first is not None and represents_itself(first) and is_whole(first.keep_mask, step):
        keep = first.keep_mask[sample].cpu().view(-1, h, w)[0].numpy()
        return Panel("", shade_cells(pixels, keep))
    places = follow_stages(step)
    cells = places[-1].token if places else step.provenance.token.cpu()
    token = cells[sample].view(-1, h, w)[0].numpy()
    return Panel("", paint_groups(pixels, token), token=token)
