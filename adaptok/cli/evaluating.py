"""The work of `adaptok evaluate`."""

import importlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from jaxtyping import Float, UInt8
from torch import Tensor

from adaptok.cli.benching import STDOUT, limit_threads
from adaptok.cli.drawing import choose_device
from adaptok.cli.terminal import out, show_progress
from adaptok.config import Config
from adaptok.errors import ConfigError, DataError
from adaptok.measure.distances import (
    FLOOR_SPLITS,
    FRECHET_RESAMPLES,
    LEAST_IMAGES,
    RESAMPLES,
    Distances,
    check_resampling,
    compare_features,
    measure_floor,
)
from adaptok.measure.extractors import FeatureExtractor, extract_features, load_extractor
from adaptok.measure.machine import Machine, describe_machine
from adaptok.optional import import_optional
from adaptok.train.data import load_emoji
from adaptok.train.image_files import IMAGE_ENDINGS, list_image_files
from adaptok.train.npz import map_npz_array
from adaptok.train.pixels import decode_image, resize_pixels

VERSION = 1  # of the JSON
EMOJI = "emoji"
GRID = "grid.png"  # `adaptok sample` puts all samples into it
NPZ_NAMES = ("images", "arr_0")  # ours, and that of the usual ImageNet evaluation
SHOWN = 3  # names and sizes in a message


@dataclass(frozen=True, slots=True)
class Evaluating:
    """What a person asked for; see `adaptok evaluate --help`."""

    samples: str
    real: str
    extractor: str
    weights: str | None = None
    held_out: str | None = None
    size: int | None = None
    resamples: int = RESAMPLES
    frechet_resamples: int = FRECHET_RESAMPLES
    level: float = 0.95
    seed: int = 0
    batch: int = 64
    device: str | None = None
    threads: int | None = None
    json: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Images that are decoded one at a time.

    Args:
        source: what a person typed.
        names: one per image, for messages.
        sizes: width and height of each in pixels.
        take: gives an image at the edge that is asked for.
    """

    source: str
    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    take: Callable[[int, int], UInt8[Tensor, "3 size size"]]

    @property
    def smallest(self) -> int:
        """Smallest edge of all images."""
        return min(min(size) for size in self.sizes)

    def describe(self) -> str:
        """Say how many images there are, and of which sizes."""
        counts = Counter(self.sizes).most_common()
        shown = ", ".join(f"{width}x{height}" for (width, height), _ in counts[:SHOWN])
        if len(counts) > SHOWN:
            shown += f" and {len(counts) - SHOWN} more sizes"
        return f"{self.source}: {len(self.names)} images of {shown} px"


class Evaluation(Config):
    """What `adaptok evaluate` found, as JSON.

    Args:
        extractor: label of the extractor; the distances are KID and FD by it.
        weights: of the extractor, in words.
        rule: what happened to the pixels, in words.
        size: edge in pixels to which all images were brought before the extractor.
        samples: distances of the samples to the real images.
        held_out: those of held-out images to the real images.
        floor: those of one half of the real images to the other.
        level: of the intervals.
        seed: of the random halves.
        machine: where it was computed.
        version: of this layout.
    """

    extractor: str
    weights: str
    rule: str
    size: int
    samples: Distances
    held_out: Distances | None
    floor: Distances
    level: float
    seed: int
    machine: Machine
    version: int = VERSION


def run_evaluate(asked: Evaluating) -> None:
    """Measure distances as a person asked on the command line.

    Args:
        asked: the options.

    Raises:
        AdaptokError: images, the extractor or an option are not as they must be.
    """
    check_resampling(asked.resamples, asked.frechet_resamples, asked.level)
    device = choose_device(asked.device)
    extractor = open_extractor(asked.extractor, asked.weights, device)
    specs = [asked.samples, asked.real, *filter(None, [asked.held_out])]
    sets = [open_pictures(spec) for spec in specs]
    size = asked.size or min(pictures.smallest for pictures in sets)
    with limit_threads(asked.threads):
        features = [
            see_pictures(pictures, extractor, size, asked.batch, device).to(device)
            for pictures in sets
        ]
        found = measure(asked, extractor, size, features, device)
    if asked.json == STDOUT:
        typer.echo(found.to_json())
        return
    typer.echo("\n".join(write_evaluation(found, sets)))  # as text, without markup or wrapping
    if asked.json is not None:
        found.to_json_file(asked.json)
        out.print(f"figures: {asked.json}", soft_wrap=True)


def measure(
    asked: Evaluating,
    extractor: FeatureExtractor,
    size: int,
    features: list[Float[Tensor, "_ d"]],
    device: torch.device,
) -> Evaluation:
    """Measure all distances, of the samples, the real images and the held-out ones if any."""
    samples, real, *rest = features
    names = [f"distances of {name}" for name in ("samples", "held-out images")]
    options: dict[str, Any] = {
        "seed": asked.seed,
        "level": asked.level,
        "resamples": asked.resamples,
    }
    compared = []
    for name, ours in zip(names, [samples, *rest], strict=False):
        with show_progress(name, asked.frechet_resamples + 2) as bar:
            compared.append(
                compare_features(
                    ours,
                    real,
                    frechet_resamples=asked.frechet_resamples,
                    progress=bar.move_to,
                    **options,
                )
            )
    splits = min(FLOOR_SPLITS, asked.frechet_resamples)
    with show_progress("floor: real halves", splits + 1) as bar:
        floor = measure_floor(real, frechet_resamples=splits, progress=bar.move_to, **options)
    return Evaluation(
        extractor=extractor.label,
        weights=extractor.weights,
        rule=extractor.rule,
        size=size,
        samples=compared[0],
        held_out=compared[1] if rest else None,
        floor=floor,
        level=asked.level,
        seed=asked.seed,
        machine=describe_machine(device),
    )


def open_extractor(name: str, weights: str | None, device: torch.device) -> FeatureExtractor:
    """Make the extractor that a person named.

    Args:
        name: one of adaptok's, or `module:name` of something that Python can import.
        weights: of adaptok's.
        device: where it runs.

    Returns:
        The extractor.

    Raises:
        ConfigError: there is nothing of that name, or weights are missing.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        return load_extractor(name, weights, device=device)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the extractor {name!r} cannot be imported ({error}): give MODULE:NAME, and put the "
            "folder of the module into PYTHONPATH"
        ) from error
    return load_extractor(found, weights, device=device)


