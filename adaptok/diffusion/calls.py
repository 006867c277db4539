"""Calling a model in sampling: its budgets, its guidance, its classes, its device."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adaptok.blocks import find_adaptive
from adaptok.budgets import Amount, Budget, check_amount
from adaptok.errors import (
    BudgetError,
    ConfigError,
    DeviceError,
    DtypeError,
    LabelError,
    ShapeError,
)

WALKS = itertools.count()  # each one is a request of its own


@dataclass(frozen=True, slots=True, eq=False)
class ModelCall:
    """A model with everything that stays the same from step to step.

    Args:
        model: the model.
        y: class of each image, `(b)`.
        budget: how many cells the conditional half keeps, or both halves.
        guidance_scale: 1 runs the conditional half only.
        guided_channels: leading channels that are guided; None leaves it to the model.
        uncond_drop: tail-drop fraction of the unconditional half.
        dtype: dtype of the images that the model is given.
        trace: whether to ask for the routing.
    """

    model: nn.Module
    y: Int[Tensor, " b"]
    budget: Budget
    guidance_scale: float
    guided_channels: int | None
    uncond_drop: Amount | None
    dtype: torch.dtype
    trace: bool

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise ConfigError(f"guidance_scale needs a number, got {self.guidance_scale}")
        if self.is_guided:
            if self.uncond_drop is not None:
                check_amount("drop", self.uncond_drop)
            if not hasattr(self.model, "forward_with_cfg") or count_classes(self.model) is None:
                raise ConfigError(
                    f"guidance needs a model with forward_with_cfg and config.num_classes, and "
                    f"{type(self.model).__name__} has not both: set guidance_scale=1"
                )
        elif self.uncond_drop is not None:
            raise BudgetError(
                "uncond_drop has no effect without an unconditional half: "
                "set guidance_scale to something else than 1"
            )
        elif self.guided_channels is not None:
            raise ConfigError(
                "guided_channels has no effect without guidance: "
                "set guidance_scale to something else than 1"
            )

    @property
    def is_guided(self) -> bool:
        """Whether there is an unconditional half."""
        return self.guidance_scale != 1.0

    def __call__(
        self, x: Float[Tensor, "b c h w"], time: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b k h w"], Any]:
        """Return the prediction for the labels in float32, and the routing when traced."""
        options: dict[str, Any] = {
            name: amount
            for name in ("keep", "tokens", "drop")
            if (amount := getattr(self.budget, name)) is not None
        }
        if self.trace:
            options["return_routing"] = True
        x = x.to(self.dtype)
        if self.is_guided:
            if self.uncond_drop is not None:
                options["uncond_drop"] = self.uncond_drop
            if self.guided_channels is not None:
                options["guided_channels"] = self.guided_channels
            null = torch.full_like(self.y, count_classes(self.model) or 0)
            out = self.model.forward_with_cfg(  # type: ignore[operator]
                torch.cat([x, x]),
                torch.cat([time, time]),
                torch.cat([self.y, null]),
                cfg_scale=self.guidance_scale,
                **options,
            )
        else:
            out = self.model(x, time, self.y, **options)
        prediction, routing = out if self.trace else (out, None)
        return prediction[: x.shape[0]].float(), routing


@contextmanager
def evaluate(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own mode."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def open_request(model: nn.Module, steps: int) -> Iterator[None]:
    """Say that the calls inside a `with` block are the steps of one walk.

    Stages that reuse steps need it; for others, and for a model that is not wrapped, nothing is
    said, because a compiled model would have to run them outside of its graph. A request that the
    user opened holds.

    Args:
        model: the model.
        steps: how many steps the walk has.
    """
    blocks = find_adaptive(model)
    stages = [] if blocks is None else [s for s in blocks.stages if s.effects.keeps_state]
    if blocks is None or not stages:
        yield
        return
    before = blocks.request
    blocks.request = before or (f"adaptok.diffusion walk {next(WALKS)}", None)
    name, _ = blocks.request
    try:
        for stage in stages:  # a stage of somebody else may have neither
            getattr(stage, "announce", skip)(name, steps)
        yield
    finally:
        blocks.request = before
        for stage in stages:
            getattr(stage, "forget", skip)(name)


def skip(*args: object) -> None:
    """Do nothing."""


def count_classes(model: nn.Module) -> int | None:
    """Return the number of classes that a model's config names; it is also the null class."""
    count = getattr(getattr(model, "config", None), "num_classes", None)
    return None if count is None else int(count)


def find_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Return the device that was asked for, or the one that the model lies on."""
    places = [value.device for value in model.parameters()]
    wanted = torch.device(device) if device is not None else (*places, torch.device("cpu"))[0]
    if not places:
        return wanted
    if wanted.type != places[0].type or wanted.index not in (None, places[0].index):
        raise DeviceError(
            f"the model lies on {places[0]}, and device={wanted} was asked for: move it first"
        )
    return places[0]


def find_dtype(model: nn.Module) -> torch.dtype:
    """Return the floating-point dtype of most of a model's numbers: some parts stay float32."""
    sizes: dict[torch.dtype, int] = {}
    for value in model.parameters():
        if value.is_floating_point():
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def find_shape(model: nn.Module, shape: tuple[int, int, int] | None) -> tuple[int, int, int]:
    """Return channels, height and width that were asked for, or those of the model's config."""
    if shape is None:
        config: Any = getattr(model, "config", None)
        if not (hasattr(config, "in_channels") and hasattr(config, "grid")):
            raise ConfigError(
                f"{type(model).__name__} does not say how large its images are: "
                "give shape=(channels, height, width)"
            )
        h, w = config.grid
        shape = (config.in_channels, h, w)
    sizes = tuple(shape)
    if len(sizes) != 3 or min(sizes) < 1:
        raise ShapeError(f"shape needs channels, height and width, all positive, got {sizes}")
    return sizes


def read_labels(
    labels: Int[Tensor, " b"] | Sequence[int], num_classes: int | None, device: torch.device
) -> Int[Tensor, " b"]:
    """Return the labels as one int64 per image, or raise if one of them is no class."""
    try:
        y = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise LabelError(
            f"labels are the numbers of classes, one per image, got {labels!r}: find a name in the "
            "class_names of the model's card"
        ) from None
    if y.ndim != 1 or y.shape[0] < 1:
        raise ShapeError(f"labels needs one class per image (b,), got {tuple(y.shape)}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise DtypeError(f"labels needs whole numbers, got {y.dtype}")
    wrong = y[(y < 0) | (y > (num_classes if num_classes is not None else y))]
    if wrong.numel():
        bound = (
            "0 or more"
            if num_classes is None
            else f"from 0 to {num_classes - 1}, or {num_classes} for no class"
        )
        raise LabelError(f"a label needs to be {bound}, got {int(wrong[0])}")
    return y.to(device=device, dtype=torch.int64)
