"""Profiles: fitted settings as a small JSON file, tied to model, grid and sampler."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import PrivateAttr, field_validator
from torch import nn

from adaptok.adapters import name_stages
from adaptok.calibrated import (
    Calibrated,
    CalibrationRecord,
    as_calibrated,
    change_settings,
    flatten_records,
    gather_records,
    sign_tensors,
)
from adaptok.config import Config
from adaptok.discovery import find_part, name_of_part
from adaptok.errors import (
    AdaptokError,
    CheckpointError,
    ConfigError,
    DataError,
    ProfileError,
)
from adaptok.profile_marks import ProfileMark, mark_profile
from adaptok.stages import Stage
from adaptok.storage import load_tensors, save_tensors
from adaptok.tracing import require_adaptive

VERSION = 1
SIDECAR = ".safetensors"
Grid = tuple[int, ...]


class StageFit(Config):
    """What was fitted for one stage.

    Args:
        part: name that its class is registered by; None for a class without one.
        wanted: what was to be reached.
        settings: what the stage runs with.
        figures: how good that is.

    Raises:
        ConfigError: a value is missing or wrong.
    """

    part: str | None
    wanted: dict[str, Any]
    settings: dict[str, Any]
    figures: dict[str, Any]


class Profile(Config):
    """Settings that `adaptok.calibrate` fitted, and what they belong to.

    Args:
        version: format of the file.
        adaptok: version of adaptok that wrote it.
        torch: version of PyTorch.
        host: the model.
        grids: grids of cells that were seen.
        sampler: its name, if one was given.
        steps: steps of the sampler, if they were given.
        samples: samples that were measured, the held-out ones included.
        holdout: share of them that was held out.
        stages: what was fitted, by name of the stage.
        unfit: stages with nothing to fit.
        shard: which part of the batches was measured; None means all.
        records: fingerprint of the records that it was fitted from.

    Raises:
        ConfigError: a value is missing or wrong, or a newer adaptok wrote it.

    Example:
        >>> import torch, adaptok
        >>> from adaptok.calibrating import calibrate
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=[{"name": "tome", "r": 3}])
        >>> profile = calibrate(vit, [torch.randn(4, 3, 32, 48)])
        >>> sum(profile.stages["tome"].settings["r"])
        9
        >>> Profile.from_json(profile.to_json()).stages == profile.stages
        True
    """

    version: int = VERSION
    adaptok: str = ""
    torch: str = ""
    host: ProfileMark
    grids: tuple[Grid, ...]
    sampler: str | None = None
    steps: int | None = None
    samples: int
    holdout: float
    stages: dict[str, StageFit]
    unfit: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None
    records: str = ""
    _records: dict[str, CalibrationRecord] = PrivateAttr(default_factory=dict)

    @field_validator("version")
    @classmethod
    def check_version(cls, version: int) -> int:
        """Refuse what a newer adaptok wrote."""
        if not 1 <= version <= VERSION:
            raise ValueError(
                f"this adaptok reads profiles up to version {VERSION}: install a newer adaptok"
            )
        return version

    def with_records(self, records: Mapping[str, CalibrationRecord]) -> Self:
        """Return the same profile with the records that it was fitted from."""
        made = self.model_copy(update={"records": sign_tensors(flatten_records(records))})
        made._records = dict(records)
        return made

    def save(self, path: str | Path, *, records: bool | None = None) -> None:
        """Write the profile as JSON.

        Args:
            path: the file, `.json` by custom.
            records: write what it was fitted from beside it (`.safetensors`), which `merge`
                needs; None does so for a shard.

        Raises:
            StorageError: a file cannot be written.
        """
        path = Path(path)
        if records or (records is None and self.shard is not None):
            save_tensors(path.with_suffix(SIDECAR), flatten_records(self._records))
        self.to_json_file(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Args:
            path: the JSON file; records beside it are read, too, if they are its own.

        Raises:
            ProfileError: the file is missing, no profile, or of a newer adaptok; or the records
                beside a shard are of another one.
        """
        path = Path(path)
        try:
            profile = cls.from_json_file(path)
        except ConfigError as error:
            raise ProfileError(f"this is no profile: {error}") from None
        beside = path.with_suffix(SIDECAR)
        if not beside.is_file():
            return profile
        try:
            tensors = load_tensors(beside)
            records = gather_records(tensors)
        except (CheckpointError, DataError) as error:
            raise ProfileError(f"the records of {path} cannot be read: {error}") from None
        if sign_tensors(tensors) != profile.records:
            if profile.shard is None:
                return profile  # of an earlier profile by that name
            raise ProfileError(
                f"{beside} holds the records of another profile than {path}: bring both files of "
                "the shard along"
            )
        profile._records = records
        return profile

    @classmethod
    def merge(cls, profiles: Sequence[Self]) -> Self:
        """Return the profile of all batches, from those of all shards.

        Args:
            profiles: of the same model, wishes and `holdout`, all shards in any order.

        Returns:
            The same as one run over all batches gives.

        Raises:
            ProfileError: a shard is missing, has no records, or is of something else.
        """
        if not profiles:
            raise ProfileError("there is no profile to merge")
        first = profiles[0]
        for other in profiles[1:]:
            check_same(first, other)
        check_shards([profile.shard for profile in profiles])
        missing = [
            profile.shard for profile in profiles if set(profile._records) != {*first.stages}
        ]
        if missing:
            raise ProfileError(
                f"the profile of shard {missing[0]} has no records to merge: save it with "
                "records=True, and keep the file .safetensors beside it"
            )
        merged = {name: CalibrationRecord() for name in first.stages}
        try:
            for profile in profiles:
                for name, record in profile._records.items():
                    merged[name] = merged[name].merge(record)
        except DataError as error:
            raise ProfileError(f"these profiles cannot be merged: {error}") from None
        stages = {}
        for name, fit in first.stages.items():
            if fit.part is None:
                raise ProfileError(
                    f"the class of the stage {name!r} has no name to find it by: register it with "
                    "adaptok.register_stage before it is calibrated"
                )
            kind = find_part("stage", fit.part)
            stages[name] = fit_stage(kind, fit.part, merged[name], first.holdout, fit.wanted)
        update = {
            "stages": stages,
            "samples": sum(profile.samples for profile in profiles),
            "grids": tuple(sorted({grid for profile in profiles for grid in profile.grids})),
            "shard": None,
        }
        return first.model_copy(update=update).with_records(merged)

    def apply(
        self,
        model: nn.Module,
        *,
        grid: Grid | None = None,
        sampler: str | None = None,
        steps: int | None = None,
    ) -> None:
        """Let a wrapped model run with these settings from now on.

        `adaptok.save` writes them with the wrap, and `adaptok.load` brings them back.

        Args:
            model: the model, wrapped with the same stages.
            grid: the grid of cells that it will run on; None does not check it.
            sampler: name of the sampler that will call it; None does not check it.
            steps: number of its steps; None does not check it.

        Raises:
            NotWrappedError: the model is not wrapped.
            ProfileError: the profile is of another model, grid, sampler or stage; the model is as
                it was before.
        """
        blocks = require_adaptive(model)
        found = mark_profile(model, blocks)
        if found != self.host:
            raise ProfileError(
                f"this profile is of {self.host.describe()}, and the model is "
                f"{found.describe()}: calibrate this one"
            )
        if grid is not None and tuple(grid) not in self.grids:
            seen = ", ".join(map(str, self.grids))
            raise ProfileError(
                f"this profile was made on the grid {seen}, and {tuple(grid)} is asked for: "
                "calibrate with inputs of that shape"
            )
        for name, own, asked in (
            ("sampler", self.sampler, sampler),
            ("number of steps", self.steps, steps),
        ):
            if asked is not None and asked != own:
                made = "without one" if own is None else f"with {own!r}"
                raise ProfileError(
                    f"this profile was made {made} as the {name}, and {asked!r} is asked for: "
                    "calibrate with that one"
                )
        apply_fits(name_stages(blocks), self.stages)

    def describe(self) -> list[str]:
        """Say what was fitted, a line for each stage."""
        lines = []
        for name, fit in self.stages.items():
            settings, figures = (
                ", ".join(f"{key} {show_value(value)}" for key, value in values.items())
                for values in (fit.settings, fit.figures)
            )
            lines.append(f"{name}: {settings} ({figures})")
        return lines + [f"{name}: nothing to fit" for name in self.unfit]


