"""The work of `adaptok distill`."""

from pathlib import Path
from typing import Any

import typer

from adaptok.cli.terminal import INTERRUPTED, out, show_progress
from adaptok.cli.training import describe_run, say_end, show_report
from adaptok.dc.baseline import DiT
from adaptok.dc.folder import load_model
from adaptok.errors import ConfigError
from adaptok.train.config import TrainConfig
from adaptok.train.distillation import plan_upcycling
from adaptok.train.trainer import train

# What belongs to the run that trained the DiT, and not to its images and objective.
ITS_OWN = frozenset(("steps", "seed", "budget_warmup", "compile", "host", "distill_steps"))


def run_distilling(given: dict[str, Any]) -> None:
    """Upcycle, distil and fine-tune as a person asked on the command line.

    Args:
        given: the options that were given, by name.

    Raises:
        AdaptokError: an option is wrong, or the run fails.
        typer.Exit: the run was interrupted.
    """
    options = dict(given)
    host: Path = options.pop("host")
    output: Path = options.pop("output")
    fresh: bool = options.pop("fresh")
    config = plan_run(host, options)
    out.print(describe_run(config, output), soft_wrap=True)
    out.print(f"blocks of {host}; {config.distill_steps:,} steps of distillation first")
    with show_progress("distilling", config.steps) as bar:
        summary = train(
            config, output, resume=not fresh, on_step=lambda report: show_report(bar, report)
        )
    say_end(summary)
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)


def plan_run(host: Path, options: dict[str, Any]) -> TrainConfig:
    """Return a run around the blocks of a DiT, with its images and objective.

    Args:
        host: folder of the DiT.
        options: of the run by name, `distill_steps` and `steps` among them, and `target`.

    Returns:
        The run.

    Raises:
        ConfigError: the model is no DiT, or options do not fit.
        CheckpointError: there is no model in the folder.
    """
    trained = load_model(host)
    if not isinstance(trained.model, DiT):
        raise ConfigError(f"{host} holds a {type(trained.model).__name__}: a DiT is needed")
    kept = {
        name: value
        for name, value in trained.card.training.get("config", {}).items()
        if name in TrainConfig.model_fields and name not in ITS_OWN
    }
    if not kept:
        raise ConfigError(
            f"{host} does not say how its DiT was trained: use a model that `adaptok train` wrote, "
            "or adaptok.train.distillation.plan_upcycling"
        )
    if options.get("data", kept.get("data")) != "emoji":
        kept = {k: v for k, v in kept.items() if k not in ("categories", "skin_variants")}
    distill_steps = options.pop("distill_steps")
    target = options.pop("target", None)
    if distill_steps > options["steps"]:
        raise ConfigError(
            f"{distill_steps} steps of distillation do not fit into a run of {options['steps']}: "
            "give more --steps"
        )
    values = kept | {"budget_warmup": distill_steps} | options
    config = TrainConfig(**values, model=trained.model.config)
    return plan_upcycling(config, host.absolute(), distill_steps, target=target)
