"""A gallery: what every method that is installed makes of the same images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int, UInt8
from torch import Tensor, nn

from adaptok.budgeted_stage import BudgetedStage
from adaptok.budgets import Budget
from adaptok.discovery import available, find_part
from adaptok.errors import ShapeError
from adaptok.see.canvas import INK, QUIET, SMALL, TEXT, TITLE, fit_box, make_canvas
from adaptok.see.cells import paint_groups, read_image, shade_cells
from adaptok.see.following import count_tokens, find_own_cells
from adaptok.see.panels import Panel, draw_cells
from adaptok.see.pixel_host import BLOCKS, make_pixel_host, write_angles
from adaptok.see.samples import wrap_lines
from adaptok.stages import Axis, Stage
from adaptok.tracing import trace
from adaptok.wrapping import wrap

if TYPE_CHECKING:
    import matplotlib.figure

KEEP, CELLS, PATCH = 0.25, 16, 4
CHUNKER = "dc"  # a router is shown with it
FRESH = "*"
MARGIN, GAP, BOX, LABEL, APART, LINE = 28, 8, 128, 30, 36, 23
TITLES = {
    "chunkers": "Chunkers: what tokens stand for",
    "stages": "Stages that merge or prune: what tokens stand for",
    "routers": "Routers with the chunker dc: kept cells, the others dark",
}
NOTE = (
    "Each token has the mean colour of its cells; lines are the borders between tokens; hatched "
    "cells have none. The host is a ViT whose weights are set by hand: its tokens are pixels, its "
    "attention compares colours, and its class token looks for what is not white. "
    "* has weights of its own, fresh and not trained here."
)
OTHER_AXES: dict[Axis, str] = {
    "time": "reuses steps of a diffusion run, and chooses no tokens",
    "depth": "leaves blocks out, and chooses no tokens",
    "width": "leaves heads and channels out, and chooses no tokens",
}
FIRST = 1  # blocks before the stages
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Exhibit:
    """What one method made of the images, or why it is not shown.

    Args:
        name: the registered name.
        kind: `"chunkers"`, `"stages"` or `"routers"`.
        token: the token of each cell, `(b gh gw)`; None if it is not shown.
        own: the cells whose place their token has, `(b gh gw)`; None if it is not shown.
        counts: tokens of each image.
        fresh: it has weights of its own that nobody trained.
        problem: why it is not shown.
    """

    name: str
    kind: str
    token: Int[np.ndarray, "b gh gw"] | None = None
    own: Bool[np.ndarray, "b gh gw"] | None = None
    counts: tuple[int, ...] = ()
    fresh: bool = False
    problem: str = ""


def show_gallery(
    images: UInt8[Tensor, "b 3 h w"], *, keep: float = KEEP, title: str = ""
) -> "matplotlib.figure.Figure":
    """Draw what every chunker, router and token stage that is installed makes of images.

    Args:
        images: square RGB images, one to six.
        keep: share of the cells that each method keeps.
        title: headline.

    Returns:
        The figure (see `draw_gallery`).

    Raises:
        ShapeError: the images are not square, or too many.
        BudgetError: `keep` is no share.
        MissingPackageError: timm or matplotlib is not installed.

    Example:
        >>> import torch
        >>> figure = show_gallery(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
        >>> "tome" in [text.get_text() for text in figure.texts]
        True
    """
    return draw_gallery(images, find_exhibits(images, keep=keep), keep=keep, title=title)


def find_exhibits(
    images: UInt8[Tensor, "b 3 h w"], *, keep: float = KEEP, progress: Progress | None = None
) -> list[Exhibit]:
    """Run every chunker, router and stage that is installed on images, under the same budget.

    Args:
        images: square RGB images.
        keep: share of the cells that each method keeps.
        progress: told the methods done, and all of them.

    Returns:
        One for each registered name, in the order chunkers, stages, routers; what cannot be shown
        says why.

    Raises:
        ShapeError: the images are not square.
        BudgetError: `keep` is no share.
        MissingPackageError: timm is not installed.
    """
    Budget(keep=keep)  # refuses what is no share, before anything runs
    check_images(images)
    size = CELLS * PATCH
    small = F.interpolate(images.float(), (size, size), mode="area").round().to(torch.uint8)
    x = write_angles(small)
    make_pixel_host(size, PATCH)  # a missing package is no fault of a method
    wanted = [(name, kind) for kind in TITLES for name in list_names(kind)]
    found = []
    for done, (name, kind) in enumerate(wanted, start=1):
        found.append(exhibit(name, kind, x, keep))
        if progress is not None:
            progress(done, len(wanted))
    return found


def list_names(kind: str) -> tuple[str, ...]:
    """Return the registered names of a kind."""
    names = available(kind)
    assert isinstance(names, tuple)
    return names


def check_images(images: UInt8[Tensor, "b 3 h w"]) -> None:
    """Raise a `ShapeError` unless images are square and RGB."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ShapeError(
            f"a gallery needs square images of shape (b, 3, h, h), got {tuple(images.shape)}"
        )
    if images.shape[2] < CELLS:
        raise ShapeError(f"a gallery has {CELLS} x {CELLS} cells, got {images.shape[2]} pixels")


def exhibit(name: str, kind: str, x: Tensor, keep: float) -> Exhibit:
    """Run one method, or say why that cannot be done; a plug-in may fail in any way."""
    try:
        found: Exhibit = run_method(name, kind, x, keep)
    except Exception as error:
        words = str(error).splitlines()
        reason = f"{type(error).__name__}: {words[0] if words else 'no message'}"
        return Exhibit(name, kind, problem=reason)
    return found


