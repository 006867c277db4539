"""Sampling with its price: tokens, counted operations and measured time of a step."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from adaptok.dc.baseline import DiT
from adaptok.dc.config import DCDiTConfig, DiTConfig
from adaptok.dc.model import DCDiT
from adaptok.diffusion import Objective, Samples, sample
from adaptok.diffusion.sampling import Progress, SampleStep
from adaptok.measure.flops import count_flops
from adaptok.measure.latency import wait_for_device


@dataclass(frozen=True, slots=True)
class StepCost:
    """What one sampling step costs for one image; guidance runs the model twice in a step.

    Args:
        tokens: tokens that ran for each image, mean over the steps.
        gflops: GFLOPs, mean over steps and images.
        ms: measured milliseconds, mean over the steps, divided by the number of images.
    """

    tokens: tuple[float, ...]
    gflops: float
    ms: float

    @property
    def mean_tokens(self) -> float:
        """Tokens of one image, mean over steps and images."""
        return statistics.fmean(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredSamples:
    """Images with what they cost.

    Args:
        samples: the images, with the trace of all steps.
        cost: what a step costs for one image.
        step_ms: measured milliseconds of each step for all images together.
    """

    samples: Samples
    cost: StepCost
    step_ms: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Measured time of all steps together."""
        return sum(self.step_ms) / 1000


def measure_sampling(
    model: DCDiT | DiT,
    labels: Sequence[int],
    *,
    objective: Objective,
    progress: Progress | None = None,
    **options: Any,  # noqa: ANN401
) -> MeasuredSamples:
    """Draw images, and say what they cost.

    Args:
        model: the model.
        labels: class of each image.
        objective: what the model was trained for.
        progress: called after each step.
        **options: those of `adaptok.diffusion.sample`; the trace is always kept.

    Returns:
        The images and their cost.

    Raises:
        AdaptokError: whatever `sample` raises.

    Example:
        >>> import adaptok, torch
        >>> from adaptok.diffusion import FlowObjective
        >>> config = adaptok.DCDiTConfig(
        ...     hidden_size=64, depth=1, num_heads=2, latent_size=8, learn_sigma=False
        ... )
        >>> measured = measure_sampling(
        ...     adaptok.DCDiT(config), [0, 1], objective=FlowObjective(), scheduler="flow-euler",
        ...     steps=2, tokens=16,
        ... )
        >>> measured.cost.tokens
        (16.0, 16.0)
    """
    ticks: list[float] = []

    def note_step(done: int, total: int) -> None:
        wait_for_device()
        ticks.append(time.perf_counter())
        if progress is not None:
            progress(done, total)

    wait_for_device()
    ticks.append(time.perf_counter())
    samples = sample(
        model, labels, objective=objective, progress=note_step, **{**options, "trace": True}
    )
    step_ms = tuple(1000 * (later - earlier) for earlier, later in pairwise(ticks))
    guided = options.get("guidance_scale", 1.0) != 1.0
    runs = [runs_of(model.config, step, len(labels), guided) for step in samples.steps]
    grid = (samples.latents.shape[2], samples.latents.shape[3])
    flops = statistics.fmean(
        count_flops(model.config, grid, [count for run in step for count in run]) for step in runs
    )
    totals = [[sum(counts) for counts in zip(*step, strict=True)] for step in runs]
    tokens = tuple(statistics.fmean(counts) for counts in zip(*totals, strict=True))
    cost = StepCost(tokens, flops / 1e9 / len(labels), statistics.fmean(step_ms) / len(labels))
    return MeasuredSamples(samples, cost, step_ms)


def runs_of(
    config: DCDiTConfig | DiTConfig, step: SampleStep, b: int, guided: bool
) -> list[list[int]]:
    """Return the tokens of each image in each run of the model in a step, one run per half.

    Args:
        config: options of the model.
        step: what happened in the step.
        b: number of images.
        guided: whether there is an unconditional half.

    Returns:
        One or two lists of `b` counts.
    """
    if isinstance(config, DiTConfig):
        h, w = step.x0.shape[2:]
        patches = (h // config.patch_size) * (w // config.patch_size)
        return [[patches] * b] * (2 if guided else 1)
    cells = step.x0.shape[2] * step.x0.shape[3]
    halves = [half for half in (step.kept, step.uncond_kept) if half is not None]
    return [[count_computed(config, kept, cells) for kept in half.tolist()] for half in halves]


def count_computed(config: DCDiTConfig, kept: int, cells: int) -> int:
    """Return the tokens that run where so many are asked for: the bucketed layout fills up."""
    if config.layout != "bucketed":
        return kept
    step = -(-cells // config.buckets)
    return min(cells, -(-kept // step) * step)