def open_pictures(spec: str) -> Pictures:
    """Find the images that a person named; pixels are decoded later.

    Args:
        spec: a folder, an `.npz` file, or `emoji`.

    Returns:
        At least four images.

    Raises:
        DataError: nothing is there, it cannot be read, or it holds too few images.
    """
    path = Path(spec).expanduser()
    if spec == EMOJI:
        emoji = load_emoji()
        pictures = open_array(EMOJI, emoji.take(range(len(emoji))).numpy())
    elif path.is_dir():
        pictures = open_folder(path)
    elif path.is_file() and path.suffix == ".npz":
        pictures = open_array(str(path), read_npz(path))
    else:
        what = "neither a folder nor an .npz file" if path.exists() else "not found"
        raise DataError(f"{spec!r} is {what}: give a folder of images, an .npz file, or {EMOJI}")
    if len(pictures.names) < LEAST_IMAGES:
        raise DataError(
            f"{spec} holds {len(pictures.names)} image{'s' if len(pictures.names) > 1 else ''}: "
            f"distances with intervals need at least {LEAST_IMAGES}, and hundreds to mean much"
        )
    return pictures


def open_folder(folder: Path) -> Pictures:
    """Find all images below a folder and read their sizes.

    Args:
        folder: where; hidden files and the grid.png of `adaptok sample` are passed over.

    Returns:
        The images in the order of their paths.

    Raises:
        DataError: there is no image, or some are none; the message names them.
    """
    image_module = import_optional("PIL.Image", extra="evaluate")
    files = [file for file in list_image_files(folder) if file.name != GRID]
    if not files:
        raise DataError(
            f"{folder} holds no image: put images ({', '.join(sorted(IMAGE_ENDINGS))}) into it"
        )
    sizes, broken = [], []
    for file in files:
        try:
            with image_module.open(file) as image:
                sizes.append(image.size)
        except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError):
            broken.append(str(file.relative_to(folder)))
    if broken:
        named = ", ".join(broken[:SHOWN]) + (", ..." if len(broken) > SHOWN else "")
        raise DataError(
            f"{len(broken)} of {len(files)} images in {folder} cannot be read ({named}): repair, "
            "replace or remove them"
        )
    return Pictures(
        str(folder),
        tuple(str(file) for file in files),
        tuple(sizes),
        lambda place, size: decode_image(files[place], size),
    )


