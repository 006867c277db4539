"""The files of the shipped emoji set, as `scripts/convert_emoji.py` writes them."""

import hashlib
import io
import json
from dataclasses import dataclass
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable

import numpy as np
from einops import rearrange
from jaxtyping import UInt8

from adaptok.errors import DataError
from adaptok.optional import import_optional

FORMAT = 1
REMEDY = "install adaptok again, or run scripts/convert_emoji.py"


@dataclass(frozen=True, slots=True)
class EmojiEntry:
    """What is known about one picture.

    Attributes:
        code_points: Unicode code points in hexadecimal, joined by hyphens.
        name: lower-case English name.
        category: one of eight, the class.
        subcategory: a finer division of the category.
        is_skin_variant: it is a copy of another picture in another skin tone.
        base: the same for all variants of one emoji.
        split: train or test, the same for all pictures of one base.
    """

    code_points: str
    name: str
    category: str
    subcategory: str
    is_skin_variant: bool
    base: str
    split: str


@dataclass(frozen=True, slots=True)
class EmojiIndex:
    """The table of the set.

    Attributes:
        size: edge of a cell in pixels.
        columns: cells in a row of the atlas.
        sha256: atlas files (luma, blue and red difference) with their hashes.
        classes: the categories in alphabetical order.
        entries: one per picture, in the order of the cells.
    """

    size: int
    columns: int
    sha256: dict[str, str]
    classes: tuple[str, ...]
    entries: tuple[EmojiEntry, ...]


def read_emoji_index(folder: Traversable | None = None) -> EmojiIndex:
    """Read the names, categories, base emoji and splits of the emoji set.

    Args:
        folder: where `scripts/convert_emoji.py` wrote; the shipped set if not given.

    Returns:
        The index.

    Raises:
        DataError: the index is missing or damaged.

    Example:
        >>> index = read_emoji_index()
        >>> len(index.entries), index.classes[:2]
        (3121, ('Activities', 'Animals & Nature'))
    """
    path = _locate(folder).joinpath("emoji.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _check_format(content["format"], path)
        rows = (dict(zip(content["fields"], row, strict=True)) for row in content["entries"])
        return EmojiIndex(
            size=content["size"],
            columns=content["columns"],
            sha256=content["sha256"],
            classes=tuple(content["classes"]),
            entries=tuple(EmojiEntry(**row) for row in rows),
        )
    except DataError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"cannot read the emoji index {path} ({error!r}): {REMEDY}") from error


def decode_emoji(
    index: EmojiIndex, folder: Traversable | None = None
) -> UInt8[np.ndarray, "n size size 3"]:
    """Decode all pictures of the emoji set.

    Args:
        index: what `read_emoji_index` gave for the same folder.
        folder: where `scripts/convert_emoji.py` wrote; the shipped set if not given.

    Returns:
        RGB pixels in the order of the index.

    Raises:
        DataError: an atlas file is missing or damaged, or belongs to another index.
        MissingPackageError: Pillow is not installed.

    Example:
        >>> decode_emoji(read_emoji_index()).shape
        (3121, 64, 64, 3)
    """
    image_module = import_optional("PIL.Image", extra="train")
    bands = []
    for name, expected in index.sha256.items():
        path = _locate(folder).joinpath(name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the emoji atlas {path} ({error}): {REMEDY}") from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise DataError(f"{path} is not the file that emoji.json describes: {REMEDY}")
        bands.append(image_module.open(io.BytesIO(content)).convert("L"))
    sheet = np.asarray(image_module.merge("YCbCr", bands).convert("RGB"))
    cells = rearrange(
        sheet, "(r h) (k w) c -> (r k) h w c", k=index.columns, h=index.size, w=index.size
    )
    return cells[: len(index.entries)]


def _check_format(found: object, path: Traversable) -> None:
    if found != FORMAT:
        raise DataError(f"{path} has format {found}, not {FORMAT}: {REMEDY}")


def _locate(folder: Traversable | None) -> Traversable:
    return package_files("adaptok").joinpath("zoo") if folder is None else folder
