"""Classifier-free guidance: pure functions on what a model said with and without its label."""

import math
from numbers import Real

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.errors import ConfigError, ShapeError


def guide(
    cond: Float[Tensor, "b c h w"],
    uncond: Float[Tensor, "b c h w"],
    scale: float,
    channels: int | None = 3,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Push the conditional prediction away from the unconditional one.

    Args:
        cond: the model's output with the labels.
        uncond: the model's output with the null class.
        scale: guidance scale; 1 leaves the conditional prediction as it is.
        channels: how many leading channels are guided. The default is that of published DiT
            models, which guide three of four. None means all channels of the two tensors, so a
            model with a learned variance passes its number of image channels instead.

    Returns:
        The conditional and the unconditional half: the guided channels are the same in both,
        the other channels are each half's own.

    Raises:
        ShapeError: the halves differ in shape, or have fewer channels than are to be guided.

    Example:
        >>> cond, uncond = torch.full((1, 4, 2, 2), 2.0), torch.ones(1, 4, 2, 2)
        >>> guided, other = guide(cond, uncond, scale=1.5)
        >>> guided[0, :, 0, 0], other[0, :, 0, 0]
        (tensor([2.5000, 2.5000, 2.5000, 2.0000]), tensor([2.5000, 2.5000, 2.5000, 1.0000]))

    Paper: Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598.
    """
    if cond.ndim != 4 or cond.shape != uncond.shape:
        raise ShapeError(
            "guidance needs two outputs of the same shape (b, c, h, w), got "
            f"{tuple(cond.shape)} and {tuple(uncond.shape)}"
        )
    available = cond.shape[1]
    guided = available if channels is None else channels
    if not 1 <= guided <= available:
        raise ShapeError(
            f"cannot guide {guided} channels of an output that has {available}: "
            f"give channels= between 1 and {available}, or None for all of them"
        )
    mixed = uncond[:, :guided] + scale * (cond[:, :guided] - uncond[:, :guided])
    return (
        torch.cat([mixed, cond[:, guided:]], dim=1),
        torch.cat([mixed, uncond[:, guided:]], dim=1),
    )


def check_guidance(scale: object, guided: int, image_channels: int) -> None:
    """Raise unless guidance keeps to the image: a variance is no direction to walk in.

    Args:
        scale: guidance scale.
        guided: leading channels that are guided.
        image_channels: channels of a latent; those behind them are of the variance.

    Raises:
        ConfigError: the scale is no finite number.
        ShapeError: there are not as many channels of the image.
    """
    known = torch.compiler.is_compiling() or isinstance(scale, torch.Tensor)
    if not known and not (isinstance(scale, Real) and math.isfinite(scale)):
        raise ConfigError(f"cfg_scale is a finite number, got {scale!r}")
    if not 1 <= guided <= image_channels:
        raise ShapeError(
            f"guided_channels is 1 to {image_channels}, the channels of a latent, got {guided}: "
            "None means all of them"
        )


def combine_halves(
    out: Float[Tensor, "b2 c h w"],
    scale: float,
    channels: int | None = 3,
) -> Float[Tensor, "b2 c h w"]:
    """Guide one output whose first half is conditional and whose second half is not.

    Args:
        out: the model's output for `b` labelled samples, then for the same `b` samples with
            the null class.
        scale: guidance scale; 1 leaves the conditional prediction as it is.
        channels: how many leading channels are guided; None means all of them.

    Returns:
        As many outputs as came: the guided channels are repeated in both halves, the other
        channels are each half's own.

    Raises:
        ShapeError: the number of outputs is odd, or there are too few channels.

    Example:
        >>> out = torch.tensor([2.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 4, 1, 1)
        >>> combine_halves(out, scale=1.5).flatten(1)
        tensor([[2.5000, 2.5000, 2.5000, 2.0000],
                [2.5000, 2.5000, 2.5000, 1.0000]])

    Paper: Ho and Salimans, "Classifier-Free Diffusion Guidance", arXiv 2207.12598.
    """
    if out.ndim != 4 or out.shape[0] < 2 or out.shape[0] % 2:
        raise ShapeError(
            "guidance needs a conditional and an unconditional half (2b, c, h, w), got "
            f"{tuple(out.shape)}"
        )
    cond, uncond = out.chunk(2, dim=0)
    return torch.cat(guide(cond, uncond, scale, channels), dim=0)
