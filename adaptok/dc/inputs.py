"""Checks of what a latent diffusion model is called with."""

import torch
from torch import Tensor

from adaptok.dc.config import SMALLEST_LATENT, TransformerConfig
from adaptok.errors import DeviceError, DtypeError, LabelError, ShapeError


def check_inputs(
    x: Tensor, t: Tensor, y: Tensor, config: TransformerConfig, device: torch.device
) -> None:
    """Raise a clear error unless latents, times and labels fit the model.

    Args:
        x: latents, `(b c h w)`.
        t: times, `(b)`.
        y: labels, `(b)`.
        config: options of the model.
        device: where the model lies.

    Raises:
        ShapeError: a wrong number of axes, channels or samples, or too small a latent.
        DtypeError: latents that are no floating-point numbers, or labels that are no integers.
        DeviceError: an input lies on another device than the model.
        LabelError: a label is out of range. Labels on a GPU are not read, since that would
            make the host wait.
    """
    inputs: dict[str, object] = {"x": x, "t": t, "y": y}
    for name, given in inputs.items():
        if not isinstance(given, Tensor):
            raise DtypeError(
                f"{name} needs a tensor, got {given!r:.40}: "
                f"{'give one value per sample, as in ' if name != 'x' else ''}torch.tensor(...)"
            )
    if x.ndim != 4 or x.shape[0] < 1:
        raise ShapeError(f"x needs the shape (b, c, h, w), got {tuple(x.shape)}")
    b, c, h, w = x.shape
    if c != config.in_channels:
        raise ShapeError(
            f"x has {c} channels and the model was made for {config.in_channels}: give latents "
            f"of shape (b, {config.in_channels}, h, w), or set in_channels={c}"
        )
    if min(h, w) < SMALLEST_LATENT:
        raise ShapeError(
            f"a latent of {h} x {w} cells is smaller than a kernel: at least "
            f"{SMALLEST_LATENT} x {SMALLEST_LATENT} cells are needed"
        )
    for name, value in (("t", t), ("y", y)):
        if tuple(value.shape) != (b,):
            raise ShapeError(
                f"{name} needs one value per sample, the shape ({b},), got {tuple(value.shape)}"
            )
    if not x.is_floating_point():
        raise DtypeError(f"x needs floating-point numbers, got {x.dtype}: call x.float()")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise DtypeError(f"y needs integer labels, got {y.dtype}: call y.long()")
    for name, value in (("x", x), ("t", t), ("y", y)):
        if value.device != device:
            raise DeviceError(
                f"{name} lies on {value.device} and the model on {device}: move one of them"
            )
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(y, config.num_classes)


def check_labels(y: Tensor, num_classes: int) -> None:
    """Raise a `LabelError` unless all labels are classes or the null class."""
    low, high = int(y.min()), int(y.max())
    if low < 0 or high > num_classes:
        raise LabelError(
            f"label {low if low < 0 else high} is out of range: classes go from 0 to "
            f"{num_classes - 1}, and {num_classes} means no class"
        )
