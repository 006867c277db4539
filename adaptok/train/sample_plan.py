"""What a run of many samples draws: the options that, with the model, decide each pixel."""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from adaptok.config import Config

MOST_SAMPLES = 1_000_000  # of one seed; those of the next one begin there


class SamplePlan(Config):
    """What is drawn: with the model, all that decides the pixels of each sample.

    Args:
        model: what a person calls the model; another name for the same weights is the same.
        weights: hash of weights, configuration and objective.
        count: number of samples.
        seed: of all of them.
        labels: the classes to draw.
        classes: `"balanced"`: one class after the other, so that their numbers differ by one at
            most; `"drawn"`: at random.
        scheduler: how noise becomes an image.
        steps: of the scheduler.
        guidance: guidance scale; 1 is none.
        drop: tail-drop fraction.
        keep: fraction of the cells to keep.
        tokens: number of cells to keep.
        uncond_drop: tail-drop fraction of the run without a class.
        precision: `"no"` is float32, `"bf16"` autocast.
        height: of an image in pixels.
        width: of an image in pixels.
        decoder: hash of the weights of the autoencoder; empty without one.
        version: of this layout.

    Example:
        >>> plan = SamplePlan(model="m", weights="", count=5, seed=3, labels=(7, 8),
        ...                   scheduler="dpm", steps=20, height=32, width=32)
        >>> [plan.label(number) for number in range(5)], plan.noise_seed(4)
        ([7, 8, 7, 8, 7], 3000004)
    """

    model: str
    weights: str
    count: Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
    seed: Annotated[int, Field(ge=0, lt=2**63 // MOST_SAMPLES)]
    labels: Annotated[tuple[int, ...], Field(min_length=1)]
    classes: Literal["balanced", "drawn"] = "balanced"
    scheduler: str
    steps: Annotated[int, Field(ge=1)]
    guidance: float = 1.0
    drop: float | None = None
    keep: float | None = None
    tokens: int | None = None
    uncond_drop: float | None = None
    precision: Literal["no", "bf16"] = "no"
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    decoder: str = ""
    version: Literal[1] = 1

    def label(self, number: int) -> int:
        """Return the class of a sample, from the seed and its number alone."""
        if self.classes == "balanced":
            return self.labels[number % len(self.labels)]
        (word,) = np.random.SeedSequence((self.seed, number)).generate_state(1, np.uint64)
        return self.labels[int(word) % len(self.labels)]

    def noise_seed(self, number: int) -> int:
        """Return the seed of the noise of a sample: `adaptok.diffusion.sample` draws it again."""
        return self.seed * MOST_SAMPLES + number

    def describe_differences(self, found: "SamplePlan") -> list[str]:
        """Say in which options another plan differs, with what it has and what this one has."""
        return [
            f"{name} {show_option(getattr(found, name))} there, "
            f"{show_option(getattr(self, name))} now"
            for name in type(self).model_fields
            if name != "model" and getattr(found, name) != getattr(self, name)
        ]


def show_option(value: object) -> str:
    """Return an option as a person can compare it: of a hash or a long list its start."""
    text = "none" if value in (None, "") else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