def read_npz(path: Path) -> UInt8[np.ndarray, "n _ _ _"]:
    """Read the uint8 RGB images of an `.npz` file, from the array `images` or `arr_0`.

    Raises:
        DataError: the file cannot be read, or holds no such images.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            names = [name for name in NPZ_NAMES if name in content]
        # a file of 50,000 samples may be larger than memory
        images = map_npz_array(path, names[0]) if names else np.empty(0)
    except (OSError, EOFError, ValueError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(
            f"cannot read {path} ({error}): give an .npz file, written with numpy.savez"
        ) from error
    if not names:
        raise DataError(f"{path} has no array {' or '.join(NPZ_NAMES)}: it needs the images there")
    is_rgb = images.ndim == 4 and 3 in (images.shape[1], images.shape[3])
    if images.dtype != np.uint8 or not is_rgb or 0 in images.shape:
        raise DataError(
            f"images of {path} are {images.dtype} of shape {images.shape}: give uint8 of "
            "(n, h, w, 3) or (n, 3, h, w), at least one"
        )
    return images


def open_array(source: str, pixels: UInt8[np.ndarray, "n _ _ _"]) -> Pictures:
    """Take images from memory, with their channels last or second."""
    if pixels.shape[3] != 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    count, height, width, _ = pixels.shape

    def take(place: int, size: int) -> Tensor:
        small = resize_pixels(np.ascontiguousarray(pixels[place]), size)
        return torch.from_numpy(small.transpose(2, 0, 1).copy())

    names = tuple(f"image {place} of {source}" for place in range(count))
    return Pictures(source, names, ((width, height),) * count, take)


def see_pictures(
    pictures: Pictures, extractor: FeatureExtractor, size: int, batch: int, device: torch.device
) -> Float[Tensor, "n d"]:
    """Extract the features of all images."""
    total = len(pictures.names)

    def stack(note: Callable[[int, int], None]) -> Iterator[Tensor]:
        for start in range(0, total, batch):
            places = range(start, min(start + batch, total))
            yield torch.stack([pictures.take(place, size) for place in places]).to(device)
            note(places.stop, total)

    with show_progress(f"features of {pictures.source}", total) as bar:
        return extract_features(extractor, stack(bar.move_to), names=pictures.names)


def write_evaluation(found: Evaluation, sets: list[Pictures]) -> list[str]:
    """Return what a person reads: the figures, and what they hold for."""
    rows = [("samples", found.samples), ("held-out images", found.held_out)]
    rows.append(("floor: real halves", found.floor))
    table = [["", f"KID-{found.extractor}", f"FD-{found.extractor}", "images"]] + [
        [name, str(row.kid), str(row.frechet), f"{row.left} against {row.right}"]
        for name, row in rows
        if row is not None
    ]
    widths = [max(len(line[place]) for line in table) for place in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    seen = {size for pictures in sets for size in pictures.sizes}
    brought = ""
    if seen != {(found.size, found.size)}:
        brought = f"; all brought to {found.size}x{found.size} px: centre square, Lanczos"
    return [
        *lines,
        "",
        f"images: {'; '.join(pictures.describe() for pictures in sets)}{brought}",
        f"extractor: {found.extractor}, {found.weights}; {found.rule}",
        f"intervals: {found.level:.0%}, random halves of the images, {found.samples.kid.resamples} "
        f"for KID, {found.samples.frechet.resamples} for FD; the floor: median and range of "
        f"{found.floor.kid.resamples} and {found.floor.frechet.resamples} splits",
        "FD grows as images get fewer: compare it between equal numbers of images only.",
    ]
