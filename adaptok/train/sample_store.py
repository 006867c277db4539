"""Many samples on the way to one file: the parts that are drawn, and how they are joined."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaptok.errors import CheckpointError, ConfigError, StorageError
from adaptok.storage import load_tensors, save_tensors, sync_to_disk
from adaptok.train.npz import ArrayPieces, write_npz
from adaptok.train.sample_plan import SamplePlan

RUN_FILE = "run.json"
JOINED = "joined.npz"
PART = re.compile(r"samples-(\d{8})-(\d{8})\.safetensors")
SPARE = 1 << 20  # bytes beside the pixels


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Samples of consecutive numbers.

    Args:
        images: pixels, `(b h w 3)`.
        tokens: tokens that ran for each in a step, mean over the steps, `(b)`.
        seconds: time that each took, its share of a batch, `(b)`.
    """

    images: UInt8[Tensor, "b h w 3"]
    tokens: Float[Tensor, " b"]
    seconds: Float[Tensor, " b"]


@dataclass(frozen=True, slots=True)
class SampleCost:
    """What the samples of a run cost, restarts included.

    Args:
        tokens: tokens of an image in a step, mean over all.
        seconds: of one image on the device of one process, mean over all.
    """

    tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class SampleStore:
    """The output file, and beside it the work folder with the parts that are drawn.

    Args:
        output: the `.npz` file.
        plan: what is drawn.
    """

    output: Path
    plan: SamplePlan

    @property
    def folder(self) -> Path:
        """The work folder."""
        return self.output.with_name(f"{self.output.name}.parts")

    def check(self) -> None:
        """Raise unless a run can begin here, or go on; nothing is changed on the disk.

        Raises:
            ConfigError: the output is there already, or the work folder is of another run.
            StorageError: the work folder holds something else, or the disk is too small.
        """
        if self.output.exists():
            raise ConfigError(f"{self.output} exists: remove it, or give another --output")
        if self.folder.exists() and not self.folder.is_dir():
            raise StorageError(f"{self.folder} is a file, and the work folder goes there: move it")
        drawn = self.count_drawn()
        if drawn:
            self.check_same_run(drawn)
        elif self.folder.is_dir():
            foreign = [name for name in self.list_files() if name != RUN_FILE]
            if foreign:
                raise StorageError(
                    f"{self.folder} holds other files ({', '.join(foreign[:3])}): the work folder "
                    "goes there, so move them"
                )
        self.check_space(self.plan.count - drawn)

    def check_same_run(self, drawn: int) -> None:
        """Raise a `ConfigError` unless the parts in the work folder belong to this plan."""
        way_out = (
            f"remove it to lose the {drawn} samples in it, or give another --output to keep them"
        )
        try:
            found = SamplePlan.from_json_file(self.folder / RUN_FILE)
        except ConfigError as error:
            raise ConfigError(
                f"the work folder {self.folder} cannot be used ({error}): {way_out}"
            ) from error
        differences = self.plan.describe_differences(found)
        if differences:
            raise ConfigError(
                f"the work folder {self.folder} is of another run ({'; '.join(differences)}): give "
                f"the same options to go on with it, {way_out}"
            )

    def check_space(self, missing: int) -> None:
        """Raise a `StorageError` unless the disk holds the missing parts and the whole file."""
        file = 0 if (self.folder / JOINED).exists() else self.plan.count
        needed = (missing + file) * self.plan.height * self.plan.width * 3 + SPARE
        parent = next(path for path in self.output.absolute().parents if path.is_dir())
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise StorageError(
                f"{parent} has {free / 1e9:.1f} GB free, and {self.plan.count} images of "
                f"{self.plan.width}x{self.plan.height} px need {needed / 1e9:.1f} GB, once in "
                "parts and once in the file: free some space, or give another --output"
            )

    def list_files(self) -> list[str]:
        """Return the names of what is in the work folder, but for what a kill left half-done."""
        with suppress(FileNotFoundError, NotADirectoryError):
            names = [path.name for path in self.folder.iterdir()]
            return sorted(name for name in names if ".unfinished-" not in name)
        return []

    def count_drawn(self) -> int:
        """Return how many samples are in whole parts."""
        if (self.folder / JOINED).exists():
            return self.plan.count
        return sum(len(numbers_of(name)) for name in self.list_files())

    def prepare(self) -> None:
        """Make the work folder ready: the plan, nothing half-done, nothing damaged.

        Only one process does it, while no other one draws.

        Raises:
            StorageError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.unfinished-*"):
                leftover.unlink(missing_ok=True)
            for name in self.list_files():
                if numbers_of(name) and not self.is_whole(name):
                    (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot make the work folder {self.folder}: {error}. Give another --output"
            ) from error
        self.plan.to_json_file(self.folder / RUN_FILE)

    def is_whole(self, name: str) -> bool:
        """Say whether a part can be read and has the size that its name and the plan tell."""
        plan, numbers = self.plan, numbers_of(name)
        try:
            with safe_open(self.folder / name, "pt") as part:
                images = part.get_slice("images")
                shape, dtype = images.get_shape(), images.get_dtype()
                other = [part.get_slice(key).get_shape() for key in ("tokens", "seconds")]
        except (SafetensorError, OSError):
            return False
        b = len(numbers)
        fits = shape == [b, plan.height, plan.width, 3] and dtype == "U8"
        return fits and other == [[b], [b]] and numbers.stop <= plan.count

    def list_parts(self) -> list[range]:
        """Return the numbers of each part that is drawn, in order."""
        return sorted(filter(None, map(numbers_of, self.list_files())), key=lambda part: part.start)

    def list_missing(self, batch: int) -> list[range]:
        """Return what is still to be drawn, in batches.

        With the same batch size the batches of a resumed run are those of an unbroken one.

        Args:
            batch: the largest number of samples of a part.

        Returns:
            Numbers of samples.
        """
        if (self.folder / JOINED).exists():
            return []
        gaps, start = [], 0
        for part in [*self.list_parts(), range(self.plan.count, self.plan.count)]:
            gaps.append(range(start, part.start))
            start = part.stop
        return [
            range(max(first, gap.start), min(first + batch, gap.stop))
            for gap in gaps
            if gap
            for first in range(gap.start - gap.start % batch, gap.stop, batch)
        ]

    def save(self, numbers: range, part: Part) -> None:
        """Write a part whole or not at all.

        Args:
            numbers: of the samples.
            part: the samples.

        Raises:
            StorageError: it cannot be written; the parts before it are untouched.
        """
        path = self.folder / name_part(numbers)
        unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
        content = {"images": part.images, "tokens": part.tokens, "seconds": part.seconds}
        try:
            save_tensors(unfinished, content)
            sync_to_disk(unfinished)
            unfinished.replace(path)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise StorageError(
                f"cannot write samples {numbers.start} to {numbers.stop - 1} ({error}): free some "
                "space and run the same command again; what was drawn before is still there"
            ) from error

    def load(self, numbers: range) -> Part:
        """Read a part.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        name = name_part(numbers)
        if not self.is_whole(name):
            raise CheckpointError(
                f"the part {self.folder / name} is damaged: run the same command again, and it is "
                "drawn anew"
            )
        return Part(**load_tensors(self.folder / name))

    def join(self) -> SampleCost | None:
        """Join the parts into the file, and remove the work folder.

        A kill at any moment loses nothing: the parts go when the whole file is on the disk, and
        the plan goes last.

        Returns:
            What the samples cost; None where a killed process had joined the parts before.

        Raises:
            StorageError: the file cannot be written; the parts are still there.
            ConfigError: a file of its name has come up meanwhile.
        """
        joined, cost = self.folder / JOINED, None
        if not joined.exists():
            cost = self.write_joined(joined)
        if self.output.exists():
            raise ConfigError(
                f"{self.output} has come up while samples were drawn: move it away and run the "
                "same command again"
            )
        try:
            for part in self.list_parts():
                (self.folder / name_part(part)).unlink(missing_ok=True)
            joined.rename(self.output)
            sync_to_disk(self.output.absolute().parent)
            (self.folder / RUN_FILE).unlink(missing_ok=True)
            with suppress(OSError):  # a file that somebody put there stays
                self.folder.rmdir()
        except OSError as error:
            raise StorageError(f"cannot finish {self.output}: {error}") from error
        return cost

    def write_joined(self, joined: Path) -> SampleCost:
        """Write the whole file inside of the work folder."""
        plan, sums = self.plan, np.zeros(2)

        def read() -> Iterator[UInt8[np.ndarray, "b h w 3"]]:
            for numbers in self.list_parts():
                part = self.load(numbers)
                sums[:] += (part.tokens.double().sum().item(), part.seconds.double().sum().item())
                yield part.images.numpy()

        labels = np.array([plan.label(number) for number in range(plan.count)], dtype=np.int64)
        shape = (plan.count, plan.height, plan.width, 3)
        unfinished = joined.with_name(f".{joined.name}.unfinished-{os.getpid()}")
        try:
            images = ArrayPieces(shape, np.dtype(np.uint8), read())
            write_npz(unfinished, {"arr_0": images, "arr_1": ArrayPieces.of(labels)})
            unfinished.rename(joined)
            sync_to_disk(self.folder)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.output} ({error}): free some space and run the same command "
                "again; all samples are drawn, and their parts are still there"
            ) from error
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        tokens, seconds = (sums / plan.count).tolist()
        return SampleCost(tokens, seconds)


def name_part(numbers: range) -> str:
    """Return the name of the file of a part."""
    return f"samples-{numbers.start:08d}-{numbers.stop:08d}.safetensors"


def numbers_of(name: str) -> range:
    """Return the numbers that the name of a part tells; none if it is no part.

    Example:
        >>> numbers_of("samples-00000004-00000008.safetensors"), numbers_of("run.json")
        (range(4, 8), range(0, 0))
    """
    match = PART.fullmatch(name)
    return range(int(match[1]), int(match[2])) if match else range(0)
