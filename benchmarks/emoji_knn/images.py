"""Emoji for k-NN: which pictures are references and queries, and their pixels."""

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from adaptok.errors import DataError
from adaptok.train.emoji import EmojiEntry

Pixels = npt.NDArray[np.uint8]

TARBALL = "data/fluent_emoji_3d-1.1.0.tgz"


@dataclass(frozen=True, slots=True)
class Half:
    """One half of the base emoji: nothing in it is known to the other half.

    Args:
        references: pictures whose labels are known, equally many of each class.
        queries: pictures whose class is to be found; no base emoji is also a reference.
    """

    references: tuple[EmojiEntry, ...]
    queries: tuple[EmojiEntry, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """Two halves of the base emoji.

    Args:
        choice: where options are chosen.
        report: where what was chosen is measured.
    """

    choice: Half
    report: Half


def split_bases(entries: Sequence[EmojiEntry], references: int, queries: int) -> Split:
    """Split the emoji into two halves by base emoji, each with references and queries.

    Skin variants are left out, and of each base emoji one picture is used, the first. The bases
    of a class are ordered by a hash of their name and fall into the halves in turn; in a half the
    first ones are references, the next ones queries.

    Args:
        entries: the table of the set.
        references: pictures of each class that are references.
        queries: most pictures of each class that are queries.

    Returns:
        The split.

    Raises:
        DataError: a half has too few bases of a class for the references and one query.
    """
    first: dict[str, EmojiEntry] = {}
    for entry in entries:
        if not entry.is_skin_variant:
            first.setdefault(entry.base, entry)
    halves: list[tuple[list[EmojiEntry], list[EmojiEntry]]] = [([], []), ([], [])]
    for category in sorted({entry.category for entry in first.values()}):
        members = [entry for entry in first.values() if entry.category == category]
        members.sort(key=lambda entry: hash_name(entry.base))
        for half, own in zip(halves, (members[::2], members[1::2]), strict=True):
            if len(own) <= references:
                raise DataError(
                    f"half of {category!r} has {len(own)} base emoji: ask for fewer than "
                    f"{len(own)} references, got {references}"
                )
            half[0].extend(own[:references])
            half[1].extend(own[references : references + queries])
    choice, report = (Half(tuple(known), tuple(asked)) for known, asked in halves)
    return Split(choice, report)


def hash_name(base: str) -> bytes:
    """Return a number of a base emoji that has nothing to do with what it shows."""
    return hashlib.sha256(f"half {base}".encode()).digest()


def load_pictures(
    entries: Sequence[EmojiEntry], shared: Path, size: int, cache: Path
) -> npt.NDArray[np.uint8]:
    """Return the pictures on white, decoded once and kept in a cache.

    Args:
        entries: which pictures.
        shared: folder of the data (see `TARBALL`).
        size: edge in pixels.
        cache: folder for decoded pictures.

    Returns:
        RGB pixels `(n, size, size, 3)` in the order of the entries.

    Raises:
        DataError: a picture is not in the tarball.
    """
    names = [entry.code_points for entry in entries]
    path = cache / f"emoji-{size}px.npz"
    known = read_cache(path)
    if not known.keys() >= set(names):
        known |= decode_pictures(shared / TARBALL, set(names) - known.keys(), size)
        missing = sorted(set(names) - known.keys())
        if missing:
            raise DataError(f"{len(missing)} pictures are not in {TARBALL}, {missing[0]} first")
        write_cache(path, known)
    return np.stack([known[name] for name in names])


def read_cache(path: Path) -> dict[str, Pixels]:
    """Return the pictures of a cache by name; none if there is no cache."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def write_cache(path: Path, pictures: dict[str, Pixels]) -> None:
    """Write a cache, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **pictures)  # type: ignore[arg-type]
    os.replace(partial, path)  # noqa: PTH105


def decode_pictures(tarball: Path, names: set[str], size: int) -> dict[str, Pixels]:
    """Decode the named pictures of a tarball."""
    pictures = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            name = Path(member.name).stem
            content = archive.extractfile(member) if name in names else None
            if content is not None and member.name.endswith(".webp"):
                pictures[name] = flatten_on_white(content.read(), size)
    return pictures


def flatten_on_white(content: bytes, size: int) -> Pixels:
    """Put a picture on a white square, centred and undistorted, and bring it to a size.

    Args:
        content: an image file; the longer side sets the scale, the shorter one is padded.
        size: edge of the result in pixels.

    Returns:
        Pixels `(size, size, 3)`.
    """
    with Image.open(io.BytesIO(content)) as image:
        picture = image.convert("RGBA")
    edge = max(picture.size)
    square = Image.new("RGBA", (edge, edge), "white")
    square.alpha_composite(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return np.asarray(square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
