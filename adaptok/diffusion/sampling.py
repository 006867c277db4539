"""Drawing images: diffusers' schedulers around a model, one seed for one image."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from adaptok.budgets import Amount, Budget
from adaptok.diffusion.calls import (
    ModelCall,
    count_classes,
    evaluate,
    find_device,
    find_dtype,
    find_shape,
    open_request,
    read_labels,
)
from adaptok.diffusion.objective import Objective
from adaptok.diffusion.solvers import Solver, draw_noise, make_generators, make_solver
from adaptok.errors import AdaptokError, ConfigError, ShapeError

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class SampleStep:
    """What happened in one step of sampling.

    Args:
        time: time as the model took it, between 0 and 1,000.
        x0: the clean images that the model saw in the noisy ones, after guidance, `(b c h w)`.
        kept: cells that the conditional half kept, `(b)`; None for a model without routing.
        uncond_kept: cells that the unconditional half kept, `(b)`; None without guidance.
        keep_prob: keep probabilities of the conditional half, `(b n)`.
        keep_mask: cells that the conditional half kept, after the budget, `(b n)`.
        grid: height and width of the cells; None where they cannot be told.
    """

    time: float
    x0: Float[Tensor, "b c h w"]
    kept: Int[Tensor, " b"] | None = None
    uncond_kept: Int[Tensor, " b"] | None = None
    keep_prob: Float[Tensor, "b n"] | None = None
    keep_mask: Bool[Tensor, "b n"] | None = None
    grid: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Images that a model drew.

    Args:
        latents: the images, or latents for a decoder, float32, `(b c h w)`.
        initial: the noise, or noised images, that the first step saw, `(b c h w)`.
        seeds: the seed of each image.
        steps: what happened in each step; empty unless a trace was asked for.
    """

    latents: Float[Tensor, "b c h w"]
    initial: Float[Tensor, "b c h w"]
    seeds: tuple[int, ...]
    steps: tuple[SampleStep, ...] = ()


