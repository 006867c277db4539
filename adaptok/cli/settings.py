"""The settings that `adaptok demo` compares, and the images that are drawn under each."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.budgets import Budget
from adaptok.cli.drawing import FAST_SCHEDULER
from adaptok.cli.pictures import objective_of, record_inputs
from adaptok.cli.terminal import show_progress
from adaptok.dc.folder import TrainedModel
from adaptok.diffusion.calls import ModelCall
from adaptok.measure import MeasuredSamples, measure_ms, measure_sampling

GUIDANCE = 1.5
MOST_COLUMNS = 8
PROBES = 5  # steps that are measured again
ROUNDS, ROUNDS_SECONDS = 6, 20.0  # at most so often, at most so long


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
        given: what the model was given in each step, row by row.
        labels: class of each column.
    """

    rows: tuple[Row, ...]
    given: Sequence[Sequence[Float[Tensor, "b c h w"]]]
    labels: tuple[int, ...]

    @property
    def inputs(self) -> Sequence[Float[Tensor, "b c h w"]]:
        """What the model was given in each step of the first row."""
        return self.given[0]


def draw_rows(tour: Tour, trained: TrainedModel) -> Drawn:
    """Draw the same seeds and classes under every setting.

    Args:
        tour: what a person asked for.
        trained: the model.

    Returns:
        Images and costs.
    """
    labels = tuple(range(min(trained.model.config.num_classes, MOST_COLUMNS)))
    options = sampling_options(tour, trained)
    measure_sampling(trained.model, labels, **{**options, "steps": 2})  # first calls are slow
    with record_inputs(trained.model) as inputs:
        found = draw_settings(trained, labels, options)
    given = [inputs[place * tour.steps :][: tour.steps] for place in range(len(SETTINGS))]
    timed = measure_again(trained, labels, found, given)
    rows = tuple(
        Row(setting, replace(measured, cost=replace(measured.cost, ms=ms)))
        for setting, measured, ms in zip(SETTINGS, found, timed, strict=True)
    )
    return Drawn(rows, given, labels)


def measure_again(
    trained: TrainedModel,
    labels: Sequence[int],
    found: Sequence[MeasuredSamples],
    given: Sequence[Sequence[Float[Tensor, "b c h w"]]],
) -> list[float]:
    """Measure some steps of each setting again, in turns, and keep the fastest time of each.

    What else a machine does only ever adds time, and it comes and goes: turns spread it over all
    settings, and the fastest of several times is near the truth.

    Args:
        trained: the model.
        labels: class of each image.
        found: images and costs of each setting.
        given: what the model was given in each step, by setting.

    Returns:
        Milliseconds of a step for one image, by setting.
    """
    steps = len(given[0])
    probes = sorted({(2 * i + 1) * steps // (2 * PROBES) for i in range(PROBES)})
    best = [[measured.step_ms[probe] for probe in probes] for measured in found]
    started = time.monotonic()
    with show_progress("measuring", ROUNDS * len(SETTINGS)) as bar, torch.no_grad():
        for turn in range(ROUNDS):
            for place, setting in enumerate(SETTINGS):
                if turn > 0 and time.monotonic() - started > ROUNDS_SECONDS:
                    break
                call = make_call(trained, labels, setting)
                for column, probe in enumerate(probes):
                    x = given[place][probe][: len(labels)].to(call.y.device)
                    t = torch.full_like(x[:, 0, 0, 0], found[place].samples.steps[probe].time)
                    ms = measure_ms(lambda: call(x, t), repeats=1, warmup=0).median_ms  # noqa: B023
                    best[place][column] = min(best[place][column], ms)
                bar.move_to(turn * len(SETTINGS) + place + 1, ROUNDS * len(SETTINGS))
    return [statistics.fmean(times) / len(labels) for times in best]


def make_call(trained: TrainedModel, labels: Sequence[int], setting: Setting) -> ModelCall:
    """Return the model as a step of sampling calls it under a setting."""
    options = setting_options(setting, trained)
    model = trained.model
    return ModelCall(
        model,
        torch.tensor(labels, device=next(model.parameters()).device),
        budget=Budget(drop=options.pop("drop")),
        dtype=torch.float32,
        trace=False,
        **options,
    )


def draw_settings(
    trained: TrainedModel, labels: Sequence[int], options: dict[str, Any]
) -> list[MeasuredSamples]:
    """Draw the images of all settings, one setting after the other.

    Args:
        trained: the model.
        labels: class of each image.
        options: what all settings share.

    Returns:
        Images and costs of each setting.
    """
    steps: int = options["steps"]
    found, done, total = [], 0, steps * sum(setting.runs for setting in SETTINGS)
    with show_progress("drawing", total) as bar:
        for setting in SETTINGS:
            bar.describe(f"drawing: {setting.name}")

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
