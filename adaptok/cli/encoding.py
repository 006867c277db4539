"""The work of `adaptok encode`."""

import time
from pathlib import Path

import typer

from adaptok.cli.autoencoders import open_autoencoder
from adaptok.cli.drawing import choose_device
from adaptok.cli.terminal import INTERRUPTED, describe_seconds, err, out, show_progress
from adaptok.train.encoding import EncodeSummary, check_places, encode_folder
from adaptok.train.paper import IMAGE_SIZES
from adaptok.train.shards import EncodeOptions

NAMED = 20  # image files left out that are printed


def run_encoding(
    folder: Path, output: Path, vae: str, options: EncodeOptions, device: str | None
) -> None:
    """Encode as a person asked on the command line.

    Args:
        folder: of the images.
        output: folder for the latents.
        vae: folder or name of the autoencoder.
        options: how.
        device: where the autoencoder computes.

    Raises:
        AdaptokError: an option is wrong, images cannot be read, or the disk is full.
        typer.Exit: the run was interrupted.
    """
    place = choose_device(device)
    check_places(folder, output)
    autoencoder = open_autoencoder(vae, place)
    started = time.monotonic()
    try:
        with show_progress("encoding", 1) as bar:
            summary = encode_folder(folder, output, autoencoder, options, bar.move_to)
    except KeyboardInterrupt:
        err.print(
            "stopped: run the same command again to go on; whole shards are kept", soft_wrap=True
        )
        raise typer.Exit(INTERRUPTED) from None
    say_what_came(summary, output, time.monotonic() - started)


def say_what_came(summary: EncodeSummary, output: Path, seconds: float) -> None:
    """Say what the cache holds and what to do with it."""
    index = summary.index
    classes = "1 class" if len(index.class_names) == 1 else f"{len(index.class_names):,} classes"
    views = ", each also mirrored" if index.mirrored else ""
    gigabytes = sum((output / shard.file).stat().st_size for shard in index.shards) / 1e9
    out.print(
        f"done: {summary.images:,} images of {classes}{views}, {index.image_size} px, in "
        f"{describe_seconds(seconds)}; {len(index.shards):,} shards "
        f"({summary.kept_shards:,} were there), {gigabytes:.3f} GB",
        soft_wrap=True,
    )
    if index.unreadable:
        left_out = len(index.unreadable)
        named = ", ".join(index.unreadable[:NAMED]) + (", ..." if left_out > NAMED else "")
        files = "file that cannot be read is" if left_out == 1 else "files that cannot be read are"
        err.print(f"{left_out:,} image {files} left out: {named}", markup=False, soft_wrap=True)
    run = f"--config paper/S-{index.image_size} " if index.image_size in IMAGE_SIZES else ""
    out.print(
        f"latents: {output}\ntrain:   adaptok train {run}--data {output} --output RUN",
        soft_wrap=True,
    )
