"""`adaptok demo`: the whole library in two minutes."""

from pathlib import Path
from typing import Annotated

import typer

from adaptok.cli.options import RoutedModel


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for pictures, report.html, summary.json.")
    ] = Path("demo"),
    model: RoutedModel = "dcdit-emoji32",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image.")] = 0,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps of each image.")] = 20,
    train_steps: Annotated[
        int, typer.Option(min=2, help="Steps of the short training run that is shown.")
    ] = 100,
) -> None:
    """Show what adaptok does, in pictures. Takes about two minutes on two CPU cores.

    Draws the same images under five budgets, shows where the model spends its tokens and when,
    noises and denoises real images, trains a tiny model for a moment, and says what each budget
    costs: tokens, operations, and measured time. Open report.html in a browser to look at every
    cell of every step.
    """
    from adaptok.cli.settings import Tour
    from adaptok.cli.tour import give_tour

    give_tour(Tour(output=output, model=model, seed=seed, steps=steps, train_steps=train_steps))
