"""Routers that need no weights: a start for any model, and the floor for learned ones."""

from adaptok.routers.chance import RandomRouter
from adaptok.routers.cosine import CosineRouter
from adaptok.routers.covering import CoveringRouter
from adaptok.routers.entropy import EntropyRouter
from adaptok.routers.norm import NormRouter
from adaptok.routers.predictability import PredictabilityRouter

__all__ = [
    "CosineRouter",
    "CoveringRouter",
    "EntropyRouter",
    "NormRouter",
    "PredictabilityRouter",
    "RandomRouter",
]
