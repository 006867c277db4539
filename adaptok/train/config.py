"""Options of a training run, and whether model and data fit each other."""

import math
from collections.abc import Set
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from adaptok.config import Config
from adaptok.dc.config import MODEL_CONFIGS, DCDiTConfig, DiTConfig, read_model_config
from adaptok.diffusion import Objective, make_objective
from adaptok.diffusion.objective import TimeDistribution
from adaptok.errors import ConfigError
from adaptok.train.vae import LatentSource

ModelConfig = DCDiTConfig | DiTConfig
Precision = Literal["no", "bf16", "fp16"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]

PIXEL_CHANNELS = 3
KINDS = {config: kind for kind, config in MODEL_CONFIGS.items()}
# What may change between a run and its continuation: none of it decides what is learned.
CHANGEABLE = frozenset(
    (
        "steps",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "workers",
        "compile",
        "latents.name",
    )
)


def read_model(value: Any) -> Any:  # noqa: ANN401
    """Turn `{"kind": "DiT", ...}` into the options of that model; DCDiT where no kind is given."""
    if not isinstance(value, dict):
        return value
    kind = value.get("kind", "DCDiT")
    return read_model_config(kind, {name: part for name, part in value.items() if name != "kind"})


def write_model(config: ModelConfig) -> dict[str, Any]:
    """Turn the options of a model into plain values with its kind."""
    return {"kind": KINDS[type(config)], **config.model_dump(mode="json")}


class TrainConfig(Config):
    """Options of a training run.

    Args:
        model: the model: `DCDiTConfig`, or `DiTConfig` for the baseline. In JSON
            an object with `"kind": "DCDiT"` or `"DiT"`.
        host: folder of a fixed-patch DiT that was trained before; the model is the scaffold of
            DC-DiT around its blocks (`adaptok.upcycle`). None starts from nothing.
        distill_steps: steps at the start in which the new parts around those blocks learn to
            reproduce what they replace; None means none.
        data: `"emoji"`, a folder with one folder per class, an `.npz` file, or a folder of latents
            that `adaptok encode` wrote.
        image_size: side of an image in pixels.
        latents: the autoencoder whose latents the data hold; None for pixels. It is set by
            `adaptok.train.batches.fit_run_to_data`.
        categories: emoji categories to train on; None means all.
        skin_variants: train on all skin tones of the emoji, not on one of each.
        space_to_depth: pixels per side of a cell; 1 with latents, which are cells already.
        flip: mirror half of the images.
        objective: `"hybrid"` (noise and variance) or `"flow"` (velocity).
        flow_times: how the times of flow matching are drawn.
        flow_shift: above 1 moves the times of flow matching towards noise.
        steps: optimiser steps.
        batch_size: images per step, over all processes.
        accumulation: micro-batches per step in each process.
        learning_rate: of AdamW, after the warm-up.
        learning_rate_warmup: steps over which the learning rate rises from zero.
        weight_decay: of AdamW.
        gradient_clip: largest norm of the gradient; None does not clip.
        ema_decay: decay of the averaged weights. At step s the decay is no more than
            `(1 + s) / (10 + s)`, so that the average of a short run has left the start behind.
        class_dropout: share of images that lose their label, for guidance.
        drops: tail-drop fractions; one of them is drawn for each step.
        budget_warmup: steps without tail drop at the start.
        ratio_weight: weight of the ratio loss.
        ratio_group: samples per group of the ratio loss, never more than a micro-batch.
        precision: `"no"` is float32, `"bf16"` and `"fp16"` are autocast.
        compile: compile the parts of the model.
        seed: of the first weights and of everything that is drawn.
        log_every: steps between two lines of the log.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: how many of the newest checkpoints stay.
        workers: processes that draw batches ahead; 0 draws in the main process.

    Raises:
        ConfigError: an unknown option, a value out of range, or values that do not fit.

    Example:
        >>> config = TrainConfig(model=DiTConfig(scale="S"), steps=100)
        >>> TrainConfig.from_json(config.to_json()) == config
        True
    """

    model: Annotated[
        ModelConfig,
        BeforeValidator(read_model),
        PlainSerializer(write_model, return_type=dict[str, Any]),
    ] = Field(default_factory=lambda: DCDiTConfig(scale="S", in_channels=12, num_classes=8))
    host: str | None = None
    distill_steps: Positive | None = None
    data: str = "emoji"
    image_size: Positive = 64
    latents: LatentSource | None = None
    categories: tuple[str, ...] | None = None
    skin_variants: bool = True
    space_to_depth: Positive = 2
    flip: bool = False
    objective: Literal["hybrid", "flow"] = "hybrid"
    flow_times: TimeDistribution = "uniform"
    flow_shift: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    steps: Positive = 400_000
    batch_size: Positive = 256
    accumulation: Positive = 1
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    learning_rate_warmup: NotNegative = 0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    gradient_clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.0
    ema_decay: Fraction = 0.9999
    class_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    drops: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    budget_warmup: NotNegative = 5000
    ratio_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.03
    ratio_group: Positive = 16
    precision: Precision = "no"
    compile: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    log_every: Positive = 50
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2
    workers: NotNegative = 0
    version: Literal[1] = 1

    @model_validator(mode="after")
    def check_choices(self) -> "TrainConfig":
        """Refuse options that would be silently without effect."""
        if self.data != "emoji" and (self.categories is not None or not self.skin_variants):
            raise ValueError(
                f"categories and skin_variants choose emoji, but data is {self.data!r}: leave "
                "them out, or choose the images by folder"
            )
        if self.latents is not None and self.space_to_depth != 1:
            raise ValueError(
                "latents of an autoencoder are cells already, got "
                f"space_to_depth={self.space_to_depth}: set space_to_depth=1"
            )
        if self.objective != "flow" and (self.flow_times, self.flow_shift) != ("uniform", 1.0):
            raise ValueError('flow_times and flow_shift need objective="flow"')
        if isinstance(self.model, DCDiTConfig) and self.model.layout == "fixed":
            raise ValueError(
                'layout "fixed" needs one exact count, and training draws tail-drop fractions: '
                'train with layout "packed" or "bucketed"; the weights fit every layout'
            )
        if self.host is not None and not isinstance(self.model, DCDiTConfig):
            raise ValueError("host gives its blocks to a DCDiT, and the model is another one")
        if self.distill_steps is not None and self.host is None:
            raise ValueError("distill_steps needs host, the folder of the DiT to learn from")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of accumulation={self.accumulation}"
            )
        return self

    def make_objective(self) -> Objective:
        """Return what the model is trained to say."""
        if self.objective == "hybrid":
            return make_objective("hybrid")
        return make_objective("flow", time_distribution=self.flow_times, shift=self.flow_shift)


