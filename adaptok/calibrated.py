"""What a stage implements whose settings are fitted to data, and the records that it fits from."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.errors import ConfigError, DataError

Item = tuple[int, int]  # number of the batch, and of the sample in it
Row = Mapping[str, tuple[float, ...]]
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class BatchRun:
    """What one run of a batch gave.

    Args:
        out: what the model, or the walk, returned.
        samples: samples of a call.
        calls: passes of the block list.
        kept: by name of a stage, the share of the cells that it left to each sample, the mean
            over all its decisions in this run.
    """

    out: Any
    samples: int
    calls: int
    kept: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


RunBatch = Callable[[], BatchRun]


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came of a fit; plain values only, which JSON can hold.

    Args:
        settings: what `Calibrated.apply_settings` takes.
        figures: how good it is, on what it was chosen on and on what was held out.
    """

    settings: Mapping[str, Any]
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """What was measured of each sample, as rows of named numbers.

    Args:
        rows: by batch and sample, lists of numbers by name.

    Example:
        >>> one = CalibrationRecord({(1, 0): {"x": (2.0, 3.0)}})
        >>> both = one.merge(CalibrationRecord({(0, 0): {"x": (1.0,)}}))
        >>> both.values("x").tolist()
        [1.0, 2.0, 3.0]
    """

    rows: Mapping[Item, Row] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def merge(self, other: Self) -> Self:
        """Return the samples of both, in the order of batches whatever the order of merging.

        Args:
            other: another record of the same stage.

        Raises:
            DataError: both hold the same sample.
        """
        twice = sorted(self.rows.keys() & other.rows.keys())
        if twice:
            batch, sample = twice[0]
            raise DataError(
                f"both records hold sample {sample} of batch {batch}: give each process its own "
                "shard of the same batches, as in shard=(0, 2) and shard=(1, 2)"
            )
        joined = {**self.rows, **other.rows}
        return type(self)({item: joined[item] for item in sorted(joined)})

    def split(self, holdout: float) -> tuple[Self, Self]:
        """Return samples to fit to, and samples that are held out, spread evenly.

        Whole batches are held out, since samples of one may be alike; where there is one batch
        only, samples of it.

        Args:
            holdout: the share that is held out, in (0, 1).

        Raises:
            DataError: there is one sample only.
        """
        by_batch = len({batch for batch, _ in self.rows}) > 1
        place = 0 if by_batch else 1
        groups = sorted({item[place] for item in self.rows})
        if len(groups) < 2:
            raise DataError(
                f"two batches or two samples are needed, one to fit to and one that is held out, "
                f"got {len(groups)}"
            )
        held = {
            group
            for rank, group in enumerate(groups)
            if int((rank + 1) * holdout + ROUNDING) > int(rank * holdout + ROUNDING)
        } or {groups[-1]}
        if len(held) == len(groups):
            held.remove(groups[0])
        chosen = {item: row for item, row in self.rows.items() if item[place] not in held}
        other = {item: row for item, row in self.rows.items() if item[place] in held}
        return type(self)(chosen), type(self)(other)

    def column(self, name: str) -> list[tuple[float, ...]]:
        """Return the numbers of each sample by one name."""
        return [row[name] for row in self.rows.values()]

    def values(self, name: str) -> Float[Tensor, " k"]:
        """Return the numbers of all samples by one name, in float64."""
        flat = [value for row in self.column(name) for value in row]
        return torch.tensor(flat, dtype=torch.float64)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the record as tensors by name: items, and of each column values and lengths."""
        tensors = {"items": torch.tensor(list(self.rows), dtype=torch.int64).view(-1, 2)}
        names = next(iter(self.rows.values()), {})
        for name in names:
            lengths = [len(row) for row in self.column(name)]
            tensors[f"values.{name}"] = self.values(name)
            tensors[f"lengths.{name}"] = torch.tensor(lengths, dtype=torch.int64)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Return the record that `to_tensors` gave.

        Args:
            tensors: by name.

        Raises:
            DataError: they are none of a record.
        """
        try:
            items = [(int(batch), int(sample)) for batch, sample in tensors["items"].tolist()]
            rows: dict[Item, dict[str, tuple[float, ...]]] = {item: {} for item in items}
            for key in tensors:
                kind, _, name = key.partition(".")
                if kind != "values":
                    continue
                lengths = tensors[f"lengths.{name}"].tolist()
                parts = tensors[key].split(lengths)
                for item, part in zip(items, parts, strict=True):
                    rows[item][name] = tuple(part.tolist())
        except (KeyError, ValueError, RuntimeError) as error:
            raise DataError(f"these tensors are no record of a calibration: {error}") from None
        return cls(rows)


