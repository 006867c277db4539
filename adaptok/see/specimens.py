"""Images to look at: shipped emoji by name, and a photograph."""

import difflib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from adaptok.errors import DataError
from adaptok.optional import import_optional
from adaptok.train.emoji import decode_emoji, read_emoji_index

FACE = (0, 20, 512, 532)  # left, upper, right, lower: the square around the face


def load_emoji(names: Sequence[str]) -> UInt8[np.ndarray, "b 64 64 3"]:
    """Return shipped emoji by their names.

    Args:
        names: lower-case English names.

    Returns:
        RGB pixels.

    Raises:
        DataError: no emoji has such a name, or the files are damaged.
        MissingPackageError: Pillow is not installed.

    Example:
        >>> load_emoji(["parrot", "rainbow"]).shape
        (2, 64, 64, 3)
    """
    index = read_emoji_index()
    known = [entry.name for entry in index.entries]
    for name in names:
        if name not in known:
            close = dict.fromkeys(difflib.get_close_matches(name, known, n=3))
            meant = f"; did you mean {', '.join(close)}?" if close else ""
            raise DataError(
                f"no shipped emoji is called {name!r}{meant} (names are in adaptok/zoo/emoji.json)"
            )
    pictures: UInt8[np.ndarray, "b 64 64 3"] = decode_emoji(index)
    return pictures[[known.index(name) for name in names]]


def load_photograph() -> UInt8[np.ndarray, "512 512 3"]:
    """Return a square of the photograph that comes with Matplotlib.

    It shows Grace Hopper (US Navy, public domain).

    Returns:
        RGB pixels.

    Raises:
        MissingPackageError: Matplotlib or Pillow is not installed.

    Example:
        >>> load_photograph().shape
        (512, 512, 3)
    """
    cbook = import_optional("matplotlib.cbook", extra="see")
    module = import_optional("PIL.Image", extra="see")
    with cbook.get_sample_data("grace_hopper.jpg") as file, module.open(file) as image:
        return np.asarray(image.convert("RGB").crop(FACE))
