"""The work of `adaptok tune`."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from rich.table import Table
from torch import Tensor, nn

from adaptok.cli.terminal import describe_seconds, err, out, show_progress
from adaptok.errors import CheckpointError, ConfigError, DataError, FullBudgetWarning
from adaptok.optional import import_optional
from adaptok.storage import load_tensors, refuse_foreign_files
from adaptok.train.config import open_stream
from adaptok.train.data import ImageSet, Split, load_emoji, open_image_set
from adaptok.train.tuning import BUDGETS, TuneStep, check_options, measure_distance, tune
from adaptok.wrapping import wrap

SHOWN = (0.3, 0.5, 0.7)
HELD_OUT_BATCHES = 4
EMOJI_SIZE = 64
SPLITS: tuple[Split, Split] = ("train", "test")
DEFAULT_COLOURS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a person asked for; see `adaptok tune --help`."""

    model: str
    output: Path
    images: str = "emoji"
    weights: Path | None = None
    random_weights: bool = False
    image_size: int | None = None
    router: str = "dc"
    keep: tuple[float, ...] = ()
    steps: int = 200
    batch_size: int = 8
    lr: float = 5e-4
    ratio_weight: float = 0.03
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some images of a set.

    Args:
        images: the set.
        places: which of them, `(n)`.
    """

    images: ImageSet
    places: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.places)

    def take(self, chosen: Int[Tensor, " k"]) -> UInt8[Tensor, "k 3 h w"]:
        """Return some of these images."""
        return self.images.take(self.places[chosen])

    def shuffled(self, seed: int) -> Int[Tensor, " n"]:
        """Return the numbers of these images in an order that follows from a seed."""
        return torch.from_numpy(open_stream("order", seed, 1).permutation(len(self)))


@dataclass(frozen=True, slots=True, eq=False)
class VisionHost:
    """A model and the images that it takes.

    Args:
        model: the model, in eval mode.
        size: side of an image in pixels.
        mean: of its colours, 0 to 1.
        deviation: of its colours.
    """

    model: nn.Module
    size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def prepare(self, pixels: Tensor) -> Float[Tensor, "b 3 h w"]:
        """Turn bytes into the model's input."""
        x = pixels.float() / 255
        if x.shape[-1] != self.size:
            x = nn.functional.interpolate(
                x, size=(self.size, self.size), mode="bicubic", antialias=True
            ).clamp(0, 1)
        mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.deviation))
        return (x - mean) / deviation


