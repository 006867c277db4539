"""The processes of a run: what they need to come out even, to see alike, and to agree on."""

import atexit
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptok.dc.config import DCDiTConfig
from adaptok.errors import ConfigError
from adaptok.optional import import_optional
from adaptok.train.batches import Share, TrainingSet, check_share, draw_batch
from adaptok.train.checkpoint import STATE_FILE, DataMark
from adaptok.train.config import TrainConfig
from adaptok.train.sharding import Sharding, read_sharding

# What shards the model itself keeps its weights where these checkpoints do not look.
REFUSED = ("DEEPSPEED", "MEGATRON_LM", "TP", "XLA")
SAMPLED_STEPS = 8  # of which one sample is compared; of all others only the labels
ADVICE = {
    "options": "start all with the same options",
    "data": "give all the same images, and the same versions of packages",
    "checkpoint": "give all the same output folder, on a disk that all machines share",
}


def start_accelerator() -> Any:  # noqa: ANN401
    """Find out which device and which processes there are.

    Precision is the run's own business and not the launcher's: a run must not change with the
    way it is started.

    Raises:
        ConfigError: the launcher asks for what training cannot do, or its processes do not see
            each other.
        MissingPackageError: accelerate is not installed.
    """
    try:
        accelerator = import_optional("accelerate", extra="train").Accelerator(mixed_precision="no")
    except ValueError as error:
        raise ConfigError(
            f"accelerate refuses to start ({error}): call train in a process of its own"
        ) from error
    kind = accelerator.distributed_type.value
    if kind in REFUSED:
        raise ConfigError(
            f"the launcher asks for {kind}, and training runs data-parallel or with FSDP 2: choose "
            "multi-GPU, multi-CPU or FSDP (`accelerate config`)"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > accelerator.num_processes:
        raise ConfigError(
            f"the launcher started {started} processes, and they do not see each other: set "
            "ACCELERATE_USE_CPU=true to train on CPUs, or start no more processes than GPUs"
        )
    return accelerator


@dataclass(frozen=True, slots=True, eq=False)
class Processes:
    """All processes of a run, seen from this one.

    Args:
        accelerator: devices and processes.
        group: all of them, connected through the host; None for a single process.
        sharding: how they share the model; None where each has all of it.
    """

    accelerator: Any
    group: Any = None
    sharding: Sharding | None = None

    @classmethod
    def start(cls) -> "Processes":
        """Join the other processes, as the launcher arranged it.

        Raises:
            ConfigError: the launcher asks for what training cannot do.
            MissingPackageError: accelerate is not installed.
        """
        sharding = read_sharding(os.environ)
        accelerator = start_accelerator()
        if accelerator.num_processes == 1:
            return cls(accelerator)  # nothing to share
        atexit.register(accelerator.end_training)
        # Through the host, so that agreeing on a stop does not make a GPU wait.
        return cls(accelerator, torch.distributed.new_group(backend="gloo"), sharding)

    @property
    def share(self) -> Share:
        """Which part of each batch is this process's."""
        return Share(self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return bool(self.accelerator.is_main_process)

    def agree(self, requested: bool) -> bool:
        """Say whether any process was asked to stop: all stop after the same step."""
        if self.group is None:
            return requested
        flag = torch.tensor(int(requested))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def average(self, values: Tensor) -> Tensor:
        """Return the mean of numbers over the processes."""
        averaged: Tensor = self.accelerator.reduce(values, reduction="mean")
        return averaged

    def gather(self, value: Tensor) -> Tensor:
        """Return a number of each process, in a row."""
        gathered: Tensor = self.accelerator.gather(value.reshape(1))
        return gathered

    def wait(self) -> None:
        """Return once all processes have come here."""
        self.accelerator.wait_for_everyone()

    def compare(self, seen: Mapping[str, str]) -> None:
        """Raise a `ConfigError` unless all processes see the same.

        Args:
            seen: fingerprints by what they are of, with the same names in all processes.

        Raises:
            ConfigError: some differ, in all processes alike.
        """
        if self.group is None:
            return
        # 60 bits fit a whole number
        mine = torch.tensor([int(print_[:15], 16) for print_ in seen.values()])
        rows = [torch.empty_like(mine) for _ in range(self.share.ranks)]
        torch.distributed.all_gather(rows, mine, group=self.group)
        for rank, row in enumerate(rows):
            wrong = [name for name, same in zip(seen, (row == rows[0]).tolist(), strict=True)
                     if not same]  # fmt: skip
            if wrong:
                raise ConfigError(
                    f"process {rank} differs from process 0 in its {' and '.join(wrong)}: "
                    + "; ".join(ADVICE[name] for name in wrong)
                )


def fingerprint(*parts: bytes) -> str:
    """Return a short text that differs where the bytes do."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def fingerprint_data(config: TrainConfig, images: TrainingSet) -> str:
    """Return a fingerprint of what a run learns from: all labels, and some samples as drawn.

    Args:
        config: the run.
        images: its images.

    Returns:
        A text that also differs where the same seed gives other random numbers.
    """
    alone = Share(0, config.batch_size)  # one sample of each batch
    drawn = [draw_batch(config, images, step, alone).tensors for step in range(SAMPLED_STEPS)]
    return fingerprint(
        images.labels.numpy().tobytes(),
        "\n".join(images.class_names).encode(),
        *(part.numpy().tobytes() for parts in drawn for part in parts),
    )


def mark_data(images: TrainingSet) -> DataMark:
    """Return what says that images are the same ones, wherever they lie.

    Args:
        images: what a run learns from.
    """
    labels = images.labels
    return DataMark(
        images=len(labels),
        class_names=images.class_names,
        labels=fingerprint(labels.numpy().tobytes()),
    )


def fingerprint_checkpoint(folder: Path | None) -> str:
    """Return a fingerprint of a checkpoint: its name and its state."""
    if folder is None:
        return fingerprint()
    state = folder / STATE_FILE
    return fingerprint(folder.name.encode(), state.read_bytes() if state.is_file() else b"")


def check_processes(config: TrainConfig, ranks: int) -> None:
    """Raise a `ConfigError` unless a step comes out even over processes and micro-batches.

    Args:
        config: the run.
        ranks: number of processes.

    Raises:
        ConfigError: there are more processes than samples, or samples or groups of the ratio
            loss would be cut unevenly.

    Example:
        >>> check_processes(TrainConfig(batch_size=64, ratio_group=16), ranks=4)
    """
    if ranks > config.batch_size:
        raise ConfigError(
            f"{ranks} processes and batch_size={config.batch_size}: each process needs a sample "
            f"of its own, so start at most {config.batch_size} processes or raise batch_size"
        )
    check_share(config, ranks)
    if not isinstance(config.model, DCDiTConfig):
        return
    pieces = ranks * config.accumulation
    piece = config.batch_size // pieces
    # The ratio loss is no mean over samples: its groups must be those of one process.
    group = min(config.ratio_group, config.batch_size)
    if pieces > 1 and piece % group:
        fitting = [size for size in range(1, piece + 1) if piece % size == 0]
        raise ConfigError(
            f"ratio_group={config.ratio_group}, and each of {ranks} processes sees {piece} samples "
            f"at a time (batch_size={config.batch_size}, accumulation={config.accumulation}), so "
            "that the ratio loss would change with the number of processes: ratio_group "
            f"{', '.join(map(str, fitting))} fits, and so does a batch_size that is a multiple "
            f"of {config.ratio_group * pieces}"
        )
