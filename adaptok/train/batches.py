"""Batches that depend on the seed and the step alone, not on processes or restarts."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adaptok.errors import ConfigError
from adaptok.train.config import TrainConfig, find_latent_shape, fit_model_to_data, open_stream
from adaptok.train.data import ImageFiles, ImageSet, load_emoji, open_image_set
from adaptok.train.latents import (
    CacheIndex,
    LatentSet,
    is_latent_cache,
    open_latents,
    read_cache_index,
)
from adaptok.train.pixels import space_to_depth, to_latent

MOST_BYTES_IN_MEMORY = 1 << 30
TrainingSet = ImageSet | LatentSet


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of each global batch belongs to a process.

    Args:
        rank: number of the process.
        ranks: number of processes.
    """

    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one process trains on in one step.

    Args:
        images: pixels, `(b 3 h w)`, or latents of an autoencoder, `(b c h2 w2)`.
        labels: classes; the null class where the label was dropped, `(b)`.
        noise: standard normal noise in the shape of the latents, `(b c h2 w2)`.
        u: uniform number in [0, 1) for the time of each sample, `(b)`.
    """

    images: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b c h2 w2"]
    labels: Int[Tensor, " b"]
    noise: Float[Tensor, "b c h2 w2"]
    u: Float[Tensor, " b"]

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from where a GPU copies while it computes."""
        return Batch(*(part.pin_memory() for part in self.tensors))

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; the host does not wait for the copy."""
        return Batch(*(part.to(device, non_blocking=True) for part in self.tensors))

    def split(self, parts: int) -> Iterator["Batch"]:
        """Cut the batch into micro-batches of equal size."""
        for pieces in zip(*(part.chunk(parts) for part in self.tensors), strict=True):
            yield Batch(*pieces)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All parts in the order of the fields."""
        return (self.images, self.labels, self.noise, self.u)


def open_training_set(config: TrainConfig) -> TrainingSet:
    """Open the images that a run asks for; a set that fits into memory is decoded now.

    Args:
        config: the run.

    Returns:
        The training images, or their latents.

    Raises:
        DataError: the data cannot be read.
        ConfigError: the images are not square or of another size than the run asks for, or latents
            are of another autoencoder.
    """
    if holds_latents(config):
        index = read_cache_index(config.data)
        check_cache(config, index)
        assert config.latents is not None
        if config.latents.cache_hash not in ("", index.source.cache_hash):
            raise ConfigError(
                f"the latents in {config.data} are of other images than this run was made for: "
                "let `adaptok.train.batches.fit_run_to_data` make it anew"
            )
        return open_latents(config.data)
    if config.latents is not None:
        raise ConfigError(
            f"this run learns from latents, and {config.data!r} is no folder of latents: make one "
            f"with `adaptok encode IMAGES --vae VAE --size {config.image_size} --output FOLDER`, "
            "and give it as data (--data FOLDER)"
        )
    if config.data == "emoji":
        images = load_emoji(
            size=config.image_size,
            categories=config.categories,
            skin_variants=config.skin_variants,
        )
    else:
        images = open_image_set(config.data, config.image_size)
    if images.image_size != (config.image_size, config.image_size):
        raise ConfigError(
            f"the images of {config.data} are {images.image_size} px and image_size is "
            f"{config.image_size}: set it to the size of the images"
        )
    needed = len(images) * 3 * config.image_size**2
    if isinstance(images.images, ImageFiles) and needed <= MOST_BYTES_IN_MEMORY:
        return replace(images, images=images.take(range(len(images))))
    return images


def holds_latents(config: TrainConfig) -> bool:
    """Say whether the data of a run are latents and no pixels."""
    return config.data != "emoji" and is_latent_cache(config.data)


def check_cache(config: TrainConfig, index: CacheIndex) -> None:
    """Raise a `ConfigError` unless latents are what a run asks for."""
    if config.latents is None:
        raise ConfigError(
            f"{config.data} holds latents, and the run does not say of which autoencoder: let "
            "`adaptok.train.batches.fit_run_to_data` set it"
        )
    wrong = config.latents.describe_differences(index.source)
    if wrong:
        raise ConfigError(
            f"the latents in {config.data} are of another autoencoder than the run asks for "
            f"({', '.join(wrong)}): encode the images with that one, or start another run"
        )
    if index.image_size != config.image_size:
        raise ConfigError(
            f"the latents in {config.data} are of images of {index.image_size} px and image_size "
            f"is {config.image_size}: encode with --size {config.image_size}, or set image_size "
            f"to {index.image_size}"
        )
    if config.flip and not index.mirrored:
        raise ConfigError(
            f"flip asks for mirrored images, and {config.data} holds none: encode with --mirror, "
            "or set flip to false (--no-flip)"
        )


def fit_run_to_data(config: TrainConfig) -> TrainConfig:
    """Return the same run with everything set that its data decide.

    Sizes of images and cells follow from latents where the run does not name them; the model
    takes the channels, the grid and the classes of the data.

    Args:
        config: the run.

    Returns:
        The run, for `adaptok.train.trainer.train`.

    Raises:
        DataError: the data cannot be read.
        ConfigError: what the run names does not fit its data.
    """
    if holds_latents(config):
        index = read_cache_index(config.data)
        found = {"image_size": index.image_size, "space_to_depth": 1}
        values = {name: getattr(config, name) for name in type(config).model_fields}
        values |= {k: v for k, v in found.items() if k not in config.model_fields_set}
        if config.latents is None:
            values["latents"] = index.source
        config = TrainConfig(**values)
        check_cache(config, index)
        config = config.model_copy(update={"latents": index.source})
    return fit_model_to_data(config, len(open_training_set(config).class_names))


