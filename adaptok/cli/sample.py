"""`adaptok sample`: draw images with a trained model."""

from pathlib import Path
from typing import Annotated

import typer


def sample(
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="NAME|FOLDER", help="A shipped model or a folder of your own."
        ),
    ] = "dcdit-emoji32",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "-l",
            metavar="CLASS",
            help="Class by number, name or part of a name; none for no class. May be given "
            "several times. Default: every class, at most eight.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images per class.")] = 1,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the first image; the next one has the next seed.")
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Sampling steps. Default: 250 for ddpm, 20 for dpm, 50 for flow-euler.",
            show_default=False,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ddpm|dpm|flow-euler",
            help="How noise becomes an image: ddpm or dpm for models that predict noise, "
            "flow-euler for flow matching. Default: a fast one that fits the model.",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float,
        typer.Option(
            help="Guidance scale: above 1 the image looks more like its class, and each step runs "
            "the model twice."
        ),
    ] = 1.0,
    drop: Annotated[
        float | None,
        typer.Option(
            metavar="0..1", help="Drop this fraction of the tokens that the router would keep."
        ),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(metavar="0..1", help="Keep this fraction of all cells.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Keep exactly so many tokens.")
    ] = None,
    uncond_drop: Annotated[
        float | None,
        typer.Option(
            metavar="0..1",
            help="Drop this fraction in the run without a class only (Lite-CFG); needs --guidance.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")] = Path(
        "samples"
    ),
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda. Default: cuda if there is one.", show_default=False),
    ] = None,
) -> None:
    """Draw images with a trained model, and say what they cost.

    Writes one PNG per image and grid.png with all of them. At most one of --drop, --keep and
    --tokens says how many tokens the model may use; without one its router decides.

    Example: `adaptok sample --label food --label smileys --count 4 --drop 0.3`
    """
    from adaptok.cli.drawing import SampleOptions, draw_samples

    draw_samples(
        SampleOptions(
            model=model,
            labels=tuple(label or ()),
            count=count,
            seed=seed,
            steps=steps,
            scheduler=scheduler,
            guidance=guidance,
            drop=drop,
            keep=keep,
            tokens=tokens,
            uncond_drop=uncond_drop,
            output=output,
            device=device,
        )
    )
