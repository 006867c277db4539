"""What a diffusion model is trained to say, as frozen values with one interface."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptok.diffusion.schedule import (
    LinearSchedule,
    check_num_steps,
    check_range,
    linear_schedule,
    spread,
    variational_bits,
)
from adaptok.errors import ConfigError, DtypeError, ShapeError

Times = Int[Tensor, " b"] | Float[Tensor, " b"]
TimeDistribution = Literal["uniform", "logit-normal"]


@dataclass(frozen=True, slots=True, eq=False)
class ObjectiveLoss:
    """The loss of each sample.

    Args:
        total: what is trained on, `(b)`.
        parts: the named terms that `total` is the sum of, `(b)` each.
    """

    total: Float[Tensor, " b"]
    parts: Mapping[str, Float[Tensor, " b"]]


class Objective(ABC):
    """How images are noised, what the model is to predict, and what a wrong prediction costs.

    `t` is the objective's own time: step indices for `HybridObjective`, numbers in [0, 1] for
    `FlowObjective`. `model_time` turns it into what the model takes.
    """

    __slots__ = ()

    name: ClassVar[str]

    @abstractmethod
    def out_channels(self, c: int) -> int:
        """Return how many channels the model's output has for images of `c` channels."""

    @abstractmethod
    def times(self, u: Float[Tensor, " b"]) -> Times:
        """Turn uniform random numbers into times.

        Args:
            u: random numbers in [0, 1), one per sample.

        Returns:
            The time of each sample.

        Raises:
            ShapeError: not one number per sample.
            DtypeError: no floating-point numbers.
            ConfigError: a number out of range (checked on the CPU only).
        """

    @abstractmethod
    def model_time(self, t: Times) -> Float[Tensor, " b"]:
        """Return the times as the model takes them, float32 between 0 and 1,000."""

    @abstractmethod
    def noisy(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Times
    ) -> Float[Tensor, "b c h w"]:
        """Mix images with noise.

        Args:
            x0: clean images.
            noise: standard normal noise.
            t: time of each sample.

        Returns:
            Noisy images, float32.

        Raises:
            ShapeError: the shapes do not fit each other.
            DtypeError: a tensor has a dtype that does not fit.
            ConfigError: a time out of range (checked on the CPU only).
        """

    @abstractmethod
    def loss(
        self,
        prediction: Float[Tensor, "b k h w"],
        x0: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        t: Times,
    ) -> ObjectiveLoss:
        """Say how wrong a prediction is, for each sample, in float32.

        Args:
            prediction: the model's output for the noisy images, `out_channels(c)` channels.
            x0: clean images.
            noise: the noise that was mixed in.
            t: time of each sample.

        Returns:
            The loss of each sample, and its parts by name.

        Raises:
            ShapeError: the shapes do not fit each other.
            DtypeError: a tensor has a dtype that does not fit.
            ConfigError: a time out of range (checked on the CPU only).
        """

    @abstractmethod
    def predict_x0(
        self, prediction: Float[Tensor, "b k h w"], x: Float[Tensor, "b c h w"], t: Times
    ) -> Float[Tensor, "b c h w"]:
        """Return the clean image that a prediction stands for, given the noisy image `x`."""

    @abstractmethod
    def predict_from_x0(
        self, x0: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"], t: Times
    ) -> Float[Tensor, "b c h w"]:
        """Return the prediction (without variance) that stands for the clean image `x0`."""


