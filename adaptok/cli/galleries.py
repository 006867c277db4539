"""The work of `adaptok gallery`."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from jaxtyping import UInt8
from torch import Tensor

from adaptok.budgets import Budget
from adaptok.cli.terminal import out, show_progress
from adaptok.errors import ConfigError
from adaptok.see import draw_gallery, find_exhibits, save_figure
from adaptok.see.canvas import check_ending
from adaptok.see.specimens import load_emoji
from adaptok.train.pixels import decode_image

EMOJI = ("parrot", "red apple", "tropical fish", "rainbow")
SIZE = 64  # of a shipped emoji
MOST = 6


@dataclass(frozen=True, slots=True)
class GalleryOptions:
    """What a person asked for; see `adaptok gallery --help`."""

    output: Path
    emoji: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    keep: float = 0.25
    json: bool = False


def make_gallery(asked: GalleryOptions) -> None:
    """Run all methods, draw the picture, and say what is not on it.

    Args:
        asked: what a person asked for.

    Raises:
        AdaptokError: an image cannot be used, or the picture cannot be written.
    """
    Budget(keep=asked.keep)
    check_ending(asked.output)
    names = asked.emoji if asked.emoji or asked.images else EMOJI
    if len(names) + len(asked.images) > MOST:
        raise ConfigError(
            f"a gallery has at most {MOST} images, got {len(names) + len(asked.images)}"
        )
    shipped = torch.from_numpy(load_emoji(names).copy()).permute(0, 3, 1, 2) if names else ()
    images = torch.stack([*shipped, *(load_image(path) for path in asked.images)])
    with show_progress("running methods", 1) as bar:
        exhibits = find_exhibits(images, keep=asked.keep, progress=bar.move_to)
    path = save_figure(draw_gallery(images, exhibits, keep=asked.keep), asked.output)
    shown = [item for item in exhibits if item.token is not None]
    missing = [item for item in exhibits if item.token is None]
    if asked.json:
        typer.echo(
            json.dumps(
                {
                    "picture": str(path),
                    "shown": [
                        {"name": item.name, "kind": item.kind, "tokens": list(item.counts)}
                        for item in shown
                    ],
                    "not_shown": [
                        {"name": item.name, "kind": item.kind, "reason": item.problem}
                        for item in missing
                    ],
                },
                indent=2,
            )
        )
        return
    for item in missing:
        out.print(f"not shown: {item.name}: {item.problem}", markup=False, soft_wrap=True)
    out.print(f"gallery: {path} ({len(shown)} methods)", soft_wrap=True)


def load_image(path: Path) -> UInt8[Tensor, "3 h w"]:
    """Return the central square of an image file."""
    return decode_image(path, SIZE)
