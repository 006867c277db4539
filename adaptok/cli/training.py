"""The work of `adaptok train`."""

import os
from pathlib import Path
from typing import Any

import typer

from adaptok.cli.terminal import INTERRUPTED, Bar, describe_seconds, err, out, show_progress
from adaptok.dc.config import TransformerConfig, read_model_config
from adaptok.errors import ConfigError
from adaptok.train.batches import fit_run_to_data
from adaptok.train.config import CHANGEABLE, TrainConfig, flatten
from adaptok.train.paper import PREFIX, list_paper_runs, make_paper_run
from adaptok.train.progress import StepReport, TrainSummary
from adaptok.train.trainer import train

KINDS = {"dc": "DCDiT", "dit": "DiT"}
PIXELS = ("image_size", "space_to_depth")  # what makes the grid of an image
SIZES = ("hidden_size", "depth", "num_heads")
ADAPTIVE = (  # what fixed patches cannot follow
    "drops",
    "budget_warmup",
    "ratio_weight",
    "ratio_group",
    "target",
    "dechunk_sigma",
    "layout",
)
OUTSIDE = (CHANGEABLE - {"steps"}) | {"data", "seed"}  # what a published setting leaves open
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
    name = options.pop("config", None)
    config = fit_run_to_data(read_config(name, options))
    out.quiet = os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
    out.print(describe_run(config, output), soft_wrap=True)
    for line in describe_changes(config, name):
        out.print(line, soft_wrap=True)
    with show_progress("training", config.steps) as bar:
        summary = train(
            config, output, resume=not fresh, on_step=lambda report: show_report(bar, report)
        )
    say_end(summary)
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)


def read_config(file: str | Path | None, options: dict[str, Any]) -> TrainConfig:
    """Put options over those of a file, if there is one.

    Args:
        file: JSON of a `TrainConfig`, whose options that it lacks have their defaults, or the name
            of a published run.
        options: options of run and model by name, and `kind` of the model.

    Returns:
        The configuration.

    Raises:
        ConfigError: an option is unknown, out of range, or does not fit the others, or there is
            no such file or run.

    Example:
        >>> read_config(None, {"scale": "B", "steps": 10}).model.depth
        12
    """
    values = {} if file is None else open_config(file).model_dump(mode="json")
    plain = {name: plain_value(value) for name, value in options.items()}
    kind = plain.pop("kind", None)
    model_options = {name: plain.pop(name) for name in MODEL_OPTIONS & plain.keys()}
    model = values.get("model", {})
    if kind is not None and KINDS[kind] != model.get("kind", KINDS["dc"]):
        shared = TransformerConfig.model_fields  # sizes mean the same to both kinds
        model = {option: value for option, value in model.items() if option in shared}
    if any(name in model_options for name in SIZES) and "scale" not in model_options:
        model = {**model, "scale": None}
    if "scale" in model_options:
        model = {name: value for name, value in model.items() if name not in SIZES}
    elif not model.get("hidden_size") and not any(name in model_options for name in SIZES):
        model_options["scale"] = "S"
    chosen = {**model, **model_options}
    name = KINDS[kind] if kind is not None else chosen.get("kind", KINDS["dc"])
    chosen.pop("kind", None)
    values |= plain
    if name == KINDS["dc"] and "patch_size" in options:
        raise ConfigError(
            f"patch_size={options['patch_size']} is for fixed patches, and a DC-DiT has one cell "
            "per pixel of its latent: take --space-to-depth, or --model dit"
        )
    if name == KINDS["dit"]:
        refuse_adaptive(options)
        pixels, cell = (values.get(size, default_of(size)) for size in PIXELS)
        known = "latent_size" in chosen and not any(size in plain for size in PIXELS)
        if not known and pixels % cell == 0:  # the data have the last word; patches come before
            chosen["latent_size"] = pixels // cell
    return TrainConfig(**{**values, "model": read_model_config(name, chosen)})


def default_of(option: str) -> Any:  # noqa: ANN401
    """Return what an option of a run is if nobody gives it."""
    return TrainConfig.model_fields[option].default


def refuse_adaptive(options: dict[str, Any]) -> None:
    """Raise a `ConfigError` if an option came that a fixed-patch model cannot follow."""
    given = [name for name in ADAPTIVE if name in options]
    if given:
        name = given[0]
        raise ConfigError(
            f"{name}={plain_value(options[name])} is for a model that chooses its tokens, and one "
            "with fixed patches keeps all of them: leave it out, or take --model dc"
        )


def open_config(name: str | Path) -> TrainConfig:
    """Return the run of a file, or a published one.

    Args:
        name: path of a JSON file, or a name such as `"paper/S-256"`.

    Returns:
        The run.

    Raises:
        ConfigError: there is neither a file nor a published run of that name.
    """
    text = str(name)
    if not Path(name).is_file():
        if text.startswith(PREFIX):
            return make_paper_run(text)
        if not text.endswith(".json"):
            raise ConfigError(
                f"cannot read the configuration {text}: there is no such file, and the published "
                f"runs are {', '.join(list_paper_runs())}"
            )
    return TrainConfig.from_json_file(name)


def describe_changes(config: TrainConfig, name: str | None) -> list[str]:
    """Say in what a run is not the published one whose name was given.

    Args:
        config: the run.
        name: of a published run; other names and None mean nothing.

    Returns:
        One line, or none.
    """
    if name not in list_paper_runs():
        return []
    asked, ours = (flatten(run.model_dump(mode="json")) for run in (make_paper_run(name), config))
    changes = [
        f"{option} {ours.get(option)} for {asked.get(option)}"
        for option in sorted(asked.keys() | ours.keys())
        if asked.get(option) != ours.get(option)
        and option not in OUTSIDE
        and not option.startswith("latents.")
    ]
    return [f"not the published setting of {name}: {', '.join(changes)}"] if changes else []


def plain_value(value: Any) -> Any:  # noqa: ANN401
    """Return what JSON would hold: the value of a choice, a tuple for a list."""
    value = getattr(value, "value", value)
    return tuple(value) if isinstance(value, list) else value


def describe_run(config: TrainConfig, output: Path) -> str:
    """Say what is about to happen."""
    model = config.model
    kind = type(model).__name__.removesuffix("Config")
    h, w = model.grid
    encoded = "" if config.latents is None else f", latents of {config.latents.name}"
    return (
        f"{kind}, width {model.hidden_size}, {model.depth} blocks, on {h} x {w} cells of "
        f"{model.in_channels} channels; {config.data}, {model.num_classes} classes, "
        f"{config.image_size} px{encoded}; objective {config.objective}, {config.steps:,} steps of "
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
