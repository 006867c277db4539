"""`adaptok evaluate`: how far samples are from real images."""

from pathlib import Path
from typing import Annotated

import typer

from adaptok.cli.options import Device, Threads


def evaluate(
    samples: Annotated[
        str, typer.Argument(metavar="SAMPLES", help="A folder of images or an .npz file.")
    ],
    real: Annotated[
        str,
        typer.Argument(
            metavar="REAL",
            help="Real images: a folder, an .npz file, or emoji for the shipped training images.",
        ),
    ],
    extractor: Annotated[
        str,
        typer.Option(
            metavar="NAME|MODULE:NAME",
            help="efficientnet-lite0, which needs timm, or a torch module or function of your own "
            "that Python can import, from uint8 RGB images to features.",
        ),
    ] = "efficientnet-lite0",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|download",
            help="Weights of efficientnet-lite0 as safetensors, or download to let timm fetch "
            "them. Nothing is downloaded unless you say so.",
            show_default=False,
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            metavar="IMAGES",
            help="Real images that no model was trained on; their distance is given beside that "
            "of the samples.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Edge in pixels to which all images are brought before the extractor sees them. "
            "Default: the smallest edge of all, so that sharpness alone does not count.",
            show_default=False,
        ),
    ] = None,
    resamples: Annotated[
        int, typer.Option(min=2, help="Random halves of the images for the interval of KID.")
    ] = 1000,
    frechet_resamples: Annotated[
        int, typer.Option(min=2, help="Halves for the Frechet distance; each takes a second.")
    ] = 50,
    level: Annotated[float, typer.Option(metavar="0..1", help="Of the intervals.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of the random halves.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images that the extractor sees at once.")] = 64,
    device: Device = None,
    threads: Threads = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the figures as JSON; - prints nothing else."
        ),
    ] = None,
) -> None:
    """Measure how far samples are from real images: KID first, the Frechet distance second.

    Both carry the name of the extractor and an interval; one half of the real images against the
    other is the floor. They are no FID: only distances by the same extractor, size and number of
    images compare.

    Example: `adaptok evaluate samples emoji --weights efficientnet_lite0.safetensors`
    """
    from adaptok.cli.evaluating import Evaluating, run_evaluate

    run_evaluate(
        Evaluating(
            samples=samples,
            real=real,
            extractor=extractor,
            weights=weights,
            held_out=held_out,
            size=size,
            resamples=resamples,
            frechet_resamples=frechet_resamples,
            level=level,
            seed=seed,
            batch=batch,
            device=device,
            threads=threads,
            json=json,
        )
    )
