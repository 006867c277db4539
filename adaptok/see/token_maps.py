"""From a trace to a picture: what is kept of an image, and what each token stands for."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from adaptok.errors import ShapeError
from adaptok.see.cells import flat_grid, paint_groups, read_image, shade_cells
from adaptok.see.following import (
    Standing,
    choose_step,
    find_probabilities,
    follow_sites,
    follow_stages,
    represents_itself,
    show_all,
    split_frames,
)
from adaptok.see.panels import BOX, Panel, PanelRow, draw_panel_rows
from adaptok.trace_step import TraceStep
from adaptok.tracing import Trace

if TYPE_CHECKING:
    import matplotlib.figure

READ = "Each token has the mean colour of its cells; lines are the borders between tokens."


def show_tokens(
    trace: Trace | TraceStep,
    image: Shaped[Tensor, "*b 3 h w"],
    *,
    sample: int = 0,
    step: int = -1,
    frame: int = 0,
    title: str = "",
    size: int = BOX,
) -> "matplotlib.figure.Figure":
    """Draw what a wrapped model made of an image: probabilities, kept cells, and tokens by stage.

    Args:
        trace: what `adaptok.trace` gave, or one of its steps.
        image: what was shown to the model, before it was normalised: uint8, or floats in [0, 1];
            one image or the batch.
        sample: which sample of the batch.
        step: which step of the trace.
        frame: which frame of a video; `image` is that frame.
        title: headline; empty says how many tokens are left.
        size: the longer edge of a panel in pixels, about.

    Returns:
        The figure: the image; the keep probabilities and the kept cells, where a router gave them;
        and for each stage, the outermost first, what its tokens stand for.

    Raises:
        ShapeError: there is no such step, sample or frame, or the cells have no places.
        DtypeError: the image has no pixels that can be shown.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> import adaptok, torch
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.25)
        >>> images = torch.rand(2, 3, 32, 48)
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(images)
        >>> [text.get_text() for text in show_tokens(seen, images).texts][0]
        '6 tokens for 24 cells'
    """
    chosen = choose_step(trace, step)
    grid = flat_grid(chosen.grid)
    check_sample(chosen, sample)
    pixels = read_image(image, sample)
    panels = [Panel("the image", pixels, f"{grid[0]} x {grid[1]} cells")]
    prob = find_probabilities(chosen)
    if prob is not None:
        values = split_frames(prob[sample], chosen.grid, frame).numpy()
        panels.append(Panel("keep probability", pixels, values=values))
    first = chosen.plans[0] if chosen.plans else None
    if first is not None and represents_itself(first) and is_whole(first.keep_mask, chosen):
        keep = split_frames(first.keep_mask[sample].cpu(), chosen.grid, frame).numpy()
        note = f"{keep.sum()} of {keep.size}"
        panels.append(Panel("kept cells", shade_cells(pixels, keep), note))
    places = follow_stages(trace, step)
    panels += [draw_standing(place, pixels, chosen, sample, frame) for place in places]
    left = places[-1].counts[sample] if places else chosen.provenance.token.shape[1]
    n = chosen.provenance.token.shape[1]
    title = title or f"{left} tokens for {n} cells"
    return draw_panel_rows([PanelRow(tuple(panels))], title=title, note=READ, size=size)


def show_sites(
    trace: Trace | TraceStep,
    image: Shaped[Tensor, "*b 3 h w"],
    *,
    sample: int = 0,
    step: int = -1,
    most: int = 3,
    title: str = "What tokens stand for, block by block",
    size: int = BOX,
) -> "matplotlib.figure.Figure":
    """Draw what tokens stand for behind the blocks in which stages merge or prune.

    Args:
        trace: what `adaptok.trace` gave, or one of its steps.
        image: as for `show_tokens`.
        sample: which sample of the batch.
        step: which step of the trace.
        most: at most so many blocks, evenly spread.
        title: headline.
        size: the longer edge of a panel in pixels, about.

    Returns:
        The figure: the image, and one panel for each block.

    Raises:
        ShapeError: no stage merges or prunes between blocks, or as for `show_tokens`.
        DtypeError: the image has no pixels that can be shown.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> import adaptok, torch
        >>> from adaptok.testing import make_vit
        >>> vit, images = adaptok.wrap(make_vit(), stack=["evit"]), torch.rand(2, 3, 32, 48)
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(images)
        >>> len(show_sites(seen, images).axes)
        4
    """
    chosen = choose_step(trace, step)
    grid = flat_grid(chosen.grid)
    check_sample(chosen, sample)
    places = show_all(follow_sites(trace, step), most)
    if not places:
        raise ShapeError(
            "no stage of this trace merges or prunes between blocks: show_tokens shows the others"
        )
    pixels = read_image(image, sample)
    panels = [Panel("the image", pixels, f"{grid[0]} x {grid[1]} cells")]
    panels += [draw_standing(place, pixels, chosen, sample, 0) for place in places]
    return draw_panel_rows([PanelRow(tuple(panels))], title=title, note=READ, size=size)


def draw_standing(
    place: Standing, pixels: np.ndarray, step: TraceStep, sample: int, frame: int
) -> Panel:
    """Return the panel of what tokens stand for at one place."""
    token = split_frames(place.token[sample], step.grid, frame).numpy()
    count = place.counts[sample]
    return Panel(place.name, paint_groups(pixels, token), f"{count} tokens", token)


def is_whole(mask: Tensor, step: TraceStep) -> bool:
    """Say whether a mask is one of the cells of the grid."""
    return mask.shape[1] == step.provenance.token.shape[1]


def check_sample(step: TraceStep, sample: int) -> None:
    """Raise a `ShapeError` unless a step has a sample."""
    b = step.provenance.token.shape[0]
    if not -b <= sample < b:
        raise ShapeError(f"there is no sample {sample} in a trace of {b}")