def run_tuning(asked: Tuning) -> None:
    """Tune as a person asked on the command line.

    Args:
        asked: the options.

    Raises:
        AdaptokError: an option is wrong, or the tuning fails.
    """
    from adaptok.adapters import CARD, WEIGHTS, save

    refuse_foreign_files(asked.output, {CARD, WEIGHTS})
    check_options(asked.steps, asked.lr, asked.keep or BUDGETS)
    host = open_host(asked)
    known, unseen = open_images(asked, host.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FullBudgetWarning)  # training is what it advises
        model = wrap(host.model, chunker="dc", router=asked.router)
    count = sum(p.numel() for p in model.parameters())
    out.print(
        f"{asked.model}, {count / 1e6:.1f} M weights, images of {host.size} px; learns from "
        f"{len(known):,} images of {asked.images}, {len(unseen):,} are held out",
        soft_wrap=True,
    )
    held_out = [
        host.prepare(unseen.take(chosen))
        for chosen in unseen.shuffled(asked.seed).split(asked.batch_size)[:HELD_OUT_BATCHES]
    ]
    before = [measure_distance(model, held_out, keep) for keep in SHOWN]
    with show_progress("tuning", asked.steps) as bar:

        def show(step: TuneStep) -> None:
            note = f"keep {step.keep:g}  distance {step.parts['output']:.3f}"
            bar.move_to(step.step, step.steps, note)
            if not err.is_terminal and step.step % max(1, step.steps // 10) == 0:
                out.print(f"step {step.step}/{step.steps}  {note}", soft_wrap=True)

        report = tune(
            model,
            draw_images(host, known, asked),
            steps=asked.steps,
            lr=asked.lr,
            budgets=asked.keep or BUDGETS,
            ratio_weight=asked.ratio_weight,
            seed=asked.seed,
            on_step=show,
        )
    after = [measure_distance(model, held_out, keep) for keep in SHOWN]
    save(model, asked.output)
    out.print(f"done: {asked.steps:,} steps in {describe_seconds(report.seconds)}", soft_wrap=True)
    out.print(draw_table(before, after))
    out.print(f"adapter: {asked.output}\nuse it:  adaptok.load(model, {str(asked.output)!r})")


def draw_images(
    host: VisionHost, images: "Part", asked: Tuning
) -> Callable[[int], Float[Tensor, "b 3 h w"]]:
    """Return a function that draws the images of a step, which follow from seed and step."""

    def draw(step: int) -> Tensor:
        stream = open_stream("order", asked.seed, step)
        chosen = stream.integers(len(images), size=asked.batch_size)
        return host.prepare(images.take(torch.from_numpy(chosen)))

    return draw


def draw_table(before: Sequence[float], after: Sequence[float]) -> Table:
    """Say how far wrapped outputs are from plain ones, on held-out images."""
    table = Table(title="distance to the unwrapped outputs on held-out images (0 equal, 1 mean)")
    for name in ("keep", "before", "after"):
        table.add_column(name, justify="right")
    for keep, first, last in zip(SHOWN, before, after, strict=True):
        table.add_row(f"{keep:g}", f"{first:.4f}", f"{last:.4f}")
    return table


def open_images(asked: Tuning, size: int) -> tuple["Part", "Part"]:
    """Return images to learn from and images that are held out."""
    if asked.images == "emoji":
        edge = min(size, EMOJI_SIZE)  # the emoji are small: brought to size by the host
        known, unseen = (load_emoji(size=edge, split=split) for split in SPLITS)
        return Part(known, torch.arange(len(known))), Part(unseen, torch.arange(len(unseen)))
    images = open_image_set(asked.images, size)
    if len(images) < 2 * asked.batch_size:
        raise DataError(
            f"{asked.images} holds {len(images)} images: at least {2 * asked.batch_size} are "
            "needed, twice a batch"
        )
    order = torch.as_tensor(open_stream("order", 0, 0).permutation(len(images)))
    held = max(asked.batch_size, len(images) // 10)
    return Part(images, order[held:]), Part(images, order[:held])


def open_host(asked: Tuning) -> VisionHost:
    """Make the model that a person named."""
    folder = Path(asked.model)
    if folder.is_dir():
        return open_transformers(folder, asked)
    return open_timm(asked)


def open_timm(asked: Tuning) -> VisionHost:
    """Make a timm model."""
    timm = import_optional("timm", extra="hosts")
    if not timm.is_model(asked.model):
        raise ConfigError(
            f"{asked.model!r} is neither a folder nor a timm model: `timm.list_models('vit*')` "
            "lists names"
        )
    options: dict[str, Any] = {"pretrained": asked.weights is None and not asked.random_weights}
    if asked.image_size is not None:
        options["img_size"] = asked.image_size
    try:
        model = timm.create_model(asked.model, **options)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise ConfigError(f"timm cannot make {asked.model}: {error}") from error
    if asked.weights is not None:
        try:
            model.load_state_dict(
                {name: value.float() for name, value in load_tensors(asked.weights).items()}
            )
        except RuntimeError as error:
            raise CheckpointError(
                f"{asked.weights} does not fit {asked.model}: {str(error).splitlines()[-1].strip()}"
            ) from error
    data = timm.data.resolve_model_data_config(model)
    size = asked.image_size or data["input_size"][-1]
    return VisionHost(model.eval(), size, tuple(data["mean"]), tuple(data["std"]))


def open_transformers(folder: Path, asked: Tuning) -> VisionHost:
    """Load a vision model that transformers saved."""
    transformers = import_optional("transformers", extra="hosts")
    try:
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {error}") from error
    model = getattr(model, "vision_model", model)
    known = getattr(model.config, "image_size", 224)
    mean, deviation = DEFAULT_COLOURS
    if (folder / "preprocessor_config.json").exists():
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        mean, deviation = tuple(processor.image_mean), tuple(processor.image_std)
    size = asked.image_size or (known if isinstance(known, int) else known[-1])
    return VisionHost(model.eval(), size, mean, deviation)
