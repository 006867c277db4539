"""DyDiT: heads and channels by the timestep, tokens that skip the MLP.

>>> import adaptok
>>> from adaptok_width import DynamicWidth
>>> adaptok.describe("width").entries[0].load() is DynamicWidth
True
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptok_width.losses import (
        anneal_target,
        count_ratio,
        find_stage,
        full_width,
        training_losses,
        width_loss,
    )
    from adaptok_width.masks import StepMasks
    from adaptok_width.stage import DynamicWidth

__all__ = [
    "DynamicWidth",
    "StepMasks",
    "anneal_target",
    "count_ratio",
    "find_stage",
    "full_width",
    "training_losses",
    "width_loss",
]

# Everything comes when it is asked for, so that announcing the stage imports nothing heavy.
HOMES = {
    "DynamicWidth": "stage",
    "StepMasks": "masks",
    "anneal_target": "losses",
    "count_ratio": "losses",
    "find_stage": "losses",
    "full_width": "losses",
    "training_losses": "losses",
    "width_loss": "losses",
}


def __getattr__(name: str) -> object:
    if name not in HOMES:
        raise AttributeError(f"module 'adaptok_width' has no attribute {name!r}")
    return getattr(import_module(f"adaptok_width.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
