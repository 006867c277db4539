"""From image files to pixels, and from pixels to latents and back."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from adaptok.errors import DataError, DtypeError, ShapeError
from adaptok.optional import import_optional


def to_latent(images: Shaped[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
    """Map bytes to numbers in [-1, 1].

    Args:
        images: pixels 0 to 255.

    Returns:
        The same values in float32, -1 for 0 and 1 for 255.

    Raises:
        DtypeError: the images are not uint8.

    Example:
        >>> to_latent(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1)).flatten()
        tensor([-1.,  1.])
    """
    if images.dtype != torch.uint8:
        raise DtypeError(f"to_latent got {images.dtype}: give uint8 pixels from 0 to 255")
    return images.float() / 127.5 - 1


def to_uint8(latent: Shaped[Tensor, "*b c h w"]) -> UInt8[Tensor, "*b c h w"]:
    """Map numbers in [-1, 1] to bytes, the inverse of `to_latent`; what lies outside is clipped.

    Args:
        latent: values of any float dtype.

    Returns:
        Pixels 0 to 255.

    Raises:
        DtypeError: the latent is not of a float dtype.

    Example:
        >>> to_uint8(torch.tensor([-1.0, 0.0, 3.0]).view(3, 1, 1)).flatten()
        tensor([  0, 128, 255], dtype=torch.uint8)
    """
    if not latent.is_floating_point():
        raise DtypeError(f"to_uint8 got {latent.dtype}: give floats from -1 to 1")
    return ((latent.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def space_to_depth(x: Shaped[Tensor, "b c h w"], factor: int) -> Shaped[Tensor, "b c2 h2 w2"]:
    """Fold each square of pixels into the channels of one cell.

    Args:
        x: images or latents.
        factor: edge of the square in pixels.

    Returns:
        A grid with 1 / factor of the height and width and factor * factor times the channels.

    Raises:
        ShapeError: the height or width is no multiple of the factor.

    Example:
        >>> space_to_depth(torch.zeros(1, 3, 64, 32), 2).shape
        torch.Size([1, 12, 32, 16])
    """
    height, width = x.shape[-2:]
    if factor < 1 or height % factor or width % factor:
        raise ShapeError(
            f"space_to_depth got a grid of {height}x{width} and factor {factor}: "
            "height and width must be multiples of a factor of at least 1"
        )
    return rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=factor, q=factor)


def depth_to_space(x: Shaped[Tensor, "b c h w"], factor: int) -> Shaped[Tensor, "b c2 h2 w2"]:
    """Unfold the channels of each cell into a square of pixels, the inverse of `space_to_depth`.

    Args:
        x: a grid whose channels hold squares.
        factor: edge of the square in pixels.

    Returns:
        Images of factor times the height and width and 1 / factor**2 of the channels.

    Raises:
        ShapeError: the channels are no multiple of factor * factor.

    Example:
        >>> depth_to_space(torch.zeros(1, 12, 32, 16), 2).shape
        torch.Size([1, 3, 64, 32])
    """
    channels = x.shape[1]
    if factor < 1 or channels % factor**2:
        raise ShapeError(
            f"depth_to_space got {channels} channels and factor {factor}: "
            "the channels must be a multiple of factor * factor, with a factor of at least 1"
        )
    return rearrange(x, "b (c p q) h w -> b c (h p) (w q)", p=factor, q=factor)


def decode_image(path: Path, size: int) -> UInt8[Tensor, "3 h w"]:
    """Read an image file as RGB, cut out its central square and resize that.

    Transparent parts become white, grey images get three equal channels, and the rotation that a
    camera noted is applied. Of an animation the first frame is taken.

    Args:
        path: a file of any format that Pillow reads, with 8 or 16 bits per channel.
        size: edge of the result in pixels.

    Returns:
        The image.

    Raises:
        DataError: the file is missing, truncated, or no image.
        MissingPackageError: Pillow is not installed.
    """
    image_module = import_optional("PIL.Image", extra="train")
    operations = import_optional("PIL.ImageOps", extra="train")
    try:
        with image_module.open(path) as image:
            # A JPEG is decoded at half, a quarter or an eighth where that is still enough.
            image.draft("RGB", (2 * size, 2 * size))
            return _to_tensor(crop_and_resize(_to_rgb(operations.exif_transpose(image)), size))
    except (
        OSError,
        SyntaxError,  # Pillow's error for a broken PNG
        ValueError,
        EOFError,
        struct.error,
        image_module.DecompressionBombError,
    ) as error:
        raise DataError(
            f"cannot read the image {path} ({error}): repair, replace or remove the file"
        ) from error


def resize_pixels(pixels: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Cut out the central square and resize it, with antialiasing.

    Args:
        pixels: an RGB image.
        size: edge of the result in pixels.

    Returns:
        The resized image; the same array if nothing is to be done.
    """
    if pixels.shape[:2] == (size, size):
        return pixels
    image = import_optional("PIL.Image", extra="train").fromarray(pixels)
    return np.asarray(crop_and_resize(image, size))


def crop_and_resize(image: Any, size: int) -> Any:  # noqa: ANN401
    """Cut the central square out of a Pillow image and resize it.

    Args:
        image: a `PIL.Image.Image`.
        size: edge of the result in pixels.

    Returns:
        A new `PIL.Image.Image` of size x size.
    """
    lanczos = import_optional("PIL.Image", extra="train").Resampling.LANCZOS
    edge = min(image.size)
    left, top = (image.width - edge) / 2, (image.height - edge) / 2
    return image.resize((size, size), lanczos, box=(left, top, left + edge, top + edge))


def _to_rgb(image: Any) -> Any:  # noqa: ANN401
    image_module = import_optional("PIL.Image", extra="train")
    if image.mode.startswith("I;16"):  # Pillow would clip instead of scale
        return image_module.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("it has 32 bits per channel, 8 or 16 are needed")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colour = image.convert("RGBA")
    white = image_module.new("RGBA", colour.size, "white")
    return image_module.alpha_composite(white, colour).convert("RGB")


def _to_tensor(image: Any) -> UInt8[Tensor, "3 h w"]:  # noqa: ANN401
    return torch.from_numpy(rearrange(np.array(image), "h w c -> c h w").copy())