def find_latent_shape(config: TrainConfig) -> tuple[int, int, int]:
    """Return channels, height and width of what a model of this run sees.

    Args:
        config: the run.

    Returns:
        The shape of one latent.

    Raises:
        ConfigError: the images cannot be cut into cells.

    Example:
        >>> find_latent_shape(TrainConfig(image_size=64, space_to_depth=2))
        (12, 32, 32)
    """
    if config.latents is not None:
        name, factor = "the autoencoder's factor", config.latents.factor
        channels = config.latents.channels
    else:
        name, factor = "space_to_depth", config.space_to_depth
        channels = PIXEL_CHANNELS * factor**2
    if config.image_size % factor:
        raise ConfigError(
            f"image_size={config.image_size} is no multiple of {name}={factor}: change one of them"
        )
    side = config.image_size // factor
    return (channels, side, side)


def find_fitting_sizes(config: TrainConfig, num_classes: int) -> dict[str, Any]:
    """Return the model options that data and objective ask for, by name.

    Args:
        config: the run.
        num_classes: classes of the data.

    Returns:
        `in_channels`, `latent_size`, `num_classes` and `learn_sigma`.

    Raises:
        ConfigError: the images cannot be cut into cells.
    """
    channels, side, _ = find_latent_shape(config)
    return {
        "in_channels": channels,
        "latent_size": side,
        "num_classes": num_classes,
        "learn_sigma": config.make_objective().out_channels(1) == 2,
    }


