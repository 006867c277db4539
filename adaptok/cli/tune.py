"""`adaptok tune`: train router and dechunker of a wrapped model against the model itself."""

from pathlib import Path
from typing import Annotated

import typer

from adaptok.cli.options import ImageSize, RandomWeights, VisionModel, Weights


def tune(
    model: VisionModel,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the adapter (`adaptok.load`).")
    ],
    images: Annotated[
        str,
        typer.Option(
            metavar="emoji|FOLDER|FILE",
            help="Images to learn from, no labels needed: the shipped emoji, a folder, or an .npz "
            "file. One in ten is held out (of the emoji, the test split).",
        ),
    ] = "emoji",
    weights: Weights = None,
    random_weights: RandomWeights = False,
    image_size: ImageSize = None,
    router: Annotated[str, typer.Option(help="Router, by name.")] = "dc",
    keep: Annotated[
        list[float] | None,
        typer.Option(
            "--keep",
            metavar="0..1",
            help="Fraction of the cells to train with; may be given several times. Default: 0.3, "
            "0.4 ... 1.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 200,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step.")] = 8,
    lr: Annotated[float, typer.Option("--lr", min=0, help="Learning rate at the start.")] = 5e-4,
    ratio_weight: Annotated[float, typer.Option(min=0, help="Weight of the ratio loss.")] = 0.03,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
) -> None:
    """Train router and dechunker of a wrapped model against its own unwrapped outputs.

    The model itself is not changed. Needs images only; on a CPU a small ViT takes minutes. Says
    before and after, on images that it has not learned from, how far the outputs are from the
    unwrapped ones.

    Example: `adaptok tune vit_small_patch16_224 --images photos -o adapters/photos`
    """
    from adaptok.cli.tuning import Tuning, run_tuning

    run_tuning(
        Tuning(
            model=model,
            output=output,
            images=images,
            weights=weights,
            random_weights=random_weights,
            image_size=image_size,
            router=router,
            keep=tuple(keep or ()),
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            ratio_weight=ratio_weight,
            seed=seed,
        )
    )
