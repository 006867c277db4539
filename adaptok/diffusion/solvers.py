"""diffusers' schedulers behind one interface, and the noise that they need."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.diffusion.objective import FlowObjective, HybridObjective, Objective, Times
from adaptok.diffusion.schedule import linear_betas
from adaptok.errors import ConfigError, ShapeError
from adaptok.optional import import_optional

SCHEDULERS = {"ddpm": "hybrid", "dpm": "hybrid", "flow-euler": "flow"}
"""The schedulers, and the objective that each of them fits."""


@dataclass(frozen=True, slots=True, eq=False)
class Solver:
    """A scheduler of diffusers that has been set to a number of steps.

    Args:
        name: one of `SCHEDULERS`.
        scheduler: the object of diffusers; it counts its own steps, so it serves one walk.
        objective: the objective whose predictions it takes.
    """

    name: str
    scheduler: Any
    objective: Objective

    @property
    def num_steps(self) -> int:
        """How many steps a whole walk has."""
        return len(self.scheduler.timesteps)

    def time(self, index: int, b: int, device: torch.device) -> Times:
        """Return the time of a step in the objective's terms, once per image.

        Args:
            index: number of the step; 0 is the noisiest.
            b: number of images.
            device: where the result lies.

        Returns:
            The times.
        """
        flow = isinstance(self.objective, FlowObjective)
        value = (self.scheduler.sigmas if flow else self.scheduler.timesteps)[index]
        return value.to(device).expand(b)  # type: ignore[no-any-return]

    def first_step(self, level: float) -> int:
        """Return the first step that is not noisier than a level.

        Args:
            level: fraction of the diffusion time, in (0, 1].

        Returns:
            Number of the step; the last one if all are noisier.
        """
        cpu = torch.device("cpu")
        for index in range(self.num_steps):
            if self.objective.model_time(self.time(index, 1, cpu)).item() <= 1000 * level + 1e-3:
                return index
        return self.num_steps - 1

    def begin(self, index: int) -> None:
        """Tell the scheduler which step comes first (DDPM does not need to be told)."""
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(index)

    def step(
        self,
        index: int,
        prediction: Float[Tensor, "b k h w"],
        x: Float[Tensor, "b c h w"],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "b c h w"]:
        """Take one step.

        Args:
            index: number of the step.
            prediction: the model's output, float32.
            x: noisy images, float32.
            generators: one per image; only `"ddpm"` draws from them.

        Returns:
            Less noisy images, float32.
        """
        if self.name != "ddpm":
            # Only the noise, or velocity: diffusers' own split would assume three channels.
            prediction = prediction[:, : x.shape[1]]
        timestep = self.scheduler.timesteps[index]
        result = self.scheduler.step(
            prediction, timestep, x, generator=list(generators), return_dict=False
        )
        return result[0]  # type: ignore[no-any-return]


def make_solver(name: str, objective: Objective, steps: int) -> Solver:
    """Set up a scheduler.

    Args:
        name: one of `SCHEDULERS`.
        objective: what the model was trained for.
        steps: number of steps of a whole walk.

    Returns:
        The solver, for one walk.

    Raises:
        ConfigError: the scheduler is unknown, does not fit the objective, or cannot take so
            many steps.
        MissingPackageError: diffusers is not installed.

    Example:
        >>> make_solver("dpm", HybridObjective(), steps=4).scheduler.timesteps
        tensor([999, 749, 500, 250])
    """
    if name not in SCHEDULERS:
        raise ConfigError(f"there is no scheduler {name!r}: choose one of {', '.join(SCHEDULERS)}")
    fitting = [key for key, kind in SCHEDULERS.items() if kind == objective.name]
    if name not in fitting:
        raise ConfigError(
            f"the scheduler {name!r} is for the objective {SCHEDULERS[name]!r}, and this model "
            f"was trained for {objective.name!r}: use {' or '.join(fitting) or 'another model'}"
        )
    if isinstance(objective, HybridObjective):
        return make_hybrid_solver(name, objective, steps)
    check_steps(name, steps, 1, None)
    diffusers = import_optional("diffusers", extra="diffusion")
    shift = objective.shift if isinstance(objective, FlowObjective) else 1.0
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    # Its own choice of levels ends at 0.001, where one model call changes next to nothing, and
    # applies the shift twice.
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    return Solver(name, scheduler, objective)


def make_hybrid_solver(name: str, objective: HybridObjective, steps: int) -> Solver:
    """Set up a scheduler for noise prediction; see `make_solver`."""
    options = {
        "num_train_timesteps": objective.num_steps,
        "trained_betas": linear_betas(objective.num_steps).tolist(),
        "timestep_spacing": "linspace",  # from the noisiest trained step to the cleanest, as DiT
    }
    diffusers: Any
    if name == "ddpm":
        # One step would begin at the clean end; more than were trained do not exist.
        check_steps(name, steps, 2, objective.num_steps)
        diffusers = import_optional("diffusers", extra="diffusion")
        scheduler = diffusers.DDPMScheduler(
            variance_type="learned_range", clip_sample=False, **options
        )
    else:
        check_steps(name, steps, 1, objective.num_steps - 1)
        diffusers = import_optional("diffusers", extra="diffusion")
        scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=2, **options)
    with warnings.catch_warnings():
        # numpy warns about how diffusers turns a tensor into an array; the result is right.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        scheduler.set_timesteps(steps)
    return Solver(name, scheduler, objective)


def check_steps(name: str, steps: Any, low: int, high: int | None) -> None:  # noqa: ANN401
    """Raise a `ConfigError` unless a scheduler can take so many steps."""
    odd = isinstance(steps, bool) or not isinstance(steps, Integral)
    whole = 0 if odd else int(steps)
    if whole < low or (high is not None and whole > high):
        bound = f"{low} or more" if high is None else f"{low} to {high}"
        raise ConfigError(f"the scheduler {name!r} takes {bound} steps, got {steps!r}")


def make_generators(seed: int | Sequence[int], b: int) -> tuple[torch.Generator, ...]:
    """Make one source of random numbers per image, on the CPU.

    Args:
        seed: image `i` has the seed `seed + i`; or one seed per image. The CPU's generator takes
            32 bits: seeds that differ by 2**32 draw the same.
        b: number of images.

    Returns:
        The generators.

    Raises:
        ConfigError: there are not as many seeds as images, or a seed is out of range.

    Example:
        >>> [generator.initial_seed() for generator in make_generators(7, 3)]
        [7, 8, 9]
    """
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + i for i in range(b)]
    if len(seeds) != b:
        raise ConfigError(f"one seed per image means {b} seeds here, got {len(seeds)}")
    for value in seeds:
        check_seed(value)
    return tuple(torch.Generator("cpu").manual_seed(int(value)) for value in seeds)


def check_seed(seed: Any) -> None:  # noqa: ANN401
    """Raise a `ConfigError` unless a generator can take a seed."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise ConfigError(f"a seed needs a whole number from 0 to 2**63 - 1, got {seed!r}")


def draw_noise(
    generators: Sequence[torch.Generator], shape: tuple[int, int, int]
) -> Float[Tensor, "b c h w"]:
    """Draw standard normal noise, each image from its own source.

    Args:
        generators: one per image, on the CPU.
        shape: channels, height and width.

    Returns:
        The noise, float32 on the CPU.

    Raises:
        ShapeError: there are no generators.

    Example:
        >>> draw_noise(make_generators(0, 2), (3, 4, 6)).shape
        torch.Size([2, 3, 4, 6])
    """
    if not generators:
        raise ShapeError("noise needs one generator per image, got none")
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])
