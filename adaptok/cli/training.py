"""The work of `adaptok train`."""

import os
from pathlib import Path
from typing import Any

import typer

from adaptok.cli.terminal import INTERRUPTED, Bar, describe_seconds, err, out, show_progress
from adaptok.dc.config import read_model_config
from adaptok.train.batches import open_training_set
from adaptok.train.config import TrainConfig, fit_model_to_data
from adaptok.train.progress import StepReport, TrainSummary
from adaptok.train.trainer import train

KINDS = {"dc": "DCDiT", "dit": "DiT"}
SIZES = ("hidden_size", "depth", "num_heads")
MODEL_OPTIONS = frozenset(
    (
        "scale",
        *SIZES,
        "patch_size",
        "target",
        "dechunk_sigma",
        "layout",
        "gradient_checkpointing",
    )
)


def run_training(given: dict[str, Any]) -> None:
    """Train as a person asked on the command line.

    Args:
        given: the options that were given, by name.

    Raises:
        AdaptokError: an option is wrong, or the run fails.
        typer.Exit: the run was interrupted.
    """
    options = dict(given)
    output: Path = options.pop("output")
    fresh: bool = options.pop("fresh")
    config = read_config(options.pop("config", None), options)
    config = fit_model_to_data(config, len(open_training_set(config).class_names))
    out.quiet = os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
    out.print(describe_run(config, output), soft_wrap=True)
    with show_progress("training", config.steps) as bar:
        summary = train(
            config, output, resume=not fresh, on_step=lambda report: show_report(bar, report)
        )
    say_end(summary)
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)


def read_config(file: Path | None, options: dict[str, Any]) -> TrainConfig:
    """Put options over those of a file, if there is one.

    Args:
        file: JSON of a `TrainConfig`; options that it lacks have their defaults.
        options: options of run and model by name, and `kind` of the model.

    Returns:
        The configuration.

    Raises:
        ConfigError: an option is unknown, out of range, or does not fit the others.

    Example:
        >>> read_config(None, {"scale": "B", "steps": 10}).model.depth
        12
    """
    values = {} if file is None else TrainConfig.from_json_file(file).model_dump(mode="json")
    plain = {name: plain_value(value) for name, value in options.items()}
    kind = plain.pop("kind", None)
    model_options = {name: plain.pop(name) for name in MODEL_OPTIONS & plain.keys()}
    model = values.get("model", {})
    if kind is not None and KINDS[kind] != model.get("kind", KINDS["dc"]):
        model = {}  # options of another kind of model mean nothing here
    if any(name in model_options for name in SIZES) and "scale" not in model_options:
        model = {**model, "scale": None}
    if "scale" in model_options:
        model = {name: value for name, value in model.items() if name not in SIZES}
    elif not model.get("hidden_size") and not any(name in model_options for name in SIZES):
        model_options["scale"] = "S"
    chosen = {**model, **model_options}
    name = KINDS[kind] if kind is not None else chosen.get("kind", KINDS["dc"])
    chosen.pop("kind", None)
    return TrainConfig(**{**values, **plain, "model": read_model_config(name, chosen)})


def plain_value(value: Any) -> Any:  # noqa: ANN401
    """Return what JSON would hold: the value of a choice, a tuple for a list."""
    value = getattr(value, "value", value)
    return tuple(value) if isinstance(value, list) else value


def describe_run(config: TrainConfig, output: Path) -> str:
    """Say what is about to happen."""
    model = config.model
    kind = type(model).__name__.removesuffix("Config")
    h, w = model.grid
    return (
        f"{kind}, width {model.hidden_size}, {model.depth} blocks, on {h} x {w} cells of "
        f"{model.in_channels} channels; {config.data}, {model.num_classes} classes, "
        f"{config.image_size} px; objective {config.objective}, {config.steps:,} steps of "
        f"{config.batch_size} images; output in {output}"
    )


def show_report(bar: Bar, report: StepReport) -> None:
    """Show how the run stands; outside a terminal as a line."""
    note = f"loss {report.loss:.4f}  kept {report.kept:.1%}  {report.steps_per_second:.2f} steps/s"
    bar.move_to(report.step, report.steps, note)
    if not err.is_terminal:
        left = describe_seconds(report.seconds_left)
        out.print(f"step {report.step}/{report.steps}  {note}  {left} left", soft_wrap=True)


def say_end(summary: TrainSummary) -> None:
    """Say how the run ended and what to do next."""
    spent = describe_seconds(summary.seconds)
    loss = "" if summary.loss is None else f", loss {summary.loss:.4f}"
    if summary.interrupted:
        err.print(
            f"stopped after step {summary.step} of {summary.steps}{loss}: run the same command "
            f"again to go on from {summary.checkpoint}",
            soft_wrap=True,
        )
        return
    out.print(f"done: {summary.step:,} steps in {spent}{loss}", soft_wrap=True)
    out.print(
        f"model:  {summary.model_folder}\nsample: adaptok sample --model {summary.model_folder}",
        soft_wrap=True,
    )
