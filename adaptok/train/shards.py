"""Shards of a cache of latents: which image files make one, and how it is written."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adaptok.errors import ConfigError, DataError, StorageError
from adaptok.storage import save_tensors, sync_to_disk
from adaptok.train.batches import prepare_worker
from adaptok.train.data import ImageFiles, ImageSet
from adaptok.train.latents import HEADER, CacheIndex, ShardHeader, StoredDtype
from adaptok.train.pixels import decode_image
from adaptok.train.vae import Autoencoder

DTYPES = {"float16": torch.float16, "float32": torch.float32}
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """How images are encoded.

    Args:
        size: side in pixels to which each image is cropped (centre) and resized.
        mirrored: encode each image a second time, mirrored left to right.
        skip_unreadable: leave out image files that cannot be read, instead of refusing.
        batch_size: images that the autoencoder is given at once.
        shard_size: image files per shard.
        dtype: of the stored numbers.
        workers: processes that decode image files; 0 decodes in the main process.

    Raises:
        ConfigError: a number is out of range.
    """

    size: int
    mirrored: bool = True
    skip_unreadable: bool = False
    batch_size: int = 16
    shard_size: int = 2048
    dtype: StoredDtype = "float16"
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("size", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: at least 1 is needed")


@dataclass(frozen=True, slots=True)
class Part:
    """The image files of one shard.

    Args:
        file: name of the shard.
        places: numbers of the images in the set.
        fingerprint: of their paths, sizes and classes.
    """

    file: str
    places: range
    fingerprint: str


def plan_parts(root: Path, images: ImageSet, index: CacheIndex) -> list[Part]:
    """Say which image files make which shard.

    Args:
        root: folder of the images.
        images: its files.
        index: says how they are encoded, and how many make a shard.

    Returns:
        The shards; the fingerprint of one changes with the settings, the autoencoder, and path,
        size or class of its files.
    """
    paths, count = image_paths(images), len(images)
    how = index.model_dump_json(
        exclude={"name": True, "class_names": True, "source": {"name", "cache_hash"}}
    )
    parts = []
    for number, start in enumerate(range(0, count, index.shard_size)):
        places = range(start, min(start + index.shard_size, count))
        rows = [
            (paths[i].relative_to(root).as_posix(), paths[i].stat().st_size, int(images.labels[i]))
            for i in places
        ]
        fingerprint = hashlib.sha256(json.dumps([how, rows]).encode()).hexdigest()
        parts.append(Part(f"shard-{number:05d}.safetensors", places, fingerprint))
    return parts


def image_paths(images: ImageSet) -> tuple[Path, ...]:
    """Return the files of a set that was opened from a folder."""
    assert isinstance(images.images, ImageFiles)
    return images.images.paths


def read_unreadable(path: Path, fingerprint: str) -> tuple[str, ...] | None:
    """Return the image files that a shard leaves out, or None if there is no such whole shard."""
    try:
        header = ShardHeader.read(path)
    except DataError:
        return None
    return header.unreadable if header.fingerprint == fingerprint else None


class DecodedFiles(Dataset[UInt8[Tensor, "3 h w"] | str]):
    """Images by their number; in the place of one that cannot be read, the name of its file."""

    def __init__(self, root: Path, images: ImageSet) -> None:
        self.root, self.paths, self.size = root, image_paths(images), images.image_size[0]

    def __getitem__(self, place: int) -> UInt8[Tensor, "3 h w"] | str:
        try:
            return decode_image(self.paths[place], self.size)
        except DataError:
            return self.paths[place].relative_to(self.root).as_posix()

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, slots=True, eq=False)
class ShardWriter:
    """Writes the shards of a cache.

    Args:
        root: folder of the images.
        cache: where to.
        images: their files and classes.
        autoencoder: turns pixels into latents.
        options: how.
    """

    root: Path
    cache: Path
    images: ImageSet
    autoencoder: Autoencoder
    options: EncodeOptions

    def write(self, parts: Sequence[Part], progress: Progress | None) -> list[str]:
        """Encode and write some shards.

        Args:
            parts: which ones.
            progress: called with the images that are done and their number.

        Returns:
            The image files that could not be read. Unless they may be left out, their shards are
            not written.
        """
        unreadable: list[str] = []
        decoded = self.decode(parts)
        done = len(self.images) - sum(len(part.places) for part in parts)
        for part in parts:
            means, stds, labels, lost = [], [], [], []
            for places in self.cut(part):
                taken = list(zip(places, next(decoded), strict=True))
                readable = [(i, image) for i, image in taken if isinstance(image, Tensor)]
                lost += [name for _, name in taken if isinstance(name, str)]
                if readable and (not lost or self.options.skip_unreadable):
                    mean, std = self.encode(torch.stack([image for _, image in readable]))
                    means.append(mean)
                    stds.append(std)
                    labels += [int(self.images.labels[i]) for i, _ in readable]
                done += len(places)
                if progress is not None:
                    progress(done, len(self.images))
            unreadable += lost
            if not lost or self.options.skip_unreadable:
                self.save(part, means, stds, labels, lost)
        return unreadable

    def cut(self, part: Part) -> list[list[int]]:
        """Cut a shard into batches; none reaches into the next shard."""
        places, size = list(part.places), self.options.batch_size
        return [places[i : i + size] for i in range(0, len(places), size)]

    def decode(self, parts: Sequence[Part]) -> Iterator[list[UInt8[Tensor, "3 h w"] | str]]:
        """Decode the image files of some shards, batch by batch, ahead if there are workers."""
        workers = self.options.workers
        return iter(
            DataLoader(
                DecodedFiles(self.root, self.images),
                batch_sampler=[batch for part in parts for batch in self.cut(part)],
                num_workers=workers,
                collate_fn=list,
                worker_init_fn=prepare_worker if workers else None,
            )
        )

    def encode(self, pixels: UInt8[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation as they are stored, `(b views c h w)` each."""
        views = [pixels, pixels.flip(-1)] if self.options.mirrored else [pixels]
        found = [self.autoencoder.encode(view) for view in views]
        dtype = DTYPES[self.options.dtype]
        mean = torch.stack([posterior.mean for posterior in found], 1).to(dtype).cpu()
        std = torch.stack([posterior.std for posterior in found], 1).to(dtype).cpu()
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise DataError(
                f"a latent is too large for {self.options.dtype}: store it with --dtype float32"
            )
        return mean, std

    def save(
        self,
        part: Part,
        means: list[Tensor],
        stds: list[Tensor],
        labels: list[int],
        lost: list[str],
    ) -> None:
        """Write a shard, whole or not at all."""
        side = self.options.size // self.autoencoder.source.factor
        none = torch.empty(
            0, 2 if self.options.mirrored else 1, self.autoencoder.source.channels, side, side,
            dtype=DTYPES[self.options.dtype],
        )  # fmt: skip
        tensors = {
            "mean": torch.cat(means or [none]),
            "std": torch.cat(stds or [none]),
            "labels": torch.tensor(labels, dtype=torch.int32),
        }
        path = self.cache / part.file
        unfinished = self.cache / f".{part.file}.unfinished-{os.getpid()}"
        try:
            header = ShardHeader(fingerprint=part.fingerprint, unreadable=tuple(lost))
            save_tensors(unfinished, tensors, {HEADER: header.model_dump_json()})
            sync_to_disk(unfinished)
            unfinished.replace(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise StorageError(
                f"cannot write {path}: {error}. Free some space and run the same command again: "
                "earlier shards are kept"
            ) from error