def check_share(config: TrainConfig, ranks: int) -> None:
    """Raise a `ConfigError` unless a batch comes out even over processes and micro-batches."""
    if config.batch_size % (ranks * config.accumulation):
        raise ConfigError(
            f"batch_size={config.batch_size} is no multiple of {ranks} processes times "
            f"accumulation={config.accumulation}: make it one of {ranks * config.accumulation}"
        )
    if ranks > 1 and config.distill_steps is not None:
        raise ConfigError(
            f"distillation runs parts of the model alone, and {ranks} processes exchange gradients "
            "of the whole: distil in one process"
        )


@lru_cache(maxsize=2)  # a batch reaches into two epochs at most, unless the set is tiny
def order_epoch(seed: int, epoch: int, size: int) -> Int[np.ndarray, " n"]:
    """Return the order in which the images of one epoch come.

    Args:
        seed: of the run.
        epoch: number of the epoch.
        size: number of images.

    Returns:
        A permutation of the images.
    """
    return open_stream("order", seed, epoch).permutation(size)


def choose_images(seed: int, samples: range, size: int) -> list[int]:
    """Say which image each sample of a run is.

    Args:
        seed: of the run.
        samples: numbers of the samples, counted over the whole run.
        size: number of images.

    Returns:
        The index of each image; each epoch has each image once.

    Example:
        >>> sorted(choose_images(0, range(4, 8), size=4))
        [0, 1, 2, 3]
    """
    return [int(order_epoch(seed, i // size, size)[i % size]) for i in samples]


def draw_batch(config: TrainConfig, images: TrainingSet, step: int, share: Share) -> Batch:
    """Draw what one process trains on in one step.

    Time, label dropout, mirroring and noise of a sample come from the seed and the number of the
    sample in the run, so that the number of processes, micro-batches and restarts changes none.

    Args:
        config: the run.
        images: its images.
        step: the step, from 0.
        share: which part of the global batch.

    Returns:
        The batch, on the CPU.
    """
    size = config.batch_size // share.ranks
    first = step * config.batch_size + share.rank * size
    samples = range(first, first + size)
    chosen = torch.tensor(choose_images(config.seed, samples, len(images)))
    labels = images.labels[chosen]
    noise = np.empty((size, *find_latent_shape(config)), dtype=np.float32)
    u = np.empty((size, 3), dtype=np.float32)
    for row, sample in enumerate(samples):
        stream = open_stream("sample", config.seed, sample)
        stream.random(dtype=np.float32, out=u[row])
        stream.standard_normal(dtype=np.float32, out=noise[row])
    numbers = torch.from_numpy(u)
    unlabelled = numbers[:, 1] < config.class_dropout
    mirrored = (numbers[:, 2] < 0.5) & config.flip
    return Batch(
        images=take_inputs(config, images, chosen, mirrored, samples),
        labels=labels.masked_fill(unlabelled, config.model.num_classes),
        noise=torch.from_numpy(noise),
        u=numbers[:, 0].clone(),
    )


def take_inputs(
    config: TrainConfig,
    images: TrainingSet,
    chosen: Int[Tensor, " b"],
    mirrored: Bool[Tensor, " b"],
    samples: range,
) -> UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b c h2 w2"]:
    """Bring images into memory as `make_latents` takes them.

    Of an autoencoder's latents each sample of the run gets a draw of its own.

    Args:
        config: the run.
        images: its images.
        chosen: which of them.
        mirrored: which of those are mirrored.
        samples: numbers of the samples in the run.

    Returns:
        Pixels, or latents.
    """
    if isinstance(images, ImageSet):
        pixels = images.take(chosen)
        return torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    posterior = images.take(chosen, mirrored)
    noise = np.empty(posterior.mean.shape, dtype=np.float32)
    for row, sample in enumerate(samples):
        stream = open_stream("posterior", config.seed, sample)
        stream.standard_normal(dtype=np.float32, out=noise[row])
    return posterior.draw(torch.from_numpy(noise), images.index.source)


class StepBatches(Dataset[Batch]):
    """The batches of a run by step, so that any process can draw any of them.

    Args:
        config: the run.
        images: its images.
        share: which part of each global batch.
    """

    def __init__(self, config: TrainConfig, images: TrainingSet, share: Share) -> None:
        self.config = config
        self.images = images
        self.share = share

    def __getitem__(self, step: int) -> Batch:
        return draw_batch(self.config, self.images, step, self.share)

    def __len__(self) -> int:
        return self.config.steps


def load_batches(batches: StepBatches, steps: range, pin_memory: bool) -> "DataLoader[Batch]":
    """Draw the batches of some steps one after the other, ahead if there are workers.

    Args:
        batches: the batches of the run.
        steps: which of them.
        pin_memory: bring them into page-locked memory, for a GPU.

    Returns:
        An iterable of batches.
    """
    workers = batches.config.workers
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker if workers else None,
    )


def prepare_worker(worker: int) -> None:
    """Let workers outlive a Ctrl-C, so that the main process can finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def make_latents(
    images: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b c h2 w2"], factor: int
) -> Float[Tensor, "b c h2 w2"]:
    """Turn pixels into latents: numbers in [-1, 1], with squares of pixels in the channels.

    Args:
        images: pixels; latents of an autoencoder are returned as they are.
        factor: pixels per side of a cell.

    Returns:
        What a model learns from.
    """
    if images.is_floating_point():
        return images
    return space_to_depth(to_latent(images), factor)
