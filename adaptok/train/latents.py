"""Images as latents on the disk: shards of safetensors, read where they lie, and their index."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Int, Int64, Shaped
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaptok.config import Config
from adaptok.errors import ConfigError, DataError
from adaptok.train.vae import LatentSource, Posterior

INDEX_FILE = "latents.json"
HEADER = "adaptok"  # one entry, since safetensors writes several in any order
NotNegative = Annotated[int, Field(ge=0)]
StoredDtype = Literal["float16", "float32"]
AGAIN = "run the same `adaptok encode` command again, which keeps what is whole"


class Shard(Config):
    """One file of a cache.

    Args:
        file: its name.
        images: how many images it holds.
        fingerprint: of the images that it was made of.
    """

    file: str
    images: NotNegative
    fingerprint: str


class ShardHeader(Config):
    """What a shard says of itself.

    Args:
        fingerprint: of the images that it was made of.
        unreadable: image files that it leaves out.
    """

    fingerprint: str
    unreadable: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "ShardHeader":
        """Read the header of a shard that is whole.

        Args:
            path: the file.

        Returns:
            What it says.

        Raises:
            DataError: the file is missing, cut short, or no shard.
        """
        try:
            with safe_open(path, framework="pt") as file:  # checks the length, too
                found = (file.metadata() or {}).get(HEADER)
            return cls.from_json("{}" if found is None else found)
        except (SafetensorError, OSError, ConfigError) as error:
            raise DataError(f"cannot read the latents {path} ({error}): {AGAIN}") from error


class CacheIndex(Config):
    """What a cache of latents holds, and what it was made of.

    Args:
        source: the autoencoder.
        image_size: side of the images in pixels.
        crop: how they were cut: the central square, resized with Lanczos.
        mirrored: whether each image is there a second time, mirrored left to right.
        dtype: of the stored numbers.
        shard_size: image files per shard.
        name: of the folder of images.
        class_names: names of its classes, in order.
        class_counts: images of each class that are in the cache.
        unreadable: image files that were left out, relative to the folder.
        shards: the files, in order.
        complete: whether all images are encoded.
        version: version of this layout.
    """

    kind: Literal["adaptok-latents"] = "adaptok-latents"
    source: LatentSource
    image_size: Annotated[int, Field(ge=1)]
    crop: Literal["centre"] = "centre"
    mirrored: bool
    dtype: StoredDtype = "float16"
    shard_size: Annotated[int, Field(ge=1)]
    name: str
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...] = ()
    unreadable: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    version: Literal[1] = 1

    @property
    def views(self) -> int:
        """How often each image is there."""
        return 2 if self.mirrored else 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        side = self.image_size // self.source.factor
        return (self.source.channels, side, side)


def is_latent_cache(path: str | Path) -> bool:
    """Say whether a folder is a cache of latents, whole or not."""
    return (Path(path).expanduser() / INDEX_FILE).is_file()


def read_cache_index(path: str | Path) -> CacheIndex:
    """Read what a cache holds.

    Args:
        path: its folder.

    Returns:
        The index; its `complete` says whether the cache is.

    Raises:
        DataError: the index is damaged, or of a newer version.
    """
    try:
        return CacheIndex.from_json_file(Path(path).expanduser() / INDEX_FILE)
    except ConfigError as error:
        raise DataError(f"the index of the latents in {path} is damaged: {error}") from error


@lru_cache(maxsize=4096)  # all shards of ImageNet; a mapping costs address space, not memory
def map_shard(path: Path, fingerprint: str) -> Mapping[str, Tensor]:
    """Map a shard into memory: its numbers are read from the disk when they are used.

    Args:
        path: the file.
        fingerprint: that it must have; another file of the same name is mapped anew.

    Returns:
        `mean` and `std`, `(n views c h w)`, and `labels`, `(n)`.

    Raises:
        DataError: the file is missing, cut short, or of other images.
    """
    if ShardHeader.read(path).fingerprint != fingerprint:
        raise DataError(f"{path} was made of other images than its index says: {AGAIN}")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in ("mean", "std", "labels")}


@dataclass(frozen=True, slots=True, eq=False)
class LatentSet:
    """Latents of labelled images, which stay on the disk until they are taken.

    Args:
        folder: of the cache.
        index: what it holds.
        labels: class of each image, an index into `class_names`.
    """

    folder: Path
    index: CacheIndex
    labels: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per class."""
        return self.index.class_names

    @property
    def name(self) -> str:
        """What the set is called in logs and cards."""
        return self.index.name

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return (self.index.image_size, self.index.image_size)

    def take(
        self,
        indices: Sequence[int] | Int[Tensor, " b"],
        mirrored: Bool[Tensor, " b"] | None = None,
    ) -> Posterior:
        """Read the latents of some images, in the order given.

        Args:
            indices: numbers from 0 to n - 1.
            mirrored: which of them are wanted mirrored; None for none.

        Returns:
            Mean and standard deviation of each, in float32.

        Raises:
            DataError: a shard is damaged, or mirrored images are wanted and none are there.
        """
        rows = [int(i) for i in indices]
        views = [0] * len(rows) if mirrored is None else [int(flip) for flip in mirrored]
        if any(views) and not self.index.mirrored:
            raise DataError(
                f"{self.folder} holds no mirrored images: encode with --mirror, or train "
                "without flip"
            )
        ends = list(accumulate(shard.images for shard in self.index.shards))
        means, stds = [], []
        for row, view in zip(rows, views, strict=True):
            number = bisect_right(ends, row)
            shard = self.index.shards[number]
            numbers = map_shard(self.folder / shard.file, shard.fingerprint)
            inside = row - (ends[number] - shard.images)
            means.append(numbers["mean"][inside, view])
            stds.append(numbers["std"][inside, view])
        return Posterior(stack_latents(means, self), stack_latents(stds, self))


def stack_latents(
    latents: Sequence[Shaped[Tensor, "c h w"]], images: LatentSet
) -> Shaped[Tensor, "b c h w"]:
    """Bring latents into memory as one float32 tensor."""
    if not latents:
        return torch.empty(0, *images.index.latent_shape)
    return torch.stack(list(latents)).float()


def open_latents(path: str | Path) -> LatentSet:
    """Open a cache of latents that `adaptok encode` wrote.

    Args:
        path: its folder.

    Returns:
        The set; only its labels are in memory.

    Raises:
        DataError: the cache is not complete, or damaged.
    """
    folder = Path(path).expanduser().absolute()
    index = read_cache_index(folder)
    if not index.complete:
        there = len(list(folder.glob("shard-*.safetensors")))
        raise DataError(
            f"the latents in {path} are not complete ({there} shards are there): the command that "
            f"wrote them was stopped; {AGAIN}"
        )
    map_shard.cache_clear()  # files may have changed in place, and their mappings with them
    labels = []
    for shard in index.shards:
        numbers = map_shard(folder / shard.file, shard.fingerprint)
        shape = (shard.images, index.views, *index.latent_shape)
        if numbers["mean"].shape != shape or numbers["std"].shape != shape:
            raise DataError(
                f"{folder / shard.file} holds latents of shape {tuple(numbers['mean'].shape)}, and "
                f"its index says {shape}: {AGAIN}"
            )
        labels.append(numbers["labels"].long())
    return LatentSet(folder, index, torch.cat(labels))
