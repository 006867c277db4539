"""The work of `adaptok calibrate`."""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from jaxtyping import Float
from torch import Tensor

from adaptok.calibrating import calibrate
from adaptok.cli.terminal import Bar, out, show_progress
from adaptok.cli.tuning import Part, Tuning, VisionHost, open_host, open_images
from adaptok.errors import ConfigError, FullBudgetWarning
from adaptok.wrapping import wrap


@dataclass(frozen=True, slots=True)
class Fitting:
    """What a person asked for; see `adaptok calibrate --help`."""

    model: str
    output: Path
    stack: tuple[str, ...] = ()
    adapter: Path | None = None
    want: tuple[str, ...] = ()
    images: str = "emoji"
    count: int = 64
    batch_size: int = 8
    weights: Path | None = None
    random_weights: bool = False
    image_size: int | None = None
    holdout: float = 0.5
    json: bool = False


def run_fitting(asked: Fitting) -> None:
    """Calibrate as a person asked on the command line.

    Args:
        asked: the options.

    Raises:
        AdaptokError: an option is wrong, or there is nothing to fit.
    """
    wanted = read_wishes(asked.want)
    if bool(asked.stack) == (asked.adapter is not None):
        raise ConfigError("give either --stack or --adapter: what is to be calibrated")
    opening = Tuning(
        model=asked.model,
        output=asked.output,
        images=asked.images,
        weights=asked.weights,
        random_weights=asked.random_weights,
        image_size=asked.image_size,
        batch_size=asked.batch_size,
    )
    host = open_host(opening)
    pictures, _ = open_images(opening, host.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FullBudgetWarning)
        if asked.adapter is None:
            model = wrap(host.model, stack=asked.stack)
        else:
            from adaptok.adapters import load

            model = load(host.model, asked.adapter)
    with show_progress("measuring batches", -(-asked.count // asked.batch_size)) as bar:
        batches = draw_batches(host, pictures, asked, bar)
        profile = calibrate(model, batches, wanted=wanted, holdout=asked.holdout)
    if not profile.stages:
        raise ConfigError(
            f"there is nothing to fit for {', '.join(profile.unfit)}: give --want for a stage that "
            "can be asked for something, such as --want tome.keep=0.6"
        )
    profile.save(asked.output)
    if asked.json:
        typer.echo(profile.to_json())
        return
    typer.echo("\n".join(profile.describe()))
    out.print(f"profile: {asked.output}", soft_wrap=True)


def draw_batches(
    host: VisionHost, pictures: Part, asked: Fitting, bar: Bar
) -> Iterator[Float[Tensor, "b 3 h w"]]:
    """Yield images, a batch at a time, in an order that is always the same."""
    chosen = pictures.shuffled(0)[: asked.count].split(asked.batch_size)
    for done, places in enumerate(chosen):
        bar.move_to(done, len(chosen))
        yield host.prepare(pictures.take(places))


def read_wishes(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what is wanted of stages, from the words of a person.

    Args:
        texts: such as `"tome.keep=0.6"`.

    Raises:
        ConfigError: the words mean nothing.

    Example:
        >>> read_wishes(["tome.keep=0.6", "exit.compared=features"])
        {'tome': {'keep': 0.6}, 'exit': {'compared': 'features'}}
    """
    wanted: dict[str, dict[str, Any]] = {}
    for text in texts:
        path, sign, value = text.partition("=")
        stage, dot, name = path.strip().partition(".")
        if not (sign and dot and stage and name):
            raise ConfigError(f"{text!r} is no wish: give STAGE.NAME=VALUE, as in tome.keep=0.6")
        try:
            read = json.loads(value)
        except ValueError:
            read = value.strip()
        wanted.setdefault(stage, {})[name] = read
    return wanted
