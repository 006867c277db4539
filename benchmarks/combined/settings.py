"""Which combinations with the reference model are compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCALE = (1000.0, 0.0)  # the model's own times of pure noise and of a clean image
SCHEDULE = ((0.0, 1.0), (0.5, 6 / 7), (0.8, 5 / 7))  # share of the noise from which on, of blocks
STAGES: Mapping[str, Mapping[str, Any]] = {
    "teacache": {"name": "teacache"},
    "taylorseer": {"name": "taylorseer", "interval": 2},
    "tome": {"name": "tome", "restore": "update"},
    "exit": {"name": "schedule", "schedule": SCHEDULE, "scale": SCALE, "adapt": True},
    "width": {"name": "width", "target": 0.7},
}
COMPUTED = {"a": 0.65, "b": 0.45}  # share of the steps that a threshold of TeaCache leaves


@dataclass(frozen=True, slots=True)
class Combination:
    """DC-DiT with what stands around its blocks.

    Args:
        stages: names of `STAGES`, with options beside what is fitted.
        drop: tail-drop fraction of the reference.
    """

    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    drop: float = 0.0

    @property
    def label(self) -> str:
        """What the plot calls it."""
        words = ["DC-DiT"] if not self.drop else [f"DC-DiT drop {self.drop:g}"]
        for name, options in self.stages.items():
            words.append(" ".join([name, *(f"{k}={v}" for k, v in options.items())]))
        return " + ".join(words)


TEACACHE = {"teacache": {"computed": "a"}}
TOME = {"tome": {"r": 8}}
COMBINATIONS = (
    Combination(),
    *(Combination(drop=drop) for drop in (0.2, 0.4, 0.6)),
    Combination(TEACACHE),
    Combination({"teacache": {"computed": "b"}}),
    Combination({"taylorseer": {}}),
    Combination(TOME),
    Combination({"tome": {"r": 16}}),
    Combination({"exit": {}}),
    Combination({"width": {}}),
    Combination(TEACACHE, drop=0.4),
    Combination({**TEACACHE, **TOME}),
    Combination({**TEACACHE, "exit": {}}),
    Combination({**TEACACHE, "width": {}}),
    Combination({**TOME, "width": {}}),
)
