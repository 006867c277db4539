"""`adaptok encode`: a folder of images becomes latents to train on."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Stored(StrEnum):
    """Precision of stored latents."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"


def encode(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images, one folder per class.")],
    vae: Annotated[
        str,
        typer.Option(
            metavar="FOLDER|NAME",
            help="An AutoencoderKL of diffusers: a folder that save_pretrained wrote, or a name "
            "that diffusers can fetch.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the latents.")],
    size: Annotated[
        int,
        typer.Option(min=1, help="Side of an image in pixels: the central square, resized to it."),
    ] = 256,
    mirror: Annotated[
        bool,
        typer.Option(
            "--mirror/--no-mirror",
            help="Encode each image a second time, mirrored, for training with --flip. "
            "Takes twice the time and space.",
        ),
    ] = True,
    skip_unreadable: Annotated[
        bool,
        typer.Option(
            "--skip-unreadable", help="Leave out image files that cannot be read, and count them."
        ),
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images that the autoencoder is given at once.")
    ] = 16,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Image files per shard, the unit that a stop can cost.")
    ] = 2048,
    dtype: Annotated[
        Stored, typer.Option(help="Precision of the stored latents.")
    ] = Stored.FLOAT16,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that decode image files ahead.")
    ] = 0,
    device: Annotated[
        str | None,
        typer.Option(help="cpu or cuda. Default: cuda if there is one.", show_default=False),
    ] = None,
) -> None:
    """Encode a folder of images into latents, once, to train on them with `adaptok train --data`.

    Mean and standard deviation are stored, so that each step of training draws anew. The same
    command goes on after Ctrl-C, a crash or a kill; shards whose images have not changed are kept.

    Example: `adaptok encode imagenet/train --vae models/sd-vae --size 256 -o latents/imagenet-256`
    """
    from adaptok.cli.encoding import run_encoding
    from adaptok.train.shards import EncodeOptions

    run_encoding(
        folder,
        output,
        vae,
        EncodeOptions(
            size=size,
            mirrored=mirror,
            skip_unreadable=skip_unreadable,
            batch_size=batch_size,
            shard_size=shard_size,
            dtype=dtype.value,
            workers=workers,
        ),
        device,
    )
