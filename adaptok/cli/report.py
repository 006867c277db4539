"""`adaptok report`: one HTML file in which every cell can be looked at."""

from pathlib import Path
from typing import Annotated

import typer

from adaptok.cli.options import Autoencoder, RoutedModel


def report(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The HTML file.")
    ] = Path("report.html"),
    model: RoutedModel = "dcdit-emoji32",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "-l",
            metavar="CLASS",
            help="Class of a sample, by name or number; give it several times for several samples. "
            "Default: four classes.",
            show_default=False,
        ),
    ] = None,
    drop: Annotated[
        list[float] | None,
        typer.Option(
            "--drop",
            metavar="0..1",
            help="A budget: share of the naturally kept cells to drop; give it several times for "
            "several budgets. Default: 0, 0.3, 0.6.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(
            "--keep",
            metavar="0..1",
            help="A budget: share of all cells to keep; instead of or beside --drop.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first sample.")] = 0,
    vae: Autoencoder = None,
) -> None:
    """Write one HTML file with sliders over steps and budgets. Takes half a minute on a CPU.

    Point at a cell, or move with the arrow keys, to see which token stands for it. The file needs
    no network and can be sent to anybody. What a model of latents is given and sees is decoded,
    step by step; that takes longer than drawing.

    Example: `adaptok report --drop 0 --drop 0.5 --label food --output food.html`
    """
    from adaptok.cli.reporting import Reporting, make_report

    make_report(
        Reporting(
            output=output,
            model=model,
            labels=tuple(label or ()),
            drops=tuple(drop or ()),
            keeps=tuple(keep or ()),
            steps=steps,
            seed=seed,
            vae=vae,
        )
    )
