"""`adaptok calibrate`: settings of stages that depend on data, fitted to images."""

from pathlib import Path
from typing import Annotated

import typer

from adaptok.cli.options import ImageSize, RandomWeights, VisionModel, Weights


def calibrate(
    model: VisionModel,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSON file for the profile (`Profile.load`).")
    ],
    stack: Annotated[
        list[str] | None,
        typer.Option(
            "--stack",
            metavar="NAME",
            help="A stage, by name; may be given several times.",
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="Folder of an adapter instead of --stack, such as one with trained exits.",
            show_default=False,
        ),
    ] = None,
    want: Annotated[
        list[str] | None,
        typer.Option(
            "--want",
            metavar="STAGE.NAME=VALUE",
            help="What is to be reached, such as tome.keep=0.6; may be given several times.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        str,
        typer.Option(
            metavar="emoji|FOLDER|FILE",
            help="Images, no labels needed: the shipped emoji, a folder, or an .npz file.",
        ),
    ] = "emoji",
    count: Annotated[int, typer.Option(min=2, help="Images that are measured.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a call.")] = 8,
    weights: Weights = None,
    random_weights: RandomWeights = False,
    image_size: ImageSize = None,
    holdout: Annotated[
        float, typer.Option(metavar="0..1", help="Share of the batches that only figures see.")
    ] = 0.5,
    json: Annotated[
        bool, typer.Option("--json", help="Print the profile as JSON and nothing else.")
    ] = False,
) -> None:
    """Fit the settings of stages that depend on data, and write them as a profile.

    Runs the wrapped model over images; half of them are held out, and the figures hold for those.
    Sampling walks, which TeaCache needs, are for Python: `adaptok.calibrate`.

    Example: `adaptok calibrate vit_small_patch16_224 --stack tome --want tome.keep=0.6
    --images photos -o profile.json`
    """
    from adaptok.cli.fitting import Fitting, run_fitting

    run_fitting(
        Fitting(
            model=model,
            output=output,
            stack=tuple(stack or ()),
            adapter=adapter,
            want=tuple(want or ()),
            images=images,
            count=count,
            batch_size=batch_size,
            weights=weights,
            random_weights=random_weights,
            image_size=image_size,
            holdout=holdout,
            json=json,
        )
    )
