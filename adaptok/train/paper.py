"""The published training runs of DC-DiT and of its fixed-patch baseline, by name."""

from dataclasses import dataclass
from typing import get_args

from adaptok.dc.config import DCDiTConfig, DiTConfig, Scale
from adaptok.errors import ConfigError
from adaptok.measure.flops import count_flops
from adaptok.train.config import TrainConfig
from adaptok.train.vae import LatentSource

SCALES: tuple[Scale, ...] = get_args(Scale)
IMAGE_SIZES = (256, 512)
PREFIX = "paper/"
FACTOR, CHANNELS, CLASSES = 8, 4, 1000
PATCH, TARGET = 2, 4.0
BASELINE_STEPS, WARMUP = 400_000, 5_000
DROPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
SIGMAS = {256: 1.0, 512: 2.0}
# Of `match_compute`, written down so that a published run stays what it is when counting changes.
STEPS: dict[tuple[str, int], int] = {
    ("S", 256): 416_305,
    ("B", 256): 407_710,
    ("L", 256): 474_940,
    ("XL", 256): 486_140,
    ("S", 512): 463_999,
    ("B", 512): 435_109,
    ("L", 512): 495_075,
    ("XL", 512): 504_033,
}


@dataclass(frozen=True, slots=True)
class ComputeMatch:
    """How many steps of DC-DiT cost as much as the training of the baseline.

    Args:
        baseline: operations of the fixed-patch DiT for one image, forward.
        full: of DC-DiT without tail drop.
        mean: of DC-DiT, on average over the tail-drop fractions.
        steps: of DC-DiT.
    """

    baseline: float
    full: float
    mean: float
    steps: int


def list_paper_runs() -> tuple[str, ...]:
    """Return the names of the published runs: DC-DiT first, then the baselines.

    Example:
        >>> list_paper_runs()[0], list_paper_runs()[-1]
        ('paper/S-256', 'paper/DiT-XL-2-512')
    """
    ours = [f"{PREFIX}{scale}-{size}" for size in IMAGE_SIZES for scale in SCALES]
    theirs = [f"{PREFIX}DiT-{scale}-{PATCH}-{size}" for size in IMAGE_SIZES for scale in SCALES]
    return (*ours, *theirs)


def make_paper_run(name: str) -> TrainConfig:
    """Return a published run by its name.

    The steps of DC-DiT are those that cost as much as 400,000 steps of the baseline. Precision,
    compilation and processes are left to the machine; images are mirrored, as DiT does.

    Args:
        name: such as `"paper/XL-512"`, or `"paper/DiT-S-2-256"` for a baseline.

    Returns:
        The run; its `data` is to be set to a folder of latents.

    Raises:
        ConfigError: there is no such run.

    Example:
        >>> run = make_paper_run("paper/B-512")
        >>> run.model.grid, run.model.dechunk_sigma, run.batch_size
        ((64, 64), 2.0, 256)

    Paper: DC-DiT, arXiv 2603.06351.
    """
    if name not in list_paper_runs():
        raise ConfigError(
            f"there is no published run {name!r}: there are {', '.join(list_paper_runs())}"
        )
    kind, _, size_text = name.removeprefix(PREFIX).rpartition("-")
    size, is_baseline = int(size_text), kind.startswith("DiT-")
    scale = next(s for s in SCALES if s == kind.removeprefix("DiT-").removesuffix(f"-{PATCH}"))
    model: DCDiTConfig | DiTConfig = make_adaptive(scale, size)
    if is_baseline:
        model = make_baseline(scale, size)
    return TrainConfig(
        model=model,
        data=f"latents/imagenet-{size}",
        image_size=size,
        latents=LatentSource(channels=CHANNELS, factor=FACTOR),
        space_to_depth=1,
        flip=True,
        objective="hybrid",
        steps=BASELINE_STEPS if is_baseline else STEPS[scale, size],
        batch_size=256,
        learning_rate=1e-4,
        learning_rate_warmup=0,
        weight_decay=0.0,
        gradient_clip=1.0,
        ema_decay=0.9999,
        class_dropout=0.1,
        drops=DROPS,
        budget_warmup=WARMUP,
        ratio_weight=0.03,
        ratio_group=16,
    )


def make_adaptive(scale: Scale, image_size: int) -> DCDiTConfig:
    """Return the options of a published DC-DiT."""
    return DCDiTConfig(
        scale=scale,
        latent_size=image_size // FACTOR,
        in_channels=CHANNELS,
        num_classes=CLASSES,
        learn_sigma=True,
        target=TARGET,
        dechunk_sigma=SIGMAS[image_size],
    )


def make_baseline(scale: Scale, image_size: int) -> DiTConfig:
    """Return the options of the DiT that it is compared with."""
    return DiTConfig(
        scale=scale,
        latent_size=image_size // FACTOR,
        in_channels=CHANNELS,
        num_classes=CLASSES,
        learn_sigma=True,
        patch_size=PATCH,
    )


def match_compute(scale: Scale, image_size: int) -> ComputeMatch:
    """Say how many steps of DC-DiT cost as much as 400,000 steps of the baseline.

    `warm-up + (400,000 F_DiT - warm-up F_0) / mean of F_rho`, where F is counted for one image
    whose router keeps exactly one cell in `target` before the tail is dropped. A backward pass
    costs about twice its forward pass in both, so only forward passes are counted.

    Args:
        scale: of both models.
        image_size: in pixels.

    Returns:
        Steps, and the operations that they follow from.

    Example:
        >>> match = match_compute("S", 256)
        >>> match.mean < match.full
        True

    Paper: DC-DiT, arXiv 2603.06351.
    """
    adaptive, side = make_adaptive(scale, image_size), image_size // FACTOR
    grid, natural = (side, side), round(side**2 / TARGET)
    costs = [count_flops(adaptive, grid, [natural - int(drop * natural)]) for drop in DROPS]
    baseline = count_flops(make_baseline(scale, image_size), grid, [(side // PATCH) ** 2])
    full, mean = costs[0], sum(costs) / len(costs)
    steps = WARMUP + (BASELINE_STEPS * baseline - WARMUP * full) / mean
    return ComputeMatch(baseline, full, mean, round(steps))
