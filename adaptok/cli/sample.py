"""`adaptok sample`: draw images with a trained model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from adaptok.cli.options import Autoencoder

FILE = "One file"


class Classes(StrEnum):
    """How the classes of many samples are chosen."""

    BALANCED = "balanced"
    DRAWN = "drawn"


class Precision(StrEnum):
    """Precision of the model."""

    NO = "no"
    BF16 = "bf16"


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
            "several times. Default: every class, into a folder at most eight.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int,
        typer.Option(
            "--count", "-n", min=1, help="Images per class; in one FILE.npz images in all."
        ),
    ] = 1,
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            help="Seed of the first image; the next one has the next seed. In one FILE.npz image i "
            "has the seed 1000000 * SEED + i.",
        ),
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
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER|FILE.npz",
            help="Folder for the images, or one file for all of them.",
        ),
    ] = Path("samples"),
    vae: Autoencoder = None,
    classes: Annotated[
        Classes | None,
        typer.Option(
            help="balanced: each class equally often; drawn: at random. Default: balanced.",
            rich_help_panel=FILE,
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images that a process draws at once, and loses at most when it is killed. "
            "Default: 32.",
            rich_help_panel=FILE,
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="no is float32; bf16 suits GPUs. Default: no.",
            rich_help_panel=FILE,
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda. Default: cuda if there is one.", show_default=False),
    ] = None,
) -> None:
    """Draw images with a trained model, and say what they cost.

    Into a folder: one PNG per image and grid.png with all of them. Into FILE.npz: what the usual
    evaluations read, arr_0 with the pixels (uint8, n h w 3) and arr_1 with the classes; a run that
    stopped goes on by the same command, and `torchrun` or `accelerate launch` share it among
    processes. At most one of --drop, --keep and --tokens says how many tokens the model may use;
    without one its router decides.

    Example: `adaptok sample --label food --label smileys --count 4 --drop 0.3`

    Example: `torchrun --nproc-per-node 8 -m adaptok sample -m runs/s -n 50000 -o samples.npz`
    """
    from adaptok.cli.drawing import SampleOptions, draw_samples
    from adaptok.cli.many import draw_many

    draw = draw_many if output.suffix == ".npz" else draw_samples
    draw(
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
            vae=vae,
            classes=None if classes is None else classes.value,
            batch=batch,
            precision=None if precision is None else precision.value,
        )
    )
