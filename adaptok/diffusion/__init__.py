"""Diffusion: what a model is trained to say, how it is guided, and how images are drawn."""

from adaptok.diffusion.guidance import combine_halves, guide
from adaptok.diffusion.objective import (
    FlowObjective,
    HybridObjective,
    Objective,
    ObjectiveLoss,
    make_objective,
)
from adaptok.diffusion.sampling import Samples, SampleStep, denoise, sample
from adaptok.diffusion.solvers import SCHEDULERS

__all__ = [
    "SCHEDULERS",
    "FlowObjective",
    "HybridObjective",
    "Objective",
    "ObjectiveLoss",
    "SampleStep",
    "Samples",
    "combine_halves",
    "denoise",
    "guide",
    "make_objective",
    "sample",
]
