"""What a report shows: runs under several budgets, step by step, sample by sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from adaptok.errors import ShapeError
from adaptok.see.cells import flat_grid, read_image
from adaptok.see.following import find_own_cells, find_probabilities
from adaptok.trace_step import TraceStep
from adaptok.tracing import Trace

MOST_CELLS = 65_534  # a token is written in two bytes


@dataclass(frozen=True, slots=True, eq=False)
class ReportStep:
    """One step of a run.

    Args:
        name: the step in words, such as `"step 3, noise 80 %"`.
        given: what the model was given, RGB pixels, `(b h w 3)`.
        token: the token of each cell, -1 where none stands for it, `(b n)`.
        own: the cells whose place their token has, `(b n)`.
        tokens: tokens that ran, per sample.
        keep_prob: keep probability of each cell, `(b n)`; None where there is none.
        clean: the clean images that a diffusion model saw in them, `(b h w 3)`.
        gflops: counted GFLOPs of the step for one sample; None with `ms`.
        ms: measured milliseconds of the step for one sample; None with `gflops`.

    Raises:
        ShapeError: the parts do not fit each other, or FLOPs came without a time.
    """

    name: str
    given: UInt8[np.ndarray, "b h w 3"]
    token: Int[np.ndarray, "b n"]
    own: Bool[np.ndarray, "b n"]
    tokens: tuple[int, ...]
    keep_prob: Float[np.ndarray, "b n"] | None = None
    clean: UInt8[np.ndarray, "b h w 3"] | None = None
    gflops: float | None = None
    ms: float | None = None

    def __post_init__(self) -> None:
        b, n = self.token.shape
        known = [self.own, *([] if self.keep_prob is None else [self.keep_prob])]
        if any(part.shape != (b, n) for part in known) or len(self.tokens) != b:
            raise ShapeError(f"the parts of the step {self.name!r} are not all of {b} x {n} cells")
        if len(self.given) != b or (
            self.clean is not None and self.clean.shape != self.given.shape
        ):
            raise ShapeError(f"the step {self.name!r} needs an image for each of {b} samples")
        if (self.gflops is None) != (self.ms is None):
            raise ShapeError("a report shows FLOPs with measured time beside them: give both")


@dataclass(frozen=True, slots=True, eq=False)
class ReportRun:
    """What happened under one budget.

    Args:
        name: the budget in words.
        grid: height and width in cells.
        steps: the steps, in order.
        results: what each sample became, RGB pixels, `(b h w 3)`; None for a model that draws no
            images.
        tokens: tokens of a sample, mean over steps and samples; None takes that of `steps`.
        gflops: of a step for one sample, mean; None takes that of `steps`.
        ms: of a step for one sample, mean; None takes that of `steps`.
        passes: how often the model runs in a step; guidance runs it twice.

    Raises:
        ShapeError: there is no step, or the steps are of different batches or image sizes.
    """

    name: str
    grid: tuple[int, int]
    steps: tuple[ReportStep, ...]
    results: UInt8[np.ndarray, "b h w 3"] | None = None
    tokens: float | None = None
    gflops: float | None = None
    ms: float | None = None
    passes: int = 1

    def __post_init__(self) -> None:
        if not self.steps:
            raise ShapeError(f"the run {self.name!r} has no step: nothing was traced")
        shapes = {(step.token.shape, step.given.shape) for step in self.steps}
        n = self.grid[0] * self.grid[1]
        if len(shapes) > 1 or self.steps[0].token.shape[1] != n:
            raise ShapeError(
                f"the steps of the run {self.name!r} need the same samples, image size and grid, "
                f"{self.grid[0]} x {self.grid[1]} cells"
            )
        if n > MOST_CELLS:
            raise ShapeError(f"a report shows at most {MOST_CELLS} cells, got {n}")
        if (self.gflops is None) != (self.ms is None):
            raise ShapeError("a report shows FLOPs with measured time beside them: give both")

    @property
    def mean_tokens(self) -> float:
        """Tokens of a sample, mean over steps and samples."""
        if self.tokens is not None:
            return self.tokens
        return float(np.mean([step.tokens for step in self.steps]))

    @property
    def mean_cost(self) -> tuple[float, float] | None:
        """GFLOPs and milliseconds of a step for one sample, mean; None where not known."""
        if self.gflops is not None and self.ms is not None:
            return self.gflops, self.ms
        known = [
            (step.gflops, step.ms)
            for step in self.steps
            if step.gflops is not None and step.ms is not None
        ]
        if len(known) < len(self.steps):
            return None
        gflops, ms = (sum(column) / len(known) for column in zip(*known, strict=True))
        return gflops, ms

    def choose_steps(self, most: int) -> "ReportRun":
        """Return the run with at most so many of its steps, evenly from the first to the last."""
        last = len(self.steps) - 1
        if last < most:
            return self
        places = sorted({round(part * last / max(1, most - 1)) for part in range(most)})
        cost = self.mean_cost
        return ReportRun(
            self.name,
            self.grid,
            tuple(self.steps[place] for place in places),
            self.results,
            self.mean_tokens,
            cost[0] if cost else None,
            cost[1] if cost else None,
            self.passes,
        )


def read_batch(images: Shaped[Tensor, "b 3 h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Return a batch of images as pixels (see `read_image`)."""
    if images.ndim != 4:
        raise ShapeError(
            f"a batch of images needs the shape (b, 3, h, w), got {tuple(images.shape)}"
        )
    return np.stack([read_image(images, sample) for sample in range(images.shape[0])])