def sample(
    model: nn.Module,
    labels: Int[Tensor, " b"] | Sequence[int],
    *,
    objective: Objective,
    scheduler: str = "ddpm",
    steps: int = 250,
    seed: int | Sequence[int] = 0,
    guidance_scale: float = 1.0,
    guided_channels: int | None = None,
    drop: Amount | None = None,
    keep: Amount | None = None,
    tokens: Amount | None = None,
    uncond_drop: Amount | None = None,
    clip: float | None = None,
    shape: tuple[int, int, int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    trace: bool = False,
) -> Samples:
    """Draw one image per label.

    An image depends on its seed, its label and the options, and not on the batch that it is
    drawn in. All noise is drawn on the CPU, so a seed means the same noise on every device.

    Args:
        model: takes `(x, t, y)`; for guidance it has `forward_with_cfg`.
        labels: class of each image; the null class draws an image of any class.
        objective: what the model was trained for.
        scheduler: `"ddpm"` (random steps with the learned variance), `"dpm"` (DPM-Solver++,
            good with 20 steps), `"flow-euler"` (for flow matching).
        steps: number of model calls.
        seed: image `i` has the seed `seed + i`; or one seed per image. Seeds that differ by 2**32
            draw the same noise.
        guidance_scale: 1 runs the model with labels only, once per step.
        guided_channels: leading channels that are guided; None leaves it to the model.
        drop: tail-drop fraction, one number or one per image. At most one of `drop`, `keep` and
            `tokens` is given; with guidance it is meant for both halves.
        keep: fraction of the cells to keep.
        tokens: number of cells to keep.
        uncond_drop: tail-drop fraction of the unconditional half (Lite-CFG).
        clip: keep the clean image that the model sees in each step within `[-clip, clip]`;
            1 suits pixels, None (no limit) suits latents.
        shape: channels, height and width; None takes them from the model's config.
        device: where to run; None is where the model lies.
        dtype: dtype of what the model is given; None is that of most of its parameters. The
            sampling itself is always float32.
        progress: called after each step with the steps that are done, and their number.
        trace: keep routing and clean images of each step.

    Returns:
        The images, and with `trace` what happened in each step.

    Raises:
        ConfigError: an option is unknown, out of range, or does not fit the others.
        LabelError: a label is no class of the model.
        BudgetError: the budget is not valid, or has no effect without guidance.
        ShapeError: shapes do not fit each other, or the model's output does not fit the objective.
        AdaptokError: the model's output is not finite.
        MissingPackageError: diffusers is not installed.

    Example:
        >>> from adaptok.diffusion import FlowObjective
        >>> class Shrink(torch.nn.Module):
        ...     def forward(self, x, t, y):
        ...         return x
        >>> samples = sample(
        ...     Shrink(), [0, 1], objective=FlowObjective(), scheduler="flow-euler", steps=4,
        ...     shape=(3, 4, 6),
        ... )
        >>> samples.latents.shape, samples.seeds
        (torch.Size([2, 3, 4, 6]), (0, 1))

    Papers: Ho et al., arXiv 2006.11239; Nichol and Dhariwal, arXiv 2102.09672; Lu et al.,
    "DPM-Solver++", arXiv 2211.01095; Lipman et al., arXiv 2210.02747.
    """
    place = find_device(model, device)
    y = read_labels(labels, count_classes(model), place)
    generators = make_generators(seed, y.shape[0])
    solver = make_solver(scheduler, objective, steps)
    call = ModelCall(
        model,
        y,
        budget=Budget(keep=keep, tokens=tokens, drop=drop),
        guidance_scale=guidance_scale,
        guided_channels=guided_channels,
        uncond_drop=uncond_drop,
        dtype=dtype or find_dtype(model),
        trace=trace,
    )
    x = draw_noise(generators, find_shape(model, shape)).to(place)
    return walk(call, solver, x, generators, clip=clip, progress=progress)


def denoise(
    model: nn.Module,
    x0: Float[Tensor, "b c h w"],
    labels: Int[Tensor, " b"] | Sequence[int],
    *,
    objective: Objective,
    start: float = 0.5,
    scheduler: str = "ddpm",
    steps: int = 250,
    seed: int | Sequence[int] = 0,
    guidance_scale: float = 1.0,
    guided_channels: int | None = None,
    drop: Amount | None = None,
    keep: Amount | None = None,
    tokens: Amount | None = None,
    uncond_drop: Amount | None = None,
    clip: float | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    trace: bool = False,
) -> Samples:
    """Noise real images to a chosen level, and denoise them from there.

    Args:
        model: as for `sample`, which explains the options that are not listed here.
        x0: the images or latents, one per label.
        labels: class of each image.
        objective: what the model was trained for.
        start: where to begin, in (0, 1], as a fraction of the diffusion time; 1 begins in (nearly)
            pure noise. The walk begins at the first scheduled step that is not noisier, and
            takes at least the last step.
        scheduler: as for `sample`.
        steps: number of model calls of a whole walk; about `start * steps` of them are made.
        seed: seed of the noise, as for `sample`.
        guidance_scale: as for `sample`.
        guided_channels: as for `sample`.
        drop: as for `sample`.
        keep: as for `sample`.
        tokens: as for `sample`.
        uncond_drop: as for `sample`.
        clip: as for `sample`.
        device: as for `sample`.
        dtype: as for `sample`.
        progress: as for `sample`.
        trace: as for `sample`.

    Returns:
        The denoised images; `initial` holds the noised ones.

    Raises:
        ConfigError: `start` is out of range; and whatever `sample` raises.
        ShapeError: images and labels differ in number.

    Example:
        >>> from adaptok.diffusion import FlowObjective
        >>> class Still(torch.nn.Module):
        ...     def forward(self, x, t, y):
        ...         return torch.zeros_like(x)
        >>> samples = denoise(
        ...     Still(), torch.ones(1, 3, 4, 4), [0], objective=FlowObjective(), start=0.25,
        ...     scheduler="flow-euler", steps=8,
        ... )
        >>> torch.equal(samples.latents, samples.initial)
        True
    """
    if not 0.0 < start <= 1.0:
        raise ConfigError(f"start needs a number in (0, 1], got {start}: 1 is pure noise")
    place = find_device(model, device)
    y = read_labels(labels, count_classes(model), place)
    if x0.ndim != 4 or x0.shape[0] != y.shape[0]:
        raise ShapeError(
            f"denoise needs one image (c, h, w) per label, got {tuple(x0.shape)} for "
            f"{y.shape[0]} labels"
        )
    generators = make_generators(seed, y.shape[0])
    solver = make_solver(scheduler, objective, steps)
    call = ModelCall(
        model,
        y,
        budget=Budget(keep=keep, tokens=tokens, drop=drop),
        guidance_scale=guidance_scale,
        guided_channels=guided_channels,
        uncond_drop=uncond_drop,
        dtype=dtype or find_dtype(model),
        trace=trace,
    )
    first = solver.first_step(start)
    _, c, h, w = x0.shape
    noise = draw_noise(generators, (c, h, w)).to(place)
    x = objective.noisy(x0.to(place), noise, solver.time(first, y.shape[0], place))
    return walk(call, solver, x, generators, first=first, clip=clip, progress=progress)


def walk(
    call: ModelCall,
    solver: Solver,
    x: Float[Tensor, "b c h w"],
    generators: Sequence[torch.Generator],
    *,
    first: int = 0,
    clip: float | None = None,
    progress: Progress | None = None,
) -> Samples:
    """Go from noise to images, one scheduler step after the other.

    Args:
        call: the model with its options.
        solver: scheduler and objective.
        x: noise or noised images, float32, as noisy as step `first` expects.
        generators: one per image, on the CPU.
        first: the step to begin with.
        clip: bound of the clean image that the model sees, or None.
        progress: called after each step.

    Returns:
        The images; `steps` is filled when the call is traced.

    Raises:
        ConfigError: the bound is not positive.
        ShapeError: the model's output does not fit the objective.
        AdaptokError: the model's output is not finite.
    """
    if clip is not None and not clip > 0:
        raise ConfigError(f"clip needs a positive number, got {clip}: 1 suits pixels")
    b, c, h, w = x.shape
    objective, total = solver.objective, solver.num_steps - first
    initial, trace = x, []
    solver.begin(first)
    # Not inference mode: tables that a model caches in it could never be trained with.
    with evaluate(call.model), open_request(call.model, total), torch.no_grad():
        for index in range(first, solver.num_steps):
            t = solver.time(index, b, x.device)
            time = objective.model_time(t)
            prediction, routing = call(x, time)
            needed = (b, objective.out_channels(c), h, w)
            if tuple(prediction.shape) != needed:
                raise ShapeError(
                    f"the objective {objective.name!r} needs an output of shape {needed}, and "
                    f"the model gave {tuple(prediction.shape)}: use the objective that it was "
                    "trained for"
                )
            if not bool(prediction.isfinite().all()):
                raise AdaptokError(
                    f"the model's output is not finite in step {index + 1} of "
                    f"{solver.num_steps} (time {time[0].item():g}): check its weights, or run it "
                    "with dtype=torch.float32"
                )
            x0 = objective.predict_x0(prediction, x, t) if clip or call.trace else x
            if clip is not None:
                x0 = x0.clamp(-clip, clip)
                limited = objective.predict_from_x0(x0, x, t)
                prediction = torch.cat([limited, prediction[:, c:]], dim=1)
            if call.trace:
                trace.append(describe_step(time[0].item(), x0, routing))
            x = solver.step(index, prediction, x, generators)
            if progress is not None:
                progress(index - first + 1, total)
    seeds = tuple(generator.initial_seed() for generator in generators)
    return Samples(x, initial, seeds, tuple(trace))


def describe_step(time: float, x0: Float[Tensor, "b c h w"], routing: Any) -> SampleStep:  # noqa: ANN401
    """Return what a step shows: clean images, and the routing of each half if there is one."""
    if routing is None:
        return SampleStep(time, x0)
    b, _, h, w = x0.shape
    mask, prob = routing.keep_mask, routing.keep_prob
    patch = math.isqrt(max(1, h * w // mask.shape[1]))
    grid = (h // patch, w // patch)
    return SampleStep(
        time,
        x0,
        kept=mask[:b].sum(1),
        uncond_kept=mask[b:].sum(1) if mask.shape[0] > b else None,
        keep_prob=prob[:b],
        keep_mask=mask[:b],
        grid=grid if math.prod(grid) == mask.shape[1] else None,
    )
