"""A folder of images becomes a cache of latents; a run that was stopped goes on where it was."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from adaptok.errors import ConfigError, DataError, StorageError
from adaptok.train.data import load_image_folder
from adaptok.train.latents import (
    INDEX_FILE,
    CacheIndex,
    Shard,
    ShardHeader,
    is_latent_cache,
    read_cache_index,
)
from adaptok.train.shards import (
    EncodeOptions,
    Part,
    Progress,
    ShardWriter,
    plan_parts,
    read_unreadable,
)
from adaptok.train.vae import Autoencoder

SETTINGS = ("image_size", "crop", "mirrored", "dtype", "shard_size")
NAMED = 5  # unreadable files that an error names


@dataclass(frozen=True, slots=True)
class EncodeSummary:
    """What came of it.

    Args:
        index: of the cache.
        images: how many images it holds.
        kept_shards: shards that were there already.
    """

    index: CacheIndex
    images: int
    kept_shards: int


def encode_folder(
    folder: str | Path,
    output: str | Path,
    autoencoder: Autoencoder,
    options: EncodeOptions,
    progress: Progress | None = None,
) -> EncodeSummary:
    """Encode a folder of images into a cache of latents, or go on with one that was stopped.

    A shard appears whole or not at all. Shards whose image files have not changed are kept.

    Args:
        folder: one folder per class, as `load_image_folder` reads it.
        output: folder of the cache.
        autoencoder: turns pixels into latents, on the device it is on.
        options: how.
        progress: called with the images that are done and their number.

    Returns:
        The index of the cache, which is complete.

    Raises:
        DataError: there is no image, some cannot be read, or the output is another cache.
        ConfigError: the size does not fit the autoencoder, or the output lies in the folder.
        StorageError: the disk is full or the output is no place for a cache; shards that were
            written are kept.
    """
    root, cache = Path(folder).expanduser(), Path(output).expanduser()
    check_places(root, cache)
    factor = autoencoder.source.factor
    if options.size % factor:
        raise ConfigError(
            f"images of {options.size} px cannot be encoded: the autoencoder makes one cell of "
            f"{factor} x {factor} pixels, so give a multiple of {factor}"
        )
    images = load_image_folder(root, size=options.size)
    index = CacheIndex(
        source=autoencoder.source,
        image_size=options.size,
        mirrored=options.mirrored,
        dtype=options.dtype,
        shard_size=options.shard_size,
        name=images.name,
        class_names=images.class_names,
    )
    open_cache(cache, index)
    parts = plan_parts(root, images, index)
    found = {part.file: read_unreadable(cache / part.file, part.fingerprint) for part in parts}
    whole = {file for file, names in found.items() if names is not None}
    if not options.skip_unreadable:
        whole = {file for file in whole if not found[file]}
    left = [part for part in parts if part.file not in whole]
    writer = ShardWriter(root, cache, images, autoencoder, options)
    unreadable = writer.write(left, progress)
    if unreadable and not options.skip_unreadable:
        named = ", ".join(unreadable[:NAMED]) + (", ..." if len(unreadable) > NAMED else "")
        raise DataError(
            f"{len(unreadable)} of {len(images)} image files in {folder} cannot be read: {named}. "
            "Repair or remove them, or leave them out with --skip-unreadable; shards without them "
            "are kept"
        )
    index = finish_cache(cache, index, parts)
    return EncodeSummary(index, sum(index.class_counts), len(whole))


def check_places(root: Path, cache: Path) -> None:
    """Refuse an output that lies in the folder of images, or around it."""
    inner, outer = cache.absolute(), root.absolute()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ConfigError(
            f"the output {cache} and the images {root} lie in each other, where shards and images "
            "would be mixed up: choose an output folder beside them"
        )


def open_cache(cache: Path, index: CacheIndex) -> None:
    """Make the folder of a cache, or go on in one that was made with the same settings.

    Args:
        cache: its folder.
        index: what is to be encoded, without shards.

    Raises:
        DataError: the folder holds a cache with other settings.
        StorageError: it holds other files, or cannot be written.
    """
    if is_latent_cache(cache):
        before = read_cache_index(cache)
        wrong = index.source.describe_differences(before.source)
        wrong += [
            f"{name} {getattr(before, name)} where {getattr(index, name)} is asked for"
            for name in SETTINGS
            if getattr(before, name) != getattr(index, name)
        ]
        if wrong:
            raise DataError(
                f"{cache} holds latents that were made in another way ({', '.join(wrong)}): give "
                "the settings that it was made with, or another output folder"
            )
    elif cache.exists() and (not cache.is_dir() or any(cache.iterdir())):
        raise StorageError(f"{cache} holds other files: give a new folder for the latents")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for leftover in cache.glob(".shard-*"):
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write into {cache}: {error}") from error
    index.to_json_file(cache / INDEX_FILE)


def finish_cache(cache: Path, index: CacheIndex, parts: Sequence[Part]) -> CacheIndex:
    """Write the index of a cache whose shards are all there.

    Args:
        cache: its folder.
        index: without shards.
        parts: the shards.

    Returns:
        The whole index.

    Raises:
        DataError: of a class, no image could be read.
    """
    shards: list[Shard] = []
    unreadable: list[str] = []
    counts = torch.zeros(len(index.class_names), dtype=torch.long)
    for part in parts:
        with safe_open(cache / part.file, framework="pt") as file:
            labels = file.get_tensor("labels").long()
        unreadable += ShardHeader.read(cache / part.file).unreadable
        counts += torch.bincount(labels, minlength=len(counts))
        shards.append(Shard(file=part.file, images=len(labels), fingerprint=part.fingerprint))
    empty = [name for name, n in zip(index.class_names, counts.tolist(), strict=True) if not n]
    if empty:
        raise DataError(
            f"of {len(empty)} classes no image can be read, such as {empty[0]}: repair the images "
            "or remove the class folders"
        )
    for surplus in set(cache.glob("shard-*.safetensors")) - {cache / s.file for s in shards}:
        surplus.unlink()  # of a folder that held more images when this was stopped
    content = json.dumps([[shard.fingerprint for shard in shards], unreadable])
    source = index.source.model_copy(
        update={"cache_hash": hashlib.sha256(content.encode()).hexdigest()}
    )
    whole = index.model_copy(
        update={
            "source": source,
            "class_counts": tuple(counts.tolist()),
            "unreadable": tuple(unreadable),
            "shards": tuple(shards),
            "complete": True,
        }
    )
    whole.to_json_file(cache / INDEX_FILE)
    return whole