def read_run(
    name: str,
    trace: Trace,
    images: Shaped[Tensor, "b 3 h w"] | Sequence[Shaped[Tensor, "b 3 h w"]],
    *,
    step_names: Sequence[str] = (),
    results: Shaped[Tensor, "b 3 h w"] | None = None,
) -> ReportRun:
    """Turn a trace into a run of a report.

    Args:
        name: the budget in words.
        trace: what `adaptok.trace` gave; each pass of the blocks is a step.
        images: what the model was given: one batch for all steps, or one for each.
        step_names: the steps in words.
        results: what the samples became.

    Returns:
        The run.

    Raises:
        ShapeError: images, names and steps do not fit each other, or cells have no places.
        DtypeError: the images have no pixels that can be shown.

    Example:
        >>> import adaptok, torch
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> images = torch.rand(2, 3, 32, 48)
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(images)
        >>> read_run("keep 0.5", seen, images).mean_tokens
        12.0
    """
    steps = trace.steps
    batches = [images] * len(steps) if isinstance(images, Tensor) else list(images)
    if len(batches) != len(steps) or (step_names and len(step_names) != len(steps)):
        raise ShapeError(
            f"the run {name!r} has {len(steps)} steps, got {len(batches)} batches of images and "
            f"{len(step_names)} names: one each is needed"
        )
    known: dict[int, np.ndarray] = {}
    for batch in batches:
        if id(batch) not in known:
            known[id(batch)] = read_batch(batch)
    made = [
        read_step(
            trace,
            number,
            step_names[number] if step_names else f"step {number + 1} of {len(steps)}",
            known[id(batch)],
        )
        for number, batch in enumerate(batches)
    ]
    grid = flat_grid(steps[0].grid) if steps else (1, 1)
    return ReportRun(name, grid, tuple(made), None if results is None else read_batch(results))


def read_step(
    trace: Trace, number: int, name: str, given: UInt8[np.ndarray, "b h w 3"]
) -> ReportStep:
    """Turn one step of a trace into one of a report."""
    step: TraceStep = trace.steps[number]
    if len(step.grid) == 3 and step.grid[0] > 1:
        raise ShapeError(
            f"a report shows images, and this is a video of {step.grid[0]} frames: "
            "adaptok.see.show_tokens draws one frame"
        )
    b = step.provenance.token.shape[0]
    prob = find_probabilities(step)
    return ReportStep(
        name,
        given,
        step.provenance.token.cpu().numpy(),
        find_own_cells(trace, number).numpy(),
        tuple(int(count) for count in step.kept),
        None if prob is None else prob.numpy(),
        gflops=step.flops / 1e9 / b,
        ms=step.ms / b,
    )


def own_of_nearest(
    keep_mask: Bool[Tensor, "b n"], nearest: Int[Tensor, "b n"]
) -> Int[Tensor, "b n"]:
    """Return the token of each cell where cells are stood for by their nearest kept one.

    Args:
        keep_mask: the kept cells.
        nearest: the nearest kept cell of each cell.

    Example:
        >>> import torch
        >>> own_of_nearest(torch.tensor([[False, True, True]]), torch.tensor([[1, 1, 2]]))
        tensor([[0, 0, 1]])
    """
    return (keep_mask.cumsum(1) - 1).gather(1, nearest)
