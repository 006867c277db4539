"""Checkpoints of a run: safetensors and JSON in a folder that is there whole or not at all."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from adaptok import __version__
from adaptok.config import Config
from adaptok.dc.checkpoint import check_state
from adaptok.errors import CheckpointError, ConfigError, StorageError
from adaptok.storage import (
    load_json,
    load_tensors,
    restore_folder,
    save_json,
    save_tensors,
    write_folder,
)
from adaptok.train.sharding import shard_like

FOLDER = "checkpoints"
SHOWN_CLASSES = 8
STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
NAME = re.compile(r"step-(\d{8,})")


class DataMark(Config):
    """What a run learns from, so that it does not go on with something else.

    Args:
        images: how many there are.
        class_names: names of the classes in the order of their labels.
        labels: a fingerprint of all labels in order.
    """

    images: int
    class_names: tuple[str, ...]
    labels: str

    def __str__(self) -> str:
        shown = ", ".join(self.class_names[:SHOWN_CLASSES])
        more = ", ..." if len(self.class_names) > SHOWN_CLASSES else ""
        return f"{self.images} images of {len(self.class_names)} classes ({shown}{more})"


class RunState(Config):
    """What a checkpoint knows beside its tensors.

    Args:
        step: optimiser steps done.
        seconds: time spent on them.
        config: options of the run, as plain values.
        window: sums of what was measured since the last line of the log.
        window_steps: steps in those sums.
        scaler: state of the loss scaling of fp16.
        data: what it learned from; None in checkpoints of before there was this mark.
        versions: packages that the checkpoint was made with.
        version: version of this layout.
    """

    step: int = Field(ge=1)
    seconds: float = Field(ge=0)
    config: dict[str, Any]
    window: dict[str, float] = Field(default_factory=dict)
    window_steps: int = 0
    scaler: dict[str, float] = Field(default_factory=dict)
    data: DataMark | None = None
    versions: dict[str, str] = Field(
        default_factory=lambda: {
            "adaptok": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        }
    )
    version: int = Field(default=1, ge=1, le=1)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Everything that a run needs to go on.

    Args:
        state: step, options and what was measured.
        model: weights by name.
        ema: averaged weights by name.
        optimizer: moments and step counts, as `collect_moments` names them.
        folder: where it was read from.
    """

    state: RunState
    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    folder: Path = field(default=Path())


def check_same_data(found: DataMark, known: DataMark | None, name: str) -> None:
    """Raise a `ConfigError` unless a run goes on with the images that it began with.

    Args:
        found: what is there now.
        known: what the checkpoint learned from; None passes.
        name: of the data, as the user gave it.
    """
    if known is not None and found != known:
        alike = "" if str(found) != str(known) else ", whose labels are others"
        raise ConfigError(
            f"this run learned from {known}, and {name} holds {found} now{alike}: what a class "
            "means would change. Give it the same images again, or begin in another output folder"
        )


def list_checkpoints(output: Path) -> list[Path]:
    """Return the folders of all checkpoints of a run, the newest last."""
    folders = (output / FOLDER).glob("step-*")
    return sorted((path for path in folders if NAME.fullmatch(path.name)), key=read_step)


