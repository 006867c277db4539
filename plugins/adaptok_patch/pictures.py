"""Entropy of the pixels of each patch, as APT measures it."""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Real
from torch import Tensor

from adaptok.errors import ConfigError, ShapeError
from adaptok_patch.scales import SCALES, check_scales

BINS = 512
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in a grey value (Rec. 601)
WHITE = 255.0
ROWS = 1 << 14  # histograms that are held at once


def patch_entropy(
    images: Real[Tensor, "b c h w"], patch: int, bins: int = BINS, peak: float = WHITE
) -> Float[Tensor, "b h2 w2"]:
    """Return the Shannon entropy of the grey values of each patch, in bits.

    The grey values of a patch are counted in `bins` bins of equal width from 0 to `peak`; with p
    the shares of the bins, the entropy is `-sum p log2 p`: 0 where the patch is flat, and at most
    `log2(bins)`. Eight-bit pictures of one channel fill 256 of 512 bins.

    Args:
        images: pixels in [0, peak], one channel (grey) or three (RGB), any number type.
        patch: edge of a patch in pixels.
        bins: number of bins.
        peak: value of white.

    Returns:
        Entropies, one per patch; a patch that the border cuts is infinite, and is never used.

    Raises:
        ShapeError: the images have another shape.
        ConfigError: patch, bins or peak are out of range, or a pixel is.

    Example:
        >>> halves = torch.zeros(1, 1, 4, 8)
        >>> halves[..., 2:4] = 255.0  # half of the first patch is white
        >>> patch_entropy(halves, patch=4)
        tensor([[[1., 0.]]])

    Paper: Choudhury et al., Accelerating Vision Transformers with Adaptive Patch Sizes,
    arXiv 2510.18091.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ShapeError(
            f"images are (b, 1, h, w) or (b, 3, h, w), got the shape {tuple(images.shape)}"
        )
    if patch < 1 or bins < 2 or not peak > 0:
        raise ConfigError(
            f"patch is at least 1, bins at least 2 and peak above 0, got {patch}, {bins}, {peak:g}"
        )
    grey = to_grey(images)
    check_pixels(grey, peak)
    b, height, width = grey.shape
    h, w = height // patch, width // patch
    whole = grey[:, : h * patch, : w * patch]
    pixels = rearrange(whole, "b (h p) (w q) -> (b h w) (p q)", p=patch, q=patch)
    parts = [histogram_entropy(rows / peak, bins) for rows in pixels.split(ROWS)]
    entropy = torch.cat(parts) if parts else grey.new_zeros(0)
    cut = (0, math.ceil(width / patch) - w, 0, math.ceil(height / patch) - h)
    return torch.nn.functional.pad(entropy.view(b, h, w), cut, value=math.inf)


def measure_entropy(
    images: Real[Tensor, "b c h w"],
    patch: int,
    scales: Sequence[int] = SCALES,
    bins: int = BINS,
    peak: float = WHITE,
) -> dict[int, Float[Tensor, "b _h2 _w2"]]:
    """Return the entropy of all coarse patches of pictures, for `entropy_maps` and `quadtree`.

    Args:
        images: pixels in [0, peak], as large as the host sees them.
        patch: edge of the host's own patch in pixels; of latents, in pixels of the picture.
        scales: edges of patches in patches of the host; the finest one needs no entropy.
        bins: number of bins.
        peak: value of white.

    Returns:
        By scale, the entropies in bits.

    Raises:
        ShapeError: see `patch_entropy`.
        ConfigError: see `patch_entropy`, or the scales are no powers of two from 1.

    Example:
        >>> maps = measure_entropy(torch.rand(2, 3, 64, 96), patch=8, peak=1.0)
        >>> {scale: tuple(entropy.shape) for scale, entropy in maps.items()}
        {2: (2, 4, 6), 4: (2, 2, 3)}
    """
    coarse = check_scales(scales)[1:]
    return {scale: patch_entropy(images, patch * scale, bins, peak) for scale in coarse}


def to_grey(images: Real[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Return the grey values of images of one or three channels, in float32."""
    x = images.float()
    if x.shape[1] == 1:
        return x[:, 0]
    red, green, blue = x.unbind(1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def check_pixels(grey: Float[Tensor, "b h w"], peak: float) -> None:
    """Raise a `ConfigError` unless all pixels lie in [0, peak], but for rounding."""
    if not grey.numel():
        return
    low, high = (float(value) for value in grey.aminmax())
    if not (low >= -1e-3 * peak and high <= 1.001 * peak):
        raise ConfigError(
            f"pixels lie in [0, {peak:g}], got values from {low:g} to {high:g}: undo the host's "
            "normalisation, and give peak=1.0 for pictures in [0, 1]"
        )


def histogram_entropy(values: Float[Tensor, "k p"], bins: int) -> Float[Tensor, " k"]:
    """Return the entropy in bits of the histogram of each row of values in [0, 1]."""
    place = (values * bins).long().clamp(0, bins - 1)
    ones = torch.ones_like(values)
    counts = values.new_zeros(values.shape[0], bins).scatter_add(1, place, ones)
    share = counts / values.shape[1]
    nats: Tensor = torch.special.entr(share).sum(1)
    return nats / math.log(2)
