"""Labelled images: the shipped emoji, a folder, an `.npz` file; and pixels to latents and back."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int64, UInt8
from torch import Tensor

from adaptok.errors import DataError, DtypeError
from adaptok.train.emoji import decode_emoji, read_emoji_index
from adaptok.train.image_files import IMAGE_ENDINGS, is_image_file, list_image_files
from adaptok.train.latents import is_latent_cache
from adaptok.train.pixels import (
    decode_image,
    depth_to_space,
    resize_pixels,
    space_to_depth,
    to_latent,
    to_uint8,
)

__all__ = [
    "ImageFiles",
    "ImageSet",
    "Split",
    "depth_to_space",
    "load_emoji",
    "load_image_folder",
    "load_npz",
    "open_image_set",
    "space_to_depth",
    "to_latent",
    "to_uint8",
]

Split = Literal["train", "test", "all"]

MAX_CLASSES = 100_000  # more in an .npz means that the labels are something else


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Images that stay on the disk until they are taken.

    Attributes:
        paths: the image files.
        size: edge in pixels to which each is cropped and resized.
    """

    paths: tuple[Path, ...]
    size: int

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """RGB images of one size with a class each.

    Attributes:
        images: in memory, or as files that are decoded when they are taken.
        labels: class of each image, an index into `class_names`.
        class_names: one name per class.
        name: what the set is called in logs and cards.

    Raises:
        DataError: the images are no RGB bytes, images and labels differ in number, or a label has
            no name.

    Example:
        >>> squares = ImageSet(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.zeros(5).long(),
        ...                    class_names=("square",), name="squares")
        >>> len(squares), squares[0].shape, squares.take([4, 2]).shape
        (5, torch.Size([3, 8, 8]), torch.Size([2, 3, 8, 8]))
    """

    images: UInt8[Tensor, "n 3 h w"] | ImageFiles
    labels: Int64[Tensor, " labels"]
    class_names: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        images = self.images
        if isinstance(images, Tensor) and (
            images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3
        ):
            raise DataError(
                f"{self.name} has images of {images.dtype} and shape {tuple(images.shape)}: "
                "give uint8 of (n, 3, h, w)"
            )
        if len(self.images) != len(self.labels):
            raise DataError(
                f"{self.name} has {len(self.images)} images and {len(self.labels)} labels: "
                "give one label for each image"
            )
        if not len(self.labels):
            raise DataError(f"{self.name} holds no image: give at least one")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise DataError(
                f"{self.name} has labels from {low} to {high} and {len(self.class_names)} class "
                f"names: labels must lie in 0 to {len(self.class_names) - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> UInt8[Tensor, "3 h w"]:
        if isinstance(self.images, ImageFiles):
            return decode_image(self.images.paths[index], self.images.size)
        return self.images[index]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of each image in pixels."""
        if isinstance(self.images, ImageFiles):
            return self.images.size, self.images.size
        return self.images.shape[2], self.images.shape[3]

    def take(self, indices: Sequence[int] | Tensor) -> UInt8[Tensor, "b 3 h w"]:
        """Bring the images of some indices into memory, in the order given.

        Args:
            indices: whole numbers from -n to n - 1.

        Returns:
            The images.

        Raises:
            DataError: an image file cannot be decoded.
            DtypeError: the indices are no whole numbers.
        """
        chosen = torch.as_tensor(indices)
        if chosen.numel() == 0:
            chosen = chosen.long()
        if chosen.dtype == torch.bool or chosen.is_floating_point() or chosen.ndim != 1:
            raise DtypeError(
                f"take got indices of dtype {chosen.dtype} with {chosen.ndim} axes: "
                "give a list of whole numbers"
            )
        if not isinstance(self.images, ImageFiles):
            return self.images[chosen.cpu()]
        if not len(chosen):
            return torch.empty(0, 3, *self.image_size, dtype=torch.uint8)
        return torch.stack([self[i] for i in chosen.tolist()])


def open_image_set(spec: str, size: int) -> ImageSet:
    """Open a set of images by what a person types.

    Args:
        spec: `emoji` (the training split of the shipped set), a folder, or an `.npz` file. A
            folder that is itself called emoji is `./emoji`.
        size: edge of the images in pixels.

    Returns:
        The set.

    Raises:
        DataError: nothing of that name exists, or it cannot be read.

    Example:
        >>> open_image_set("emoji", size=32).image_size
        (32, 32)
    """
    if spec == "emoji":
        return load_emoji(size=size)
    path = Path(spec).expanduser()
    if is_latent_cache(path):
        raise DataError(f"{spec} holds latents of images, and the images themselves are needed")
    if path.is_dir():
        return load_image_folder(path, size=size)
    if path.is_file() and path.suffix == ".npz":
        return load_npz(path, size=size)
    what = "neither a folder nor an .npz file" if path.exists() else "not found"
    raise DataError(f"data {spec!r} is {what}: give emoji, a folder of images, or an .npz file")


def load_emoji(
    *,
    size: int = 64,
    split: Split = "train",
    categories: Sequence[str] | None = None,
    skin_variants: bool = True,
    folder: Traversable | None = None,
) -> ImageSet:
    """Load the Fluent Emoji that ship with adaptok; the classes are the categories.

    Args:
        size: edge in pixels, at most 64.
        split: train, test or all. All variants of one emoji (skin tone, gender, hair) are in the
            same split.
        categories: only these, which then are the classes, in alphabetical order.
        skin_variants: with the copies of an emoji in other skin tones.
        folder: where `scripts/convert_emoji.py` wrote; the shipped set if not given.

    Returns:
        The set.

    Raises:
        DataError: a split, category or size that the set does not have, or damaged files.
        MissingPackageError: Pillow is not installed.

    Example:
        >>> food = load_emoji(size=32, split="test", categories=["Food & Drink"])
        >>> food.class_names, food[0].shape
        (('Food & Drink',), torch.Size([3, 32, 32]))
    """
    index = read_emoji_index(folder)
    chosen = index.classes if categories is None else tuple(sorted(set(categories)))
    unknown = sorted(set(chosen) - set(index.classes))
    if unknown or not chosen:
        raise DataError(
            f"the emoji have no category {', '.join(unknown) or '(none given)'}: "
            f"give one or more of {', '.join(index.classes)}"
        )
    if split not in ("train", "test", "all"):
        raise DataError(f"the emoji have no split {split!r}: give train, test or all")
    if not 1 <= size <= index.size:
        raise DataError(f"the emoji are {index.size} px: size {size} must lie in 1 to {index.size}")
    cells = [
        cell
        for cell, entry in enumerate(index.entries)
        if entry.category in chosen
        and split in (entry.split, "all")
        and (skin_variants or not entry.is_skin_variant)
    ]
    pixels = decode_emoji(index, folder)[cells]
    return ImageSet(
        images=_stack_images(pixels, size),
        labels=torch.tensor([chosen.index(index.entries[cell].category) for cell in cells]),
        class_names=chosen,
        name=f"emoji-{split}",
    )


def load_image_folder(path: str | Path, *, size: int = 64) -> ImageSet:
    """Open a folder of images; each is decoded only when it is taken.

    Args:
        path: a folder with one folder per class, in any depth below it, or with the images
            themselves, which then are one class. Hidden files and other file types are passed over.
        size: edge in pixels to which each image is cropped (centre) and resized.

    Returns:
        The set; classes and images are in the order of their names.

    Raises:
        DataError: there is no image, a class folder without any, or images beside class folders.
    """
    root = Path(path)
    _check_size(size)
    if not root.is_dir():
        raise DataError(f"{root} is no folder: give a folder of images")
    try:
        children = sorted(child for child in root.iterdir() if not child.name.startswith("."))
        loose = [child for child in children if is_image_file(child)]
        classes = {child.name: list_image_files(child) for child in children if child.is_dir()}
        lost = [child for child in children if child.is_symlink() and not child.exists()]
    except OSError as error:
        raise DataError(f"cannot list {root} ({error}): make it readable") from error
    if any(not is_image_file(child) for child in lost):
        raise DataError(f"{lost[0]} is a link to nothing: mend or remove it")
    if loose and any(classes.values()):
        raise DataError(
            f"{root} holds both images and class folders: move the images into a class folder"
        )
    if loose:
        classes = {root.resolve().name: loose}
    if not any(classes.values()):
        raise DataError(
            f"{root} holds no image: put images ({', '.join(sorted(IMAGE_ENDINGS))}) into it, "
            "or into one folder per class"
        )
    for name, paths in classes.items():
        if not paths:
            raise DataError(f"the class folder {root / name} holds no image: fill or remove it")
    labels = [label for label, paths in enumerate(classes.values()) for _ in paths]
    return ImageSet(
        images=ImageFiles(tuple(file for paths in classes.values() for file in paths), size),
        labels=torch.tensor(labels),
        class_names=tuple(classes),
        name=root.resolve().name,
    )


def load_npz(path: str | Path, *, size: int | None = None) -> ImageSet:
    """Load an `.npz` file with the arrays `images` and `labels`.

    Args:
        path: the file. `images` is uint8 of (n, h, w, c) or (n, c, h, w) with 1, 3 or 4 channels
            (grey, RGB, RGB with transparency); `labels` holds n whole numbers from 0.
        size: edge in pixels to which each image is cropped (centre) and resized; as they are if
            not given.

    Returns:
        The set, with class names 0, 1, ...

    Raises:
        DataError: the file cannot be read, or an array is missing or has another shape or dtype.
    """
    if size is not None:
        _check_size(size)
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in ("images", "labels") if name in content}
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,  # numpy found a single array, which cannot be closed
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise DataError(
            f"cannot read {path} ({error}): give an .npz file, written with numpy.savez, that "
            "holds arrays of numbers"
        ) from error
    missing = [name for name in ("images", "labels") if name not in arrays]
    if missing:
        raise DataError(f"{path} has no array {' and '.join(missing)}: it needs images and labels")
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8:
        raise DataError(f"images of {path} have dtype {images.dtype}: give uint8, 0 to 255")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(
            f"labels of {path} have dtype {labels.dtype} and shape {labels.shape}: give one "
            "whole number per image"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise DataError(
            f"labels of {path} lie in {labels.min()} to {labels.max()}: number the classes from 0"
        )
    labels = labels.astype(np.int64)
    return ImageSet(
        images=_stack_images(_to_rgb(images, path), size),
        labels=torch.from_numpy(labels),
        class_names=tuple(str(label) for label in range(int(labels.max(initial=-1)) + 1)),
        name=Path(path).stem,
    )


def _to_rgb(images: UInt8[np.ndarray, "..."], path: str | Path) -> UInt8[np.ndarray, "n h w 3"]:
    channels = (1, 3, 4)
    if images.ndim == 4 and images.shape[3] in channels:
        last = images
    elif images.ndim == 4 and images.shape[1] in channels:
        last = rearrange(images, "n c h w -> n h w c")
    else:
        raise DataError(
            f"images of {path} have shape {images.shape}: give (n, h, w, c) or (n, c, h, w) with "
            "1, 3 or 4 channels"
        )
    if 0 in last.shape:
        raise DataError(f"images of {path} have shape {images.shape}: give at least one pixel")
    if last.shape[3] == 4:
        alpha = last[..., 3:].astype(np.uint16)
        mixed = last[..., :3] * alpha + 255 * (255 - alpha)  # at most 255 * 255
        return ((mixed + 127) // 255).astype(np.uint8)
    return np.repeat(last, 3, axis=3) if last.shape[3] == 1 else last


def _stack_images(
    pixels: UInt8[np.ndarray, "n h w 3"], size: int | None
) -> UInt8[Tensor, "n 3 h2 w2"]:
    if size is not None and len(pixels):
        pixels = np.stack([resize_pixels(image, size) for image in pixels])
    return torch.from_numpy(rearrange(pixels, "n h w c -> n c h w").copy())


def _check_size(size: int) -> None:
    if size < 1:
        raise DataError(f"image size is {size}: give at least 1 pixel")
