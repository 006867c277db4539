"""`.npz` files that may be larger than memory: written piece by piece, read where they lie."""

import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from adaptok.errors import ShapeError, StorageError
from adaptok.storage import sync_to_disk

LOCAL_HEADER = 30  # bytes in front of the name of a member, its last four are two lengths
NEVER = (1980, 1, 1, 0, 0, 0)  # the same arrays make the same file, whenever


@dataclass(frozen=True, slots=True, eq=False)
class ArrayPieces:
    """An array that comes in pieces along its first axis.

    Args:
        shape: of the whole array.
        dtype: of the whole array.
        pieces: its rows in order; consumed once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Iterable[Shaped[np.ndarray, "..."]]

    @classmethod
    def of(cls, array: Shaped[np.ndarray, "..."]) -> "ArrayPieces":
        """Take an array that is in memory as one piece."""
        return cls(array.shape, array.dtype, [array])


def write_npz(path: str | Path, arrays: Mapping[str, ArrayPieces]) -> None:
    """Write arrays to an `.npz` file without compression; only one piece is in memory at a time.

    Args:
        path: the file; it is complete when this returns, and not before.
        arrays: arrays by name.

    Raises:
        StorageError: the file cannot be written.
        ShapeError: pieces do not make up the array that was announced.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "two.npz"
        >>> rows = (np.full((1, 3), i, dtype=np.uint8) for i in range(2))
        >>> write_npz(path, {"arr_0": ArrayPieces((2, 3), np.dtype(np.uint8), rows)})
        >>> np.load(path, allow_pickle=False)["arr_0"].tolist()
        [[0, 0, 0], [1, 1, 1]]
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as content:
            for name, array in arrays.items():
                write_member(content, name, array)
        sync_to_disk(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}") from error


def write_member(content: zipfile.ZipFile, name: str, array: ArrayPieces) -> None:
    """Write one array of an `.npz` file, in numpy's own format."""
    header = {
        "descr": np.lib.format.dtype_to_descr(array.dtype),
        "fortran_order": False,
        "shape": array.shape,
    }
    written = 0
    with content.open(zipfile.ZipInfo(f"{name}.npy", NEVER), "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for piece in array.pieces:
            if piece.dtype != array.dtype or piece.shape[1:] != array.shape[1:]:
                raise ShapeError(
                    f"a piece of {name} is {piece.dtype} of shape {piece.shape}, and the array is "
                    f"{array.dtype} of shape {array.shape}: they must agree but for the rows"
                )
            member.write(np.ascontiguousarray(piece).data)
            written += piece.shape[0]
    if written != array.shape[0]:
        raise ShapeError(f"the pieces of {name} have {written} rows, not {array.shape[0]}")


def map_npz_array(path: str | Path, name: str) -> Shaped[np.ndarray, "..."]:
    """Open an array of an `.npz` file; what is not compressed stays on the disk until it is used.

    Args:
        path: the file.
        name: of the array.

    Returns:
        The array, not to be written to.

    Raises:
        OSError: the file cannot be read.
        KeyError: there is no such array.
        ValueError: it is no array, or holds Python objects, which are never loaded.
        zipfile.BadZipFile: the file is truncated, or no `.npz`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.npz"
        >>> np.savez(path, arr_0=np.arange(6).reshape(2, 3))
        >>> type(map_npz_array(path, "arr_0")).__name__
        'memmap'
    """
    with Path(path).open("rb") as file:
        with zipfile.ZipFile(file) as content:
            member = content.getinfo(f"{name}.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            file.seek(member.header_offset)
            header = file.read(LOCAL_HEADER)
            if len(header) < LOCAL_HEADER:
                raise zipfile.BadZipFile(f"the array {name} is cut off")
            file.seek(sum(struct.unpack("<HH", header[-4:])), 1)
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
                if not dtype.hasobject and dtype.itemsize and 0 not in shape:
                    order: Literal["C", "F"] = "F" if is_fortran else "C"
                    return np.memmap(path, dtype, "r", file.tell(), shape, order)
    with np.load(path, allow_pickle=False) as arrays:
        array: np.ndarray = arrays[name]
        return array