def run_method(name: str, kind: str, x: Tensor, keep: float) -> Exhibit:
    """Run one method on the pixel host, and return what its tokens stand for."""
    options: dict[str, Any] = {"chunker": name}
    budget: float | None = keep
    if kind == "stages":
        cls = find_part("stage", name)
        if issubclass(cls, Stage) and cls.effects.axis != "tokens":
            return Exhibit(name, kind, problem=OTHER_AXES[cls.effects.axis])
        options = {"stack": [name]}
        if not issubclass(cls, BudgetedStage):
            budget = None  # it has settings of its own
    elif kind == "routers":
        options = {"chunker": CHUNKER, "router": name}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        host = wrap(
            make_pixel_host(CELLS * PATCH, PATCH),
            budget=budget,
            span=(FIRST, BLOCKS),
            verify=False,
            **options,
        )
        host.eval()
        with torch.no_grad(), trace(host) as seen:
            host(x)
    cells = seen.steps[0].provenance.token
    plans = seen.steps[0].plans
    if not plans:
        return Exhibit(name, kind, problem="told no trace what it chose")
    token = cells.view(-1, CELLS, CELLS).numpy()
    own = find_own_cells(seen).view(-1, CELLS, CELLS).numpy()
    return Exhibit(name, kind, token, own, count_tokens(cells), has_weights(host, kind))


def has_weights(host: nn.Module, kind: str) -> bool:
    """Say whether what chooses has weights of its own: of a router, or of a stage."""
    part = "router" if kind != "stages" else ""
    return any(
        ".adaptok." in f".{name}" and (not part or f".{part}." in name)
        for name, weight in host.named_parameters()
        if weight.requires_grad and weight.ndim > 1
    )


def draw_gallery(
    images: UInt8[Tensor, "b 3 h w"],
    exhibits: Sequence[Exhibit],
    *,
    keep: float = KEEP,
    title: str = "",
) -> "matplotlib.figure.Figure":
    """Draw what methods made of images: two columns of methods, and reasons below.

    Args:
        images: the images.
        exhibits: what `find_exhibits` gave.
        keep: share of the cells that was kept; for the title.
        title: headline; empty says what is seen.

    Returns:
        The figure: one axes per image, then one per shown method and image.

    Raises:
        ShapeError: there is no exhibit, or it is of other images.
        MissingPackageError: matplotlib is not installed.
    """
    check_images(images)
    b = images.shape[0]
    shown = [item for item in exhibits if item.token is not None]
    if not exhibits or any(len(item.counts) != b for item in shown) or b > 6:
        raise ShapeError(f"a gallery needs methods, and one to six images that they saw, got {b}")
    pixels = [read_image(images, number) for number in range(b)]
    box = fit_box(pixels[0].shape[0], pixels[0].shape[1], BOX)
    block = b * (box[0] + GAP) - GAP
    columns = 2 if b > 2 else 3
    width = max(1000, 2 * MARGIN + columns * block + (columns - 1) * APART)
    beside = width - 2 * MARGIN - block - APART  # room for words beside the images
    note = wrap_lines(NOTE, beside)
    missing = [
        line
        for item in exhibits
        if item.token is None
        for line in wrap_lines(f"{item.name}: {item.problem}", width - 2 * MARGIN).splitlines()
    ]
    groups = [(kind, [i for i in shown if i.kind == kind]) for kind in TITLES]
    groups = [(kind, items) for kind, items in groups if items]
    deep = LABEL + box[1] + 18
    head = 50
    first = head + max(LABEL + box[1] + 24, LINE * (note.count("\n") + 2))
    heights = [40 + deep * -(-len(items) // columns) for _, items in groups]
    foot = (46 + LINE * len(missing)) if missing else 10
    canvas = make_canvas(width, first + sum(heights) + foot + 10)
    cells = CELLS * CELLS
    title = title or (
        f"What each method keeps of the same images: {round(keep * cells)} tokens for {cells} cells"
    )
    canvas.text(MARGIN, 16, title, size=TITLE, bold=True)
    canvas.text(MARGIN + block + APART, head + 8, note, size=SMALL, colour=QUIET)
    canvas.text(MARGIN, head + 4, "the images", bold=True)
    for number, image in enumerate(pixels):
        canvas.image(MARGIN + number * (box[0] + GAP), head + LABEL + 4, box, image)
    top = first
    for (kind, items), height in zip(groups, heights, strict=True):
        canvas.text(MARGIN, top + 4, TITLES[kind], size=TEXT + 2, bold=True, colour=INK)
        for place, item in enumerate(items):
            left = MARGIN + place % columns * (block + APART)
            at = top + 40 + place // columns * deep
            canvas.text(left, at, item.name + (FRESH if item.fresh else ""), bold=True)
            counts = sorted(set(item.counts))
            words = f"{counts[0]} tokens" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            canvas.text(left + block, at + 3, words, size=SMALL, colour=QUIET, align="right")
            for number, image in enumerate(pixels):
                panel = make_panel(item, number, image)
                draw_cells(canvas, (left + number * (box[0] + GAP), at + LABEL), box, panel)
        top += height
    if missing:
        canvas.text(MARGIN, top + 4, "Not shown", size=TEXT + 2, bold=True)
        canvas.text(MARGIN, top + 40, "\n".join(missing), size=SMALL, colour=QUIET)
    return canvas.figure


def make_panel(item: Exhibit, number: int, image: UInt8[np.ndarray, "h w 3"]) -> Panel:
    """Return what a method made of one image: kept cells of a router, tokens of all others."""
    assert item.token is not None
    assert item.own is not None
    if item.kind == "routers":
        return Panel("", shade_cells(image, item.own[number]))
    return Panel("", paint_groups(image, item.token[number]), token=item.token[number])