def fit_model_to_data(config: TrainConfig, num_classes: int) -> TrainConfig:
    """Return the same run with the sizes of its model set to what data and objective need.

    Args:
        config: the run.
        num_classes: classes of the data.

    Returns:
        The run, whose model takes the latents and labels of its data.

    Raises:
        ConfigError: the images cannot be cut into cells, or into patches of the baseline.

    Example:
        >>> config = TrainConfig(image_size=32, objective="flow")
        >>> model = fit_model_to_data(config, num_classes=8).model
        >>> model.grid, model.in_channels, model.learn_sigma
        ((16, 16), 12, False)
    """
    model = config.model.model_dump() | find_fitting_sizes(config, num_classes)
    values = {name: getattr(config, name) for name in type(config).model_fields}
    return TrainConfig(**{**values, "model": type(config.model)(**model)})


def check_fit(config: TrainConfig, num_classes: int) -> None:
    """Raise a `ConfigError` unless the model takes the latents and labels of its data."""
    if num_classes == 1 and config.class_dropout > 0:
        raise ConfigError(
            f"{config.data} has one class, and class_dropout={config.class_dropout:g} would teach "
            "the model the same images once more without it: set class_dropout=0 (--class-dropout "
            "0) for an unconditional model, or give images with one folder per class"
        )
    needed = find_fitting_sizes(config, num_classes)
    model = config.model
    found = {
        "in_channels": model.in_channels,
        "latent_size": model.grid,
        "num_classes": model.num_classes,
        "learn_sigma": model.learn_sigma,
    }
    side = needed["latent_size"]
    wrong = [
        f"{name}={found[name]} where {value} is needed"
        for name, value in needed.items()
        if found[name] != ((side, side) if name == "latent_size" else value)
    ]
    cells = f"space_to_depth={config.space_to_depth}"
    if config.latents is not None:
        cells = f"an autoencoder of {config.latents.channels} channels"
    if wrong:
        raise ConfigError(
            f"the model has {', '.join(wrong)}: images of {config.image_size} px with {cells}, "
            f"{num_classes} classes and the objective "
            f"{config.objective!r} ask for it (`fit_model_to_data` sets it)"
        )


def check_same_run(
    config: TrainConfig, saved: dict[str, Any], other: Set[str] = frozenset()
) -> None:
    """Raise a `ConfigError` unless a run may go on from what was saved with other options.

    Args:
        config: the options that came now.
        saved: the options that the checkpoint was made with, as plain values.
        other: further options that may change.

    Raises:
        ConfigError: options differ that decide what is learned; all are named.
    """
    now = flatten(config.model_dump(mode="json"))
    before = flatten(saved)
    changed = [
        f"{name}={before.get(name)!r} was saved and {now.get(name)!r} came"
        for name in sorted(now.keys() | before.keys())
        if now.get(name) != before.get(name) and name not in CHANGEABLE | other
    ]
    if changed:
        raise ConfigError(
            f"this is another run than the saved one: {'; '.join(changed)}. Take the saved "
            "options, or another output folder"
        )


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Write nested options under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": part for inner, part in value.items()}
        else:
            flat[name] = value
    return flat


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, which rises over the warm-up and then stays."""
    if step >= config.learning_rate_warmup:
        return config.learning_rate
    return config.learning_rate * (step + 1) / config.learning_rate_warmup


def ema_decay_at(config: TrainConfig, step: int) -> float:
    """Return the decay of the averaged weights after a step."""
    return min(config.ema_decay, (1 + step) / (10 + step))


def drop_at(config: TrainConfig, step: int) -> float:
    """Return the tail-drop fraction of a step, the same in every process.

    Args:
        config: the run.
        step: the step, from 0.

    Returns:
        Zero in the warm-up and while the model is distilled, then one of `config.drops`, drawn
        from seed and step.
    """
    if step < max(config.budget_warmup, config.distill_steps or 0):
        return 0.0
    draw = open_stream("drop", config.seed, step).random()
    return config.drops[math.floor(draw * len(config.drops))]


# A stream is (what, seed, index): the domain lies in the upper word of the counter, the other two
# in the key, so that no two streams ever meet.
DOMAINS = {"order": 1, "sample": 2, "drop": 3, "posterior": 4}


def open_stream(domain: str, seed: int, index: int) -> np.random.Generator:
    """Open the random numbers of one sample, epoch or step, whoever asks and whenever.

    Args:
        domain: what the numbers are for, one of `DOMAINS`.
        seed: of the run.
        index: of the sample, epoch or step.

    Returns:
        A generator at the start of its stream.

    Paper: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    counter = np.array([0, 0, 0, DOMAINS[domain]], dtype=np.uint64)
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))
