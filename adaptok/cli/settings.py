"""The settings that `adaptok demo` compares, and the images that are drawn under each."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from adaptok.cli.drawing import FAST_SCHEDULER
from adaptok.cli.pictures import objective_of, record_inputs
from adaptok.cli.terminal import show_progress
from adaptok.dc.folder import TrainedModel
from adaptok.measure import MeasuredSamples, keep_fastest, measure_sampling

GUIDANCE = 1.5
MOST_COLUMNS = 8
TIME_FOR_SECOND_PASS = 40.0  # seconds


@dataclass(frozen=True, slots=True)
class Tour:
    """What a person asked for; see `adaptok demo --help`."""

    output: Path
    model: str
    seed: int = 0
    steps: int = 20
    train_steps: int = 100


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the first picture.

    Args:
        name: the budget in words.
        drop: tail-drop fraction of the run with a class.
        uncond_drop: that of the run without a class; None for the same.
        guidance: guidance scale; 1 runs the model once per step.
    """

    name: str
    drop: float
    uncond_drop: float | None = None
    guidance: float = 1.0

    @property
    def runs(self) -> int:
        """How often the model runs in a step."""
        return 1 if self.guidance == 1.0 else 2


SETTINGS = (
    Setting("drop 0", 0.0),
    Setting("drop 0.3", 0.3),
    Setting("drop 0.6", 0.6),
    Setting(f"guidance {GUIDANCE:g}", 0.0, guidance=GUIDANCE),
    Setting(f"Lite-CFG {GUIDANCE:g}, uncond. drop 0.9", 0.0, 0.9, GUIDANCE),
)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A setting and what came of it.

    Args:
        setting: the setting.
        measured: images and cost.
    """

    setting: Setting
    measured: MeasuredSamples


def sampling_options(tour: Tour, trained: TrainedModel) -> dict[str, Any]:
    """Return the options that all images of the demo share."""
    return {
        "objective": objective_of(trained.card),
        "scheduler": FAST_SCHEDULER[trained.card.objective],
        "steps": tour.steps,
        "seed": tour.seed,
        "clip": 1.0,
    }


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """The images of all settings.

    Args:
        rows: one per setting.
        inputs: what the model was given in each step of the first row.
        labels: class of each column.
    """

    rows: tuple[Row, ...]
    inputs: Sequence[Float[Tensor, "b c h w"]]
    labels: tuple[int, ...]


def draw_rows(tour: Tour, trained: TrainedModel) -> Drawn:
    """Draw the same seeds and classes under every setting.

    If that was quick, everything is measured once more, so that a moment in which the machine
    was busy with something else does not spoil one setting.

    Args:
        tour: what a person asked for.
        trained: the model.

    Returns:
        Images and costs.
    """
    labels = tuple(range(min(trained.model.config.num_classes, MOST_COLUMNS)))
    options = sampling_options(tour, trained)
    measure_sampling(trained.model, labels, **{**options, "steps": 2})  # first calls are slow
    started = time.monotonic()
    with record_inputs(trained.model) as inputs:
        found = draw_settings("drawing", trained, labels, options)
    if time.monotonic() - started < TIME_FOR_SECOND_PASS:
        again = draw_settings("measuring again", trained, labels, options)
        found = [keep_fastest(*pair) for pair in zip(found, again, strict=True)]
    rows = tuple(Row(*pair) for pair in zip(SETTINGS, found, strict=True))
    return Drawn(rows, inputs[: tour.steps], labels)


def draw_settings(
    doing: str, trained: TrainedModel, labels: Sequence[int], options: dict[str, Any]
) -> list[MeasuredSamples]:
    """Draw the images of all settings once.

    Args:
        doing: what to call it.
        trained: the model.
        labels: class of each image.
        options: what all settings share.

    Returns:
        Images and costs of each setting.
    """
    steps: int = options["steps"]
    found, done, total = [], 0, steps * sum(setting.runs for setting in SETTINGS)
    with show_progress(doing, total) as bar:
        for setting in SETTINGS:
            bar.describe(f"{doing}: {setting.name}")

            def move(step: int, _: int, done: int = done, setting: Setting = setting) -> None:
                bar.move_to(done + setting.runs * step, total)

            more = setting_options(setting, trained)
            found.append(measure_sampling(trained.model, labels, progress=move, **options, **more))
            done += steps * setting.runs
    return found


def setting_options(setting: Setting, trained: TrainedModel) -> dict[str, Any]:
    """Return the options of `sample` that make a setting."""
    guided = setting.runs == 2
    return {
        "drop": setting.drop,
        "uncond_drop": setting.uncond_drop,
        "guidance_scale": setting.guidance,
        "guided_channels": trained.model.config.in_channels if guided else None,
    }