@runtime_checkable
class Adjustable(Protocol):
    """A stage with settings that change after a wrap; `adaptok.save` keeps them."""

    def read_settings(self) -> Mapping[str, Any]:
        """Return the settings of now, as `apply_settings` takes them."""

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Run with other settings from now on, or raise and change nothing.

        Args:
            settings: as `read_settings` gave them, or of a fit.

        Raises:
            ConfigError: they are none of this stage.
        """


@runtime_checkable
class Calibrated(Adjustable, Protocol):
    """A stage with settings that are fitted to data (see `adaptok.calibrate`).

    Rows of `measure_batch` all have the same names, and say all that `fit_settings` needs, so that
    records of several processes can be merged.
    """

    def plan_calibration(self, wanted: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return what is to be reached, complete and as plain values; None: nothing to fit.

        Args:
            wanted: what the user asked for.

        Raises:
            ConfigError: there is no such wish, or it is out of range.
        """

    def measure_batch(self, run: RunBatch, wanted: Mapping[str, Any]) -> Sequence[Row]:
        """Measure one batch, and leave the stage as it was.

        Args:
            run: runs the batch, the same way each time; call it as often as needed.
            wanted: what `plan_calibration` returned.

        Returns:
            A row of numbers for each sample.
        """

    @classmethod
    def fit_settings(
        cls, chosen: CalibrationRecord, held_out: CalibrationRecord, wanted: Mapping[str, Any]
    ) -> Fitted:
        """Fit settings to records, and say how good they are on those that were held out.

        Args:
            chosen: samples to fit to.
            held_out: others.
            wanted: what `plan_calibration` returned.

        Raises:
            DataError: the records do not tell enough.
        """


def as_calibrated(stage: object) -> Calibrated | None:
    """Return a stage if it has settings that are fitted to data."""
    return stage if isinstance(stage, Calibrated) else None


def read_settings(stages: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """Return what stages run with of all that may change after a wrap, such as what was fitted.

    Args:
        stages: by name.

    Returns:
        Settings by name of the stage, of those that have some.
    """
    return {
        name: dict(stage.read_settings())
        for name, stage in stages.items()
        if isinstance(stage, Adjustable)
    }


def change_settings(
    stages: Mapping[str, object], settings: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give stages other settings, all of them or none.

    Args:
        stages: by name.
        settings: by name of a stage.

    Raises:
        ConfigError: a stage is not there, has nothing that is fitted, or refuses its settings.
    """
    chosen: dict[str, Adjustable] = {}
    for name in settings:
        stage = stages.get(name)
        if not isinstance(stage, Adjustable):
            raise ConfigError(
                f"there are settings of the stage {name!r}, and among {', '.join(stages)} there is "
                "none of that name that takes settings"
            )
        chosen[name] = stage
    before = read_settings(chosen)
    done: list[str] = []
    try:
        for name, stage in chosen.items():
            stage.apply_settings(settings[name])
            done.append(name)
    except BaseException:
        for name in done:
            chosen[name].apply_settings(before[name])
        raise


def read_wanted(
    stage: str, wanted: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is wanted of a stage with what was left out.

    Args:
        stage: its name.
        wanted: what the user asked for.
        defaults: all that may be asked for.

    Raises:
        ConfigError: there is no such wish.

    Example:
        >>> read_wanted("tome", {"keep": 0.5}, {"keep": 1.0, "fit": "r"})
        {'keep': 0.5, 'fit': 'r'}
    """
    for name in wanted:
        if name not in defaults:
            raise ConfigError(
                f"a calibration of {stage!r} can be asked for {', '.join(defaults)}, got {name!r}"
            )
    return {**defaults, **wanted}


def check_share(name: str, value: object) -> None:
    """Raise a `ConfigError` unless a wish is a share, above 0 and below 1.

    Args:
        name: what it is called.
        value: what the user asked for.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
        raise ConfigError(f"{name} is a share in (0, 1), got {value!r}")


def read_setting(stage: str, settings: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """Return settings in order, or raise a `ConfigError` unless they are exactly these.

    Args:
        stage: its name.
        settings: what came.
        names: what is needed.
    """
    if set(settings) != set(names):
        raise ConfigError(
            f"settings of {stage!r} are {', '.join(names)}, got {', '.join(map(str, settings))}"
        )
    return [settings[name] for name in names]


def flatten_records(records: Mapping[str, CalibrationRecord]) -> dict[str, Tensor]:
    """Return records as tensors; names of stages hold no dot."""
    return {
        f"{stage}.{name}": value
        for stage, record in records.items()
        for name, value in record.to_tensors().items()
    }


def gather_records(tensors: Mapping[str, Tensor]) -> dict[str, CalibrationRecord]:
    """Return what `flatten_records` was given."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        stage, _, name = key.partition(".")
        parts.setdefault(stage, {})[name] = value
    return {stage: CalibrationRecord.from_tensors(found) for stage, found in parts.items()}


def sign_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a fingerprint of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:16]
