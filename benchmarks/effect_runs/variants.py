"""Which models are trained, and for how many steps, so that all cost the same operations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adaptok import DCDiTConfig
from adaptok.dc.config import DiTConfig
from adaptok.measure import count_flops
from adaptok.train.config import TrainConfig, fit_model_to_data

DROPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
CLASSES = 8
WARM_UP_SHARE = 0.25  # of the steps without tail drop; 5,000 of 400,000 in the paper
NO_SMOOTHING = 1e-3  # cells: the Gaussian holds nothing but the token itself


@dataclass(frozen=True, slots=True)
class Size:
    """How large everything is.

    Args:
        hidden_size: width of the blocks.
        depth: number of blocks.
        num_heads: heads.
        image_size: pixels.
        space_to_depth: pixels per side of a cell.
        batch_size: images of a step.
        steps: steps of DC-DiT; the others get as many operations.
    """

    hidden_size: int = 160
    depth: int = 6
    num_heads: int = 5
    image_size: int = 32
    space_to_depth: int = 2
    batch_size: int = 32
    steps: int = 3000

    @property
    def side(self) -> int:
        """Cells per side."""
        return self.image_size // self.space_to_depth


@dataclass(frozen=True, slots=True)
class Variant:
    """One training run.

    Args:
        name: what the page calls it.
        kind: model.
        model: options of the model beside its size.
        multi_budget: whether later steps draw a tail-drop fraction.
        budgets: tail-drop fractions that it is sampled at.
    """

    name: str
    kind: Literal["DCDiT", "DiT"] = "DCDiT"
    model: tuple[tuple[str, Any], ...] = ()
    multi_budget: bool = True
    budgets: tuple[float, ...] = (0.0,)


FULL = "DC-DiT"
BASELINE = "DiT, patch 2"
VARIANTS = (
    Variant(FULL, budgets=(0.0, 0.2, 0.4, 0.6)),
    Variant("one budget in training", multi_budget=False, budgets=(0.0, 0.2, 0.4, 0.6)),
    Variant("cosine router (H-Net)", model=(("router", "hnet"),)),
    Variant("no smoothing", model=(("dechunk_sigma", NO_SMOOTHING),)),
    Variant(BASELINE, kind="DiT", model=(("patch_size", 2),)),
    Variant("DiT, patch 4", kind="DiT", model=(("patch_size", 4),)),
)


def make_model_config(variant: Variant, size: Size) -> DCDiTConfig | DiTConfig:
    """Return the options of a model for latents of the images."""
    cls = DCDiTConfig if variant.kind == "DCDiT" else DiTConfig
    return cls(
        hidden_size=size.hidden_size, depth=size.depth, num_heads=size.num_heads,
        latent_size=size.side, in_channels=3 * size.space_to_depth**2, num_classes=CLASSES,
        learn_sigma=False, **dict(variant.model),
    )  # fmt: skip


def count_step(config: DCDiTConfig | DiTConfig, size: Size, drop: float = 0.0) -> float:
    """Return the operations of one image, forward: at the target compression and a tail drop."""
    cells = size.side**2
    kept = cells if isinstance(config, DiTConfig) else round(cells / config.target * (1 - drop))
    patches = kept // config.patch_size**2 if isinstance(config, DiTConfig) else kept
    return float(count_flops(config, (size.side, size.side), [patches]))


def count_steps(variant: Variant, size: Size) -> int:
    """Return how many steps a variant gets, so that all runs cost the operations of DC-DiT's.

    The operations of a step are those at the target compression; what a router really keeps in
    training is in the log of its run.
    """
    full = make_model_config(VARIANTS[0], size)
    warm = round(WARM_UP_SHARE * size.steps)
    mean = sum(count_step(full, size, drop) for drop in DROPS) / len(DROPS)
    total = warm * count_step(full, size) + (size.steps - warm) * mean
    own = make_model_config(variant, size)
    if isinstance(own, DiTConfig) or not variant.multi_budget:
        return round(total / count_step(own, size))
    mean = sum(count_step(own, size, drop) for drop in DROPS) / len(DROPS)
    return round(warm + (total - warm * count_step(own, size)) / mean)


def make_run(variant: Variant, size: Size, seed: int) -> TrainConfig:
    """Return the training run of a variant."""
    steps = count_steps(variant, size)
    config = TrainConfig(
        model=make_model_config(variant, size), data="emoji", image_size=size.image_size,
        skin_variants=False, space_to_depth=size.space_to_depth, objective="flow",
        flow_times="logit-normal", steps=steps, batch_size=size.batch_size, learning_rate=6e-4,
        learning_rate_warmup=100, ema_decay=0.999, drops=DROPS if variant.multi_budget else (0.0,),
        budget_warmup=round(WARM_UP_SHARE * steps), precision="bf16", seed=seed,
        checkpoint_every=500, keep_checkpoints=1, log_every=50,
    )  # fmt: skip
    return fit_model_to_data(config, num_classes=CLASSES)


def name_folder(root: Path, variant: Variant, seed: int) -> Path:
    """Return where a run lies."""
    words = "".join(c if c.isalnum() else "-" for c in variant.name.lower())
    return root / f"{words.strip('-')}-seed{seed}"