def show_value(value: object) -> str:
    """Show a setting or a figure briefly."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(show_value(item) for item in value)}]"
    return str(value)


def apply_fits(stages: Mapping[str, Stage], fits: Mapping[str, StageFit]) -> None:
    """Give stages their settings, all of them or none.

    Args:
        stages: by name.
        fits: by name.

    Raises:
        ProfileError: there is no such stage, or it is of another kind, or refuses its settings.
    """
    for name, fit in fits.items():
        stage = as_calibrated(stages.get(name))
        if stage is None or name_of_part("stage", type(stage)) != fit.part:
            raise ProfileError(
                f"this profile has settings of {fit.part or name!r} for the stage {name!r}, and "
                f"the model has {', '.join(stages)}: wrap it with the same stack"
            )
    try:
        change_settings(stages, {name: fit.settings for name, fit in fits.items()})
    except AdaptokError as error:
        raise ProfileError(f"this profile does not fit the model: {error}") from None


def fit_stage(
    kind: type[Calibrated] | type[Any],
    part: str | None,
    record: CalibrationRecord,
    holdout: float,
    wanted: Mapping[str, Any],
) -> StageFit:
    """Fit the settings of one stage to a record, in the order of batches.

    Args:
        kind: class of the stage.
        part: name that it is registered by.
        record: what was measured.
        holdout: share that is held out.
        wanted: what is to be reached.
    """
    chosen, held_out = CalibrationRecord().merge(record).split(holdout)
    fitted = kind.fit_settings(chosen, held_out, wanted)
    return StageFit(
        part=part,
        wanted=dict(wanted),
        settings=dict(fitted.settings),
        figures={"fitted_on": len(chosen), "held_out": len(held_out), **fitted.figures},
    )


def check_same(first: Profile, other: Profile) -> None:
    """Raise a `ProfileError` unless two profiles are shards of one calibration."""
    for name in ("host", "sampler", "steps", "holdout", "unfit"):
        one, two = getattr(first, name), getattr(other, name)
        if one != two:
            raise ProfileError(
                f"profiles with another {name} cannot be merged: {one!s:.200} and {two!s:.200}"
            )
    one, two = ({n: (f.part, f.wanted) for n, f in p.stages.items()} for p in (first, other))
    if one != two:
        raise ProfileError(f"profiles of other stages or wishes cannot be merged: {one} and {two}")


def check_shards(shards: Sequence[tuple[int, int] | None]) -> None:
    """Raise a `ProfileError` unless these are all shards of one calibration."""
    known = [shard for shard in shards if shard is not None]
    count = known[0][1] if known else len(shards)
    wanted = {(number, count) for number in range(count)}
    if len(known) != len(shards) or set(known) != wanted or len(known) != count:
        raise ProfileError(
            f"all shards of one calibration are merged at once, such as (0, 2) and (1, 2); got "
            f"{', '.join(map(str, shards))}"
        )
