"""Tensors and JSON on disk: written whole or not at all, read without pickle."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptok.errors import CheckpointError, StorageError


@contextmanager
def write_folder(folder: str | Path) -> Iterator[Path]:
    """Write a folder that appears whole or not at all, also when the process is killed.

    Args:
        folder: the folder to write. One that is there already is replaced if it holds nothing
            but files of the same names.

    Yields:
        A temporary folder beside it; write the files there. It takes the place of `folder`
        when the block ends without an error.

    Raises:
        StorageError: the disk is full, the place cannot be written to, or the folder holds
            other files; what was at `folder` is still there.
    """
    folder = Path(folder).resolve()  # behind a link
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"cannot write the folder {folder}: a file of that name is there")
    if folder.exists() and Path.cwd().is_relative_to(folder):
        raise StorageError(
            f"cannot write {folder}: it is replaced as a whole, and this process stands in it; "
            "give the name of a new folder inside"
        )
    restore_folder(folder)
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            sync_to_disk(path)
        foreign = list_foreign_files(folder, {path.name for path in unfinished.iterdir()})
        if not foreign:
            replace_folder(unfinished, folder)
            sync_to_disk(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise StorageError(
            f"cannot write {folder}: {error}. Free some space or choose another place; what was "
            "saved before is still there"
        ) from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if foreign:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise make_foreign_error(folder, foreign)


def refuse_foreign_files(folder: Path, names: set[str]) -> None:
    """Raise a `StorageError` if a folder holds what would be lost when it is replaced.

    Args:
        folder: the folder; it need not be there.
        names: files that may be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"cannot write the folder {folder}: a file of that name is there")
    foreign = list_foreign_files(folder, names)
    if foreign:
        raise make_foreign_error(folder, foreign)


def list_foreign_files(folder: Path, names: set[str]) -> list[str]:
    """Return what would be lost if a folder was replaced (see `refuse_foreign_files`)."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.name not in names)


def make_foreign_error(folder: Path, foreign: list[str]) -> StorageError:
    """Return the error that names what would be lost."""
    return StorageError(
        f"{folder} holds other files ({', '.join(foreign[:3])}), which would be lost: give a new "
        "folder"
    )


def replace_folder(new: Path, old: Path) -> None:
    """Put one folder in the place of another; the old one is removed last."""
    if not old.exists():
        new.rename(old)
        return
    outdated = old.with_name(f".{old.name}.outdated-{os.getpid()}")
    shutil.rmtree(outdated, ignore_errors=True)
    old.rename(outdated)
    try:
        new.rename(old)
    except OSError:
        outdated.rename(old)
        raise
    shutil.rmtree(outdated, ignore_errors=True)


def restore_folder(folder: str | Path) -> None:
    """Bring a folder back that a killed process had moved aside and not yet replaced.

    Args:
        folder: where it was; nothing happens if it is there.
    """
    folder = Path(folder)
    if folder.exists():
        return
    aside = sorted(folder.parent.glob(f".{folder.name}.outdated-*"))
    if aside:
        aside[-1].rename(folder)


def sync_to_disk(path: Path) -> None:
    """Make sure that a file or the entries of a folder have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file.

    Args:
        path: the file.
        tensors: tensors by name.
        metadata: text by name, kept in the header.

    Raises:
        StorageError: the file cannot be written.
    """
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    path = Path(path)
    try:
        path.touch()
        mode = path.stat().st_mode  # safetensors leaves a file that only its owner can read
        # no tensors with metadata {} would be a header that cannot be read back
        save_file(ready, path, dict(metadata) if metadata else None)
        path.chmod(mode)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise StorageError(f"cannot write {path}: {error}") from error


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read tensors from a safetensors file; no other format is ever read.

    Args:
        path: the file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no complete safetensors file ({error}): it may be truncated, or a "
            "pickle, which is never loaded; save it again as safetensors"
        ) from error


def load_json(path: str | Path) -> dict[str, Any]:
    """Read an object from a JSON file.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        CheckpointError: the file is missing, or holds no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} needs a JSON object, got a {type(content).__name__}")
    return content


def save_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write an object to a JSON file.

    Args:
        path: the file.
        content: what `json` can write.

    Raises:
        StorageError: the file cannot be written.
    """
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all.

    Args:
        path: the file; what was there stays until the new text is on the disk.
        text: its content.

    Raises:
        StorageError: the file cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        sync_to_disk(unfinished)
        unfinished.replace(path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error}") from error