def name_checkpoint(output: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return output / FOLDER / f"step-{step:08d}"


def read_step(folder: Path) -> int:
    """Return the step that the name of a checkpoint tells."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def save_checkpoint(output: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint, then remove the oldest ones.

    Args:
        output: folder of the run.
        checkpoint: what to write.
        keep: how many of the newest checkpoints stay.

    Returns:
        Its folder.

    Raises:
        StorageError: it cannot be written; the checkpoints before it are untouched.
    """
    folder = name_checkpoint(output, checkpoint.state.step)
    with write_folder(folder) as unfinished:
        save_tensors(unfinished / MODEL_FILE, checkpoint.model)
        save_tensors(unfinished / EMA_FILE, checkpoint.ema)
        save_tensors(unfinished / OPTIMIZER_FILE, checkpoint.optimizer)
        save_json(unfinished / STATE_FILE, checkpoint.state.model_dump(mode="json"))
    for outdated in list_checkpoints(output)[:-keep]:
        # Renamed first: a kill between two files must not leave half a checkpoint under its name.
        hidden = outdated.with_name(f".{outdated.name}.outdated")
        shutil.rmtree(hidden, ignore_errors=True)
        try:
            outdated.rename(hidden)
        except OSError as error:
            raise StorageError(f"cannot remove the old checkpoint {outdated}: {error}") from error
        shutil.rmtree(hidden, ignore_errors=True)
    return folder


def remove_leftovers(output: Path) -> None:
    """Remove what killed processes left half-written or half-removed in the folder of a run."""
    restore_folder(output / "model")
    for place in (output, output / FOLDER):
        for kind in ("unfinished", "outdated"):
            for leftover in place.glob(f".*.{kind}*"):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Args:
        folder: what `save_checkpoint` wrote.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        CheckpointError: a file is missing, truncated or foreign; the message names it.
    """
    try:
        return Checkpoint(
            state=RunState(**load_json(folder / STATE_FILE)),
            model=load_tensors(folder / MODEL_FILE),
            ema=load_tensors(folder / EMA_FILE),
            optimizer=load_tensors(folder / OPTIMIZER_FILE),
            folder=folder,
        )
    except ConfigError as error:
        raise damaged(folder, f"{folder / STATE_FILE} is no state of a run ({error})") from error
    except CheckpointError as error:
        raise damaged(folder, str(error)) from error


def check_tensors(
    checkpoint: Checkpoint, model: Mapping[str, Tensor], names: Sequence[str]
) -> None:
    """Raise a `CheckpointError` unless the tensors of a checkpoint belong to a model.

    Args:
        checkpoint: what was read.
        model: state dict of the model.
        names: parameters that are trained.

    Raises:
        CheckpointError: names or shapes differ; the message names the file.
    """
    moments = {
        f"{kind}.{name}": model[name] for name in names for kind in ("exp_avg", "exp_avg_sq")
    }
    counts = {f"step.{name}": torch.zeros(()) for name in names}
    needed = {MODEL_FILE: model, EMA_FILE: model, OPTIMIZER_FILE: moments | counts}
    found = {
        MODEL_FILE: checkpoint.model,
        EMA_FILE: checkpoint.ema,
        OPTIMIZER_FILE: checkpoint.optimizer,
    }
    for file, tensors in found.items():
        try:
            check_state(tensors, needed[file])
        except CheckpointError as error:
            folder = checkpoint.folder
            raise damaged(folder, f"{folder / file} does not fit ({error})") from error


def damaged(folder: Path, reason: str) -> CheckpointError:
    """Make an error that says what is wrong with a checkpoint, and the way out."""
    return CheckpointError(
        f"the checkpoint {folder} cannot be used: {reason}. Delete this folder to go on from the "
        "checkpoint before it, or from the start if there is none"
    )


def collect_moments(optimizer: Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the state of an optimiser by the names of the parameters.

    Args:
        optimizer: with one group of parameters.
        names: their names, in the same order.

    Returns:
        Tensors called `exp_avg.<parameter>` and so on.
    """
    parameters = optimizer.param_groups[0]["params"]
    return {
        f"{kind}.{name}": value
        for name, parameter in zip(names, parameters, strict=True)
        for kind, value in optimizer.state[parameter].items()
    }


def restore_moments(
    optimizer: Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimiser the state that `collect_moments` returned.

    Args:
        optimizer: with one group of parameters, sharded or not.
        names: their names, in the same order.
        tensors: the state, whole.
    """
    numbers = {name: number for number, name in enumerate(names)}
    parameters = optimizer.param_groups[0]["params"]
    state: dict[int, dict[str, Tensor]] = {number: {} for number in numbers.values()}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        number = numbers[name]
        is_count = value.ndim == 0 and parameters[number].ndim != 0
        state[number][kind] = value if is_count else shard_like(value, parameters[number])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
