"""The linear noise schedule of DDPM, and the variational bound of a model on it."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from adaptok.errors import ConfigError

FEWEST_STEPS = 21
"""With 20 steps the last beta would be 1: nothing would be left of the image."""

HALF_BIN = 1 / 255
"""Half the distance between two of 256 grey values in [-1, 1]."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearSchedule:
    """Constants of each step of a linear schedule, `s` of them.

    Args:
        betas: variance of the noise that a step adds, float64.
        alphas_cumprod: share of the image's variance that is left after a step, float64.
        signal: factor of the image in the noisy image.
        noise: factor of the noise in the noisy image.
        min_log_variance: log variance of the true posterior, the lower end of the learned range;
            the first step, where it is zero, takes the value of the second.
        max_log_variance: log beta, the upper end of the learned range.
        mean_gap: how far the posterior mean moves when the predicted noise moves by one.
    """

    betas: Float[Tensor, " s"]
    alphas_cumprod: Float[Tensor, " s"]
    signal: Float[Tensor, " s"]
    noise: Float[Tensor, " s"]
    min_log_variance: Float[Tensor, " s"]
    max_log_variance: Float[Tensor, " s"]
    mean_gap: Float[Tensor, " s"]


def check_num_steps(num_steps: object) -> None:
    """Raise a `ConfigError` unless a linear schedule can have so many steps."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < FEWEST_STEPS:
        raise ConfigError(
            f"num_steps needs a whole number of at least {FEWEST_STEPS}, got {num_steps!r}: "
            "published models train with 1000"
        )


def check_range(name: str, values: Tensor, low: float, high: float) -> None:
    """Raise a `ConfigError` unless all values lie in a range."""
    # Elsewhere than on the CPU, looking at values would make the host wait in every step.
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ~((values >= low) & (values <= high))
    if bool(wrong.any()):
        raise ConfigError(f"{name} needs values from {low:g} to {high:g}, got {values[wrong][0]:g}")


def linear_betas(num_steps: int) -> Float[Tensor, " s"]:
    """Return the betas of the linear schedule: 0.0001 to 0.02 for 1,000 steps.

    Args:
        num_steps: number of steps. Other numbers than 1,000 scale the two ends by
            1000 / num_steps, so that the whole process adds about the same noise.

    Returns:
        One beta per step, float64 on the CPU.

    Raises:
        ConfigError: the number of steps is no whole number, or too small.

    Example:
        >>> linear_betas(1000)[[0, -1]].tolist()
        [0.0001, 0.02]

    Paper: Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239.
    """
    check_num_steps(num_steps)
    scale = 1000 / num_steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_steps, dtype=torch.float64)


@lru_cache(maxsize=16)
def linear_schedule(num_steps: int, device: torch.device | None = None) -> LinearSchedule:
    """Return the constants of the linear schedule, computed once per device.

    Args:
        num_steps: number of steps.
        device: where the float32 constants go; the CPU when None.

    Returns:
        The constants.

    Raises:
        ConfigError: the number of steps is no whole number, or too small.

    Example:
        >>> linear_schedule(1000).signal.shape
        torch.Size([1000])
    """
    # The result is cached: made inside a caller's inference mode, it could never be trained with.
    with torch.inference_mode(False):
        betas = linear_betas(num_steps)
        alphas_cumprod = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior = betas * (1 - before) / (1 - alphas_cumprod)
        posterior[0] = posterior[1]
        constants = {
            "signal": alphas_cumprod.sqrt(),
            "noise": (1 - alphas_cumprod).sqrt(),
            "min_log_variance": posterior.log(),
            "max_log_variance": betas.log(),
            "mean_gap": betas / ((1 - betas) * (1 - alphas_cumprod)).sqrt(),
        }
        moved = {
            name: value.float().to(device or torch.device("cpu"))
            for name, value in constants.items()
        }
        return LinearSchedule(betas=betas, alphas_cumprod=alphas_cumprod, **moved)


def spread(values: Shaped[Tensor, " b"]) -> Shaped[Tensor, "b 1 1 1"]:
    """Give one value per sample the axes of images."""
    return values.reshape(-1, 1, 1, 1)


def variational_bits(
    x0: Float[Tensor, "b c h w"],
    error: Float[Tensor, "b c h w"],
    place: Float[Tensor, "b c h w"],
    t: Int[Tensor, " b"],
    schedule: LinearSchedule,
) -> Float[Tensor, "b c h w"]:
    """Return the term of the variational bound that belongs to each sample's step.

    Args:
        x0: clean images; grey values lie in [-1, 1].
        error: true noise minus predicted noise.
        place: the model's place in the range of log variances, -1 for the lower end and 1 for
            the upper end.
        t: step index of each sample.
        schedule: the constants, on the device of the images.

    Returns:
        Bits of each element: the divergence between posterior and model, and for step 0 the
        negative log likelihood of the image's 8-bit grey values.

    Paper: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models",
    arXiv 2102.09672, equations 4, 5 and 15.
    """
    low, high = spread(schedule.min_log_variance[t]), spread(schedule.max_log_variance[t])
    log_variance = torch.lerp(low, high, (place + 1) / 2)
    # Written by the error of the noise, the noisy image itself cancels out of both terms.
    gap = spread(schedule.mean_gap[t]) * error
    nats = torch.where(
        spread(t == 0),
        bin_nats(x0, gap, log_variance),
        0.5
        * (
            log_variance
            - low
            - 1
            + (low - log_variance).exp()
            + gap.square() * (-log_variance).exp()
        ),
    )
    return nats / math.log(2)


def bin_nats(
    x0: Float[Tensor, "b c h w"],
    gap: Float[Tensor, "b c h w"],
    log_variance: Float[Tensor, "b c h w"],
) -> Float[Tensor, "b c h w"]:
    """Return the negative log probability of grey values under a normal distribution.

    Args:
        x0: grey values, 256 levels in [-1, 1]; the bins of the two outermost are open.
        gap: mean of the distribution minus `x0`; only its size counts inside the range.
        log_variance: log variance of the distribution.

    Returns:
        Nats, at most 28: a probability below 1e-12 counts as 1e-12, as in the paper's code.
    """
    scale = (-0.5 * log_variance).exp()
    upper, lower = scale * (HALF_BIN - gap), scale * (-HALF_BIN - gap)
    # Mirrored to the lower tail, where the difference of two tiny numbers is still exact.
    near, far = scale * (HALF_BIN - gap.abs()), scale * (-HALF_BIN - gap.abs())
    inside = torch.special.ndtr(near) - torch.special.ndtr(far)
    probability = torch.where(
        x0 < -0.999,
        torch.special.ndtr(upper),
        torch.where(x0 > 0.999, torch.special.ndtr(-lower), inside),
    )
    return -probability.clamp(min=1e-12).log()