@dataclass(frozen=True, slots=True)
class HybridObjective(Objective):
    """Noise prediction with a learned variance on the linear schedule, as DiT trains.

    The loss is the squared error of the noise plus the variational bound in bits per dimension,
    the latter without a gradient into the noise, so that it trains the variance only.

    Args:
        num_steps: number of diffusion steps.

    Raises:
        ConfigError: the number of steps is no whole number, or too small.

    Example:
        >>> objective = HybridObjective()
        >>> t = objective.times(torch.tensor([0.0, 0.5]))
        >>> x0, noise = torch.zeros(2, 4, 8, 6), torch.randn(2, 4, 8, 6)
        >>> loss = objective.loss(torch.zeros(2, 8, 8, 6), x0, noise, t)
        >>> t, loss.total.shape, sorted(loss.parts)
        (tensor([  0, 500]), torch.Size([2]), ['mse', 'vb'])

    Paper: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models",
    arXiv 2102.09672.
    """

    num_steps: int = 1000
    name: ClassVar[str] = "hybrid"

    def __post_init__(self) -> None:
        check_num_steps(self.num_steps)

    def out_channels(self, c: int) -> int:
        """Return `2 c`: noise, then the place of the variance between its two ends."""
        return 2 * c

    def times(self, u: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Turn uniform random numbers in [0, 1) into step indices."""
        check_uniform(u)
        return (u.float() * self.num_steps).long().clamp(max=self.num_steps - 1)

    def model_time(self, t: Times) -> Float[Tensor, " b"]:
        """Return the step index, scaled to 1,000 steps."""
        return t.float() * (1000 / self.num_steps)

    def noisy(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Times
    ) -> Float[Tensor, "b c h w"]:
        """Mix images with noise: the variance of the sum is kept."""
        check_images(x0, noise, t)
        table = self._table(t)
        return spread(table.signal[t]) * x0.float() + spread(table.noise[t]) * noise.float()

    def loss(
        self,
        prediction: Float[Tensor, "b k h w"],
        x0: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        t: Times,
    ) -> ObjectiveLoss:
        """Return squared error of the noise plus variational bound."""
        check_images(x0, noise, t)
        check_prediction(prediction, x0, self)
        table = self._table(t)
        epsilon, place = prediction.float().chunk(2, dim=1)
        error = noise.float() - epsilon
        mse = error.square().mean(dim=(1, 2, 3))
        bits = variational_bits(x0.float(), error.detach(), place, t, table)
        vb = bits.mean(dim=(1, 2, 3))
        return ObjectiveLoss(mse + vb, {"mse": mse, "vb": vb})

    def predict_x0(
        self, prediction: Float[Tensor, "b k h w"], x: Float[Tensor, "b c h w"], t: Times
    ) -> Float[Tensor, "b c h w"]:
        """Take the predicted noise out of the noisy image; a variance half is ignored."""
        table = self._table(t)
        epsilon = prediction[:, : x.shape[1]].float()
        return (x.float() - spread(table.noise[t]) * epsilon) / spread(table.signal[t])

    def predict_from_x0(
        self, x0: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"], t: Times
    ) -> Float[Tensor, "b c h w"]:
        """Return the noise that makes the noisy image out of the clean one."""
        table = self._table(t)
        return (x.float() - spread(table.signal[t]) * x0.float()) / spread(table.noise[t])

    def _table(self, t: Times) -> LinearSchedule:
        if t.is_floating_point() or t.dtype == torch.bool:
            raise DtypeError(f"t needs whole step indices, got {t.dtype}: use times(u)")
        check_range("t", t, 0.0, self.num_steps - 1.0)
        return linear_schedule(self.num_steps, t.device)


@dataclass(frozen=True, slots=True)
class FlowObjective(Objective):
    """Velocity prediction on straight lines between image (time 0) and noise (time 1).

    Args:
        time_distribution: how times are drawn: `"uniform"`, or `"logit-normal"`, which prefers
            the middle.
        shift: above 1 moves times towards noise, in training and in sampling:
            `s -> shift * s / (1 + (shift - 1) * s)`. Larger images need larger shifts.

    Raises:
        ConfigError: an unknown distribution, or a shift that is not positive.

    Example:
        >>> objective = FlowObjective()
        >>> x0, noise = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
        >>> objective.noisy(x0, noise, torch.tensor([0.25])).mean().item()
        0.25
        >>> objective.loss(noise - x0, x0, noise, torch.tensor([0.25])).total.item()
        0.0

    Papers: Lipman et al., "Flow Matching for Generative Modeling", arXiv 2210.02747;
    Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206.
    """

    time_distribution: TimeDistribution = "uniform"
    shift: float = 1.0
    name: ClassVar[str] = "flow"

    def __post_init__(self) -> None:
        choices = get_args(TimeDistribution)
        if self.time_distribution not in choices:
            raise ConfigError(
                f"time_distribution is one of {', '.join(choices)}, got {self.time_distribution!r}"
            )
        check_shift(self.shift)

    def out_channels(self, c: int) -> int:
        """Return `c`: a velocity per channel."""
        return c

    def times(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Turn uniform random numbers in [0, 1) into times."""
        check_uniform(u)
        s = u.float()
        if self.time_distribution == "logit-normal":
            s = torch.special.ndtri(s).sigmoid()
        return self.shift * s / (1 + (self.shift - 1) * s)

    def model_time(self, t: Times) -> Float[Tensor, " b"]:
        """Return 1,000 times the time."""
        return 1000 * t.float()

    def noisy(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Times
    ) -> Float[Tensor, "b c h w"]:
        """Go from the image towards the noise in a straight line."""
        check_images(x0, noise, t)
        s = self._checked(t)
        return (1 - s) * x0.float() + s * noise.float()

    def loss(
        self,
        prediction: Float[Tensor, "b k h w"],
        x0: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        t: Times,
    ) -> ObjectiveLoss:
        """Return the squared error of the velocity `noise - x0`."""
        check_images(x0, noise, t)
        check_prediction(prediction, x0, self)
        self._checked(t)
        mse = (prediction.float() - (noise.float() - x0.float())).square().mean(dim=(1, 2, 3))
        return ObjectiveLoss(mse, {"mse": mse})

    def predict_x0(
        self, prediction: Float[Tensor, "b k h w"], x: Float[Tensor, "b c h w"], t: Times
    ) -> Float[Tensor, "b c h w"]:
        """Follow the velocity back to time 0."""
        return x.float() - self._checked(t) * prediction.float()

    def predict_from_x0(
        self, x0: Float[Tensor, "b c h w"], x: Float[Tensor, "b c h w"], t: Times
    ) -> Float[Tensor, "b c h w"]:
        """Return the velocity that leads from the clean image to the noisy one."""
        return (x.float() - x0.float()) / self._checked(t)

    def _checked(self, t: Times) -> Float[Tensor, "b 1 1 1"]:
        if not t.is_floating_point():
            raise DtypeError(f"t needs times in [0, 1], got {t.dtype}: use times(u)")
        check_range("t", t, 0.0, 1.0)
        return spread(t.float())


def make_objective(name: str, **options: Any) -> Objective:  # noqa: ANN401
    """Make an objective by its name.

    Args:
        name: `"hybrid"` or `"flow"`.
        **options: the fields of that objective.

    Returns:
        The objective.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.

    Example:
        >>> make_objective("flow", shift=3.0)
        FlowObjective(time_distribution='uniform', shift=3.0)
    """
    kinds: dict[str, type[HybridObjective] | type[FlowObjective]] = {
        "hybrid": HybridObjective,
        "flow": FlowObjective,
    }
    if name not in kinds:
        raise ConfigError(f"there is no objective {name!r}: choose one of {', '.join(kinds)}")
    known = [field.name for field in fields(kinds[name])]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ConfigError(
            f"the objective {name!r} has no option {', '.join(unknown)}: "
            f"it takes {', '.join(known)}"
        )
    return kinds[name](**options)


def check_shift(shift: object) -> None:
    """Raise a `ConfigError` unless a shift of times is a positive number."""
    if not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise ConfigError(f"shift needs a positive number, got {shift!r}: 1 is no shift")


def check_uniform(u: Tensor) -> None:
    """Raise unless there is one floating-point number in [0, 1] per sample."""
    if u.ndim != 1:
        raise ShapeError(f"times needs one random number per sample (b,), got {tuple(u.shape)}")
    if not u.is_floating_point():
        raise DtypeError(f"times needs floating-point random numbers, got {u.dtype}")
    check_range("u", u, 0.0, 1.0)


def check_images(x0: Tensor, noise: Tensor, t: Tensor) -> None:
    """Raise unless images, noise and times fit each other."""
    if x0.ndim != 4 or x0.shape != noise.shape:
        raise ShapeError(
            "images and noise need the same shape (b, c, h, w), got "
            f"{tuple(x0.shape)} and {tuple(noise.shape)}"
        )
    if not (x0.is_floating_point() and noise.is_floating_point()):
        raise DtypeError(
            f"images and noise need floating-point numbers, got {x0.dtype} and {noise.dtype}: "
            "scale images to [-1, 1] first"
        )
    if t.shape != x0.shape[:1]:
        raise ShapeError(f"t needs one time per sample, ({x0.shape[0]},), got {tuple(t.shape)}")


def check_prediction(prediction: Tensor, x0: Tensor, objective: Objective) -> None:
    """Raise unless a prediction has the shape that the objective needs."""
    b, c, h, w = x0.shape
    needed = (b, objective.out_channels(c), h, w)
    if tuple(prediction.shape) != needed:
        raise ShapeError(
            f"the objective {objective.name!r} needs a prediction of shape {needed}, got "
            f"{tuple(prediction.shape)}: set learn_sigma of the model to "
            f"{objective.out_channels(1) == 2}"
        )
    if not prediction.is_floating_point():
        raise DtypeError(f"a prediction needs floating-point numbers, got {prediction.dtype}")
