"""The work of `adaptok report`, and the report of `adaptok demo`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.budgets import Budget
from adaptok.cli.autoencoders import open_decoder
from adaptok.cli.drawing import FAST_SCHEDULER
from adaptok.cli.opening import open_routed
from adaptok.cli.pictures import name_label, objective_of, read_label, record_inputs
from adaptok.cli.terminal import out, show_progress
from adaptok.dc.folder import TrainedModel
from adaptok.dc.nearest import find_nearest
from adaptok.diffusion import SampleStep
from adaptok.errors import ConfigError
from adaptok.measure import MeasuredSamples, measure_sampling
from adaptok.measure.flops import count_flops
from adaptok.see.report import write_runs
from adaptok.see.report_runs import ReportRun, ReportStep, own_of_nearest, read_batch
from adaptok.train.decoding import Decoder

DROPS = (0.0, 0.3, 0.6)
SAMPLES = 4
SHOWN = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places")
MOST_SAMPLES, MOST_BUDGETS = 8, 8
CAPTION = (
    "Cost of a sampling step for one sample, mean over steps and samples. Tokens and GFLOPs are "
    "counted, ms are measured on this machine."
)


@dataclass(frozen=True, slots=True)
class Reporting:
    """What a person asked for; see `adaptok report --help`."""

    output: Path
    model: str
    labels: tuple[str, ...] = ()
    drops: tuple[float, ...] = ()
    keeps: tuple[float, ...] = ()
    steps: int = 20
    seed: int = 0
    vae: str | None = None

    def list_budgets(self) -> dict[str, dict[str, Any]]:
        """Return the budgets by their names, or raise a `BudgetError`."""
        given: dict[str, dict[str, Any]] = {f"drop {drop:g}": {"drop": drop} for drop in self.drops}
        given |= {f"keep {keep:g}": {"keep": keep} for keep in self.keeps}
        given = given or {f"drop {drop:g}": {"drop": drop} for drop in DROPS}
        for budget in given.values():
            Budget(**budget)  # refuses what is out of range before anything is loaded
        if len(given) > MOST_BUDGETS:
            raise ConfigError(f"a report has at most {MOST_BUDGETS} budgets, got {len(given)}")
        return given


def make_report(asked: Reporting) -> None:
    """Draw samples under several budgets, and write them as one HTML file.

    Args:
        asked: what a person asked for.

    Raises:
        AdaptokError: an option does not fit the model, or the file cannot be written.
    """
    budgets = asked.list_budgets()
    trained = open_routed(asked.model, "the report")
    labels = [read_label(text, trained) for text in asked.labels] or choose_labels(trained)
    if len(labels) > MOST_SAMPLES:
        raise ConfigError(f"a report has at most {MOST_SAMPLES} samples, got {len(labels)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = open_decoder(trained, device, asked.vae)
    trained.model.to(device)
    options: dict[str, Any] = {
        "objective": objective_of(trained.card),
        "scheduler": FAST_SCHEDULER[trained.card.objective],
        "clip": decoder.clip,
        "seed": asked.seed,
    }
    runs, total = [], asked.steps * len(budgets)
    with show_progress("drawing", total) as bar:
        measure_sampling(trained.model, labels[:1], **{**options, "steps": 2})  # the first is slow
        for place, (name, budget) in enumerate(budgets.items()):
            bar.describe("drawing")
            with record_inputs(trained.model) as inputs:
                measured = measure_sampling(
                    trained.model,
                    labels,
                    steps=asked.steps,
                    progress=lambda done, _, place=place: bar.move_to(  # type: ignore[misc]
                        place * asked.steps + done, total
                    ),
                    **budget,
                    **options,
                )
            if decoder.weights:
                bar.describe(f"decoding {name}")
            runs.append(make_run(name, measured, inputs, trained, decoder))
    names = [name_label(label, trained.card) for label in labels]
    path = write_sampling(asked.output, runs, names, Path(asked.model).name, trained)
    out.print(f"report: {path} ({path.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)


def choose_labels(trained: TrainedModel) -> list[int]:
    """Return the classes that are shown unless a person chooses."""
    known = trained.card.class_names
    chosen = [known.index(name) for name in SHOWN if name in known]
    return chosen or list(range(min(trained.model.config.num_classes, SAMPLES)))


def write_sampling(
    path: Path, runs: Sequence[ReportRun], names: Sequence[str], model: str, trained: TrainedModel
) -> Path:
    """Write the runs of a diffusion model as a report."""
    h, w = runs[0].grid
    device, threads = next(trained.model.parameters()).device, torch.get_num_threads()
    note = (
        f"{model}, {h} x {w} = {h * w} cells, on {device} with {threads} "
        f"thread{'s' if threads != 1 else ''}. Sampling goes from noise to a clean image; in each "
        "step the model keeps the cells that need a token of their own, and the nearest kept cell "
        "stands for each of the others."
    )
    last = len(runs[0].steps) - 1
    return write_runs(
        runs,
        path,
        names=names,
        note=note,
        caption=CAPTION,
        start=(0, min(2 * last // 3, 2 * 15 // 3)),
    )


def make_run(
    name: str,
    measured: MeasuredSamples,
    inputs: Sequence[Float[Tensor, "b c h w"]],
    trained: TrainedModel,
    decoder: Decoder,
    chosen: Sequence[int] | None = None,
) -> ReportRun:
    """Turn drawn samples into a run of a report.

    Args:
        name: the budget in words.
        measured: the samples, drawn without guidance.
        inputs: what the model was given in each step.
        trained: the model.
        decoder: makes pixels of what it draws.
        chosen: which samples to show; None shows all.
    """
    samples = measured.samples
    rows = list(range(len(samples.seeds))) if chosen is None else list(chosen)
    grid = samples.steps[0].grid
    assert grid is not None
    steps = [
        make_step(step, inputs[number][rows], rows, number, measured, trained, decoder)
        for number, step in enumerate(samples.steps)
    ]
    return ReportRun(
        name,
        grid,
        tuple(steps),
        read_batch(decoder.decode(samples.latents[rows])),
        sum(measured.cost.tokens) / len(measured.cost.tokens),
        measured.cost.gflops,
        measured.cost.ms,
    )


def make_step(
    step: SampleStep,
    given: Float[Tensor, "b c h w"],
    rows: list[int],
    number: int,
    measured: MeasuredSamples,
    trained: TrainedModel,
    decoder: Decoder,
) -> ReportStep:
    """Turn one step of sampling into one of a report."""
    assert step.keep_mask is not None
    assert step.keep_prob is not None
    assert step.grid is not None
    assert step.kept is not None
    b = step.keep_mask.shape[0]
    mask = step.keep_mask[rows].cpu()
    token = own_of_nearest(mask, find_nearest(mask, step.grid))
    flops = count_flops(trained.model.config, step.grid, step.kept.tolist())
    return ReportStep(
        f"{number + 1} of {len(measured.samples.steps)}, noise {step.time / 1000:.0%}",
        read_batch(decoder.decode(given)),
        token.numpy(),
        mask.numpy(),
        tuple(int(count) for count in step.kept[rows]),
        step.keep_prob[rows].float().cpu().numpy(),
        read_batch(decoder.decode(step.x0[rows])),
        flops / 1e9 / b,
        measured.step_ms[number] / b,
    )
