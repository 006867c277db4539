"""The work of `adaptok sample`."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from rich.table import Table
from torch import Tensor

from adaptok.budgets import Budget
from adaptok.cli.autoencoders import open_decoder
from adaptok.cli.opening import open_trained
from adaptok.cli.pictures import name_label, objective_of, read_label
from adaptok.cli.terminal import err, out, show_progress
from adaptok.dc.baseline import refuse_budget
from adaptok.dc.config import DiTConfig
from adaptok.dc.folder import ModelCard, TrainedModel
from adaptok.errors import BudgetError, ConfigError, DeviceError, StorageError
from adaptok.measure import MeasuredSamples, measure_sampling
from adaptok.optional import import_optional
from adaptok.see import SampleRow, draw_sample_grid, save_figure
from adaptok.train.decoding import Decoder

PER_ROW = 8
FAST_SCHEDULER = {"hybrid": "dpm", "flow": "flow-euler"}
DEFAULT_STEPS = {"ddpm": 250, "dpm": 20, "flow-euler": 50}


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """What a person asked for; see `adaptok sample --help`."""

    model: str
    labels: tuple[str, ...] = ()
    count: int = 1
    seed: int = 0
    steps: int | None = None
    scheduler: str | None = None
    guidance: float = 1.0
    drop: float | None = None
    keep: float | None = None
    tokens: int | None = None
    uncond_drop: float | None = None
    output: Path = Path("samples")
    device: str | None = None
    vae: str | None = None
    classes: str | None = None
    batch: int | None = None
    precision: str | None = None

    def describe_budget(self) -> str:
        """Say the budget and the guidance in words, or raise a `BudgetError`."""
        Budget(keep=self.keep, tokens=self.tokens, drop=self.drop)  # refuses what is out of range
        if self.uncond_drop is not None and not 0 <= self.uncond_drop < 1:
            raise BudgetError(f"--uncond-drop is a fraction in [0, 1), got {self.uncond_drop:g}")
        given = {"keep": self.keep, "tokens": self.tokens, "drop": self.drop}
        words = [f"{name} {amount:g}" for name, amount in given.items() if amount is not None]
        words = words or ["natural budget"]
        if self.guidance != 1.0:
            words.append(f"guidance {self.guidance:g}")
        if self.uncond_drop is not None:
            words.append(f"uncond. drop {self.uncond_drop:g}")
        return ", ".join(words)


def draw_samples(options: SampleOptions) -> None:
    """Draw images, write them, and print what they cost.

    Args:
        options: what a person asked for.

    Raises:
        AdaptokError: an option does not fit the model, or a file cannot be written.
    """
    words = options.describe_budget()  # refuses a wrong budget before anything is loaded
    refuse_file_options(options)
    trained = open_trained(options.model)
    if isinstance(trained.model.config, DiTConfig):
        refuse_budget(options.drop, options.keep, options.tokens)
    device = choose_device(options.device)
    decoder = open_decoder(trained, device, options.vae)
    trained.model.to(device)
    labels = [read_label(text, trained) for text in options.labels]
    labels = labels or list(range(min(trained.model.config.num_classes, PER_ROW)))
    jobs = [(label, i) for label in labels for i in range(options.count)]
    jobs = [(label, options.seed + i) for i, (label, _) in enumerate(jobs)]
    scheduler = options.scheduler or FAST_SCHEDULER[trained.card.objective]
    steps = options.steps or DEFAULT_STEPS.get(scheduler, 50)
    make_folder(options.output)
    tell_of_others(options.output)
    settings = {
        "objective": objective_of(trained.card),
        "scheduler": scheduler,
        **sampling_options(options, decoder),
    }
    batches = [jobs[i : i + PER_ROW] for i in range(0, len(jobs), PER_ROW)]
    rows, drawn = [], []
    with show_progress("drawing", len(batches) * steps) as bar:
        measure_sampling(trained.model, labels[:1], steps=2, **settings)  # first calls are slow
        for place, batch in enumerate(batches):
            measured = measure_sampling(
                trained.model,
                [label for label, _ in batch],
                steps=steps,
                seed=[seed for _, seed in batch],
                progress=lambda done, _, place=place: bar.move_to(  # type: ignore[misc]
                    place * steps + done, len(batches) * steps
                ),
                **settings,
            )
            images = decoder.decode(measured.samples.latents)
            rows.append(make_row(batch, images, measured, trained.card))
            drawn.append(measured)
            save_images(images, batch, place * PER_ROW, trained.card, options.output)
    note = (
        f"{scheduler}, {steps} steps, {words}\n"
        "cost per image and sampling step; a guided step runs the model twice"
    )
    figure = draw_sample_grid(rows, title=f"Samples of {Path(options.model).name}", note=note)
    grid = save_figure(figure, options.output / "grid.png")
    report(drawn, words, grid, trained)


def refuse_file_options(options: SampleOptions) -> None:
    """Raise a `ConfigError` where single images were asked for, and what only one file can do."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "several processes draw into one file: give --output FILE.npz, or start one process"
        )
    for name in ("classes", "batch", "precision"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name} is for many samples in one file: give --output FILE.npz, or leave it out"
            )


def sampling_options(options: SampleOptions, decoder: Decoder) -> dict[str, Any]:
    """Return the options of `sample` that do not change from batch to batch."""
    guided = options.guidance != 1.0
    return {
        "guidance_scale": options.guidance,
        "guided_channels": decoder.guided if guided else None,
        "drop": options.drop,
        "keep": options.keep,
        "tokens": options.tokens,
        "uncond_drop": options.uncond_drop,
        "clip": decoder.clip,
    }


def choose_device(name: str | None) -> torch.device:
    """Return the device that was asked for, or the best one there is.

    Args:
        name: such as `"cpu"` or `"cuda:1"`.

    Returns:
        The device.

    Raises:
        DeviceError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"there is no device {name!r}: take cpu, cuda or cuda:1") from None
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"the device {name!r} cannot be used here ({reason}): take cpu") from None
    return device


def make_row(
    batch: list[tuple[int, int]],
    images: UInt8[Tensor, "b 3 h w"],
    measured: MeasuredSamples,
    card: ModelCard,
) -> SampleRow:
    """Put one batch into a row of the grid."""
    first, last = batch[0][1], batch[-1][1]
    return SampleRow(
        name=f"seed {first}" if first == last else f"seeds {first} to {last}",
        images=images,
        tokens=measured.cost.tokens,
        gflops=measured.cost.gflops,
        ms=measured.cost.ms,
        names=tuple(name_label(label, card) for label, _ in batch),
    )


def make_folder(folder: Path) -> None:
    """Make a folder for files, or say why that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make the folder {folder}: {error}. Choose another one with --output"
        ) from error


def tell_of_others(folder: Path) -> None:
    """Say that a folder holds images already, which `adaptok evaluate` would count as well."""
    count = sum(1 for path in folder.glob("*.png") if path.name != "grid.png")
    if count:
        err.print(
            f"note: {folder} holds {count} image{'s' if count > 1 else ''} already; those of the "
            "same number, class and seed are replaced, the others stay",
            markup=False,
            soft_wrap=True,
        )


def save_images(
    images: UInt8[Tensor, "b 3 h w"],
    batch: list[tuple[int, int]],
    first: int,
    card: ModelCard,
    folder: Path,
) -> None:
    """Write each image as a PNG file that is named after its number, class and seed."""
    pillow = import_optional("PIL.Image", extra="see")
    for place, (image, (label, seed)) in enumerate(zip(images, batch, strict=True)):
        words = re.sub(r"[^a-z0-9]+", "-", name_label(label, card).lower()).strip("-")
        path = folder / f"{first + place:04d}-{words}-seed{seed}.png"
        try:
            pillow.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path)
        except OSError as error:
            raise StorageError(f"cannot write the image {path}: {error}") from error


def report(drawn: list[MeasuredSamples], words: str, grid: Path, trained: TrainedModel) -> None:
    """Print what the images cost and where they are."""
    count = sum(len(measured.cost.tokens) for measured in drawn)
    tokens = sum(sum(measured.cost.tokens) for measured in drawn) / count
    gflops = sum(measured.cost.gflops * len(measured.cost.tokens) for measured in drawn) / count
    ms = sum(measured.cost.ms * len(measured.cost.tokens) for measured in drawn) / count
    seconds = sum(measured.seconds for measured in drawn)
    table = Table(title="Cost of one image")
    for column in ("budget", "tokens a step", "GFLOPs a step", "ms a step", "ms in all"):
        table.add_column(column, justify="left" if column == "budget" else "right")
    table.add_row(
        words, f"{tokens:,.0f}", f"{gflops:.3f}", f"{ms:.1f}", f"{1000 * seconds / count:,.0f}"
    )
    out.print(table)
    images, device = "image" if count == 1 else "images", next(trained.model.parameters()).device
    out.print(f"{count} {images} in {seconds:.1f} s on {device}")
    out.print(f"images: {grid.parent}\ngrid:   {grid}", soft_wrap=True)
