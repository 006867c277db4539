"""What a wrapped model runs, in which order, and why: the answer of the solver in words."""

import json
from dataclasses import asdict, dataclass
from textwrap import fill

from torch import nn

from adaptok.reduce_stage import ReduceStage
from adaptok.solving import AXIS_REASONS
from adaptok.stages import Axis, BlockRange, Stage
from adaptok.tracing import require_adaptive

WIDTH = 98


@dataclass(frozen=True, slots=True)
class StageReason:
    """A stage of a wrapped model, and why it stands where it stands.

    Args:
        name: its name.
        axis: what it saves.
        why: why it stands there.
        settings: what it is set to, name by name.
        notes: what else there is to know.
    """

    name: str
    axis: Axis
    why: str
    settings: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a wrapped model runs; print it, or take `to_json()`.

    Args:
        model: class of the model.
        backbone: name of its adapter.
        blocks: number of its blocks.
        span: first block inside the stages, and the one behind the last.
        stages: the stages, the outermost first.
    """

    model: str
    backbone: str
    blocks: int
    span: tuple[int, int]
    stages: tuple[StageReason, ...]

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        first, last = self.span
        lines = [
            f"{self.model} ({self.backbone}), stages around the blocks {first} to {last - 1} of "
            f"{self.blocks}, the outermost first"
        ]
        for number, stage in enumerate(self.stages, 1):
            settings = ", ".join(f"{key}={value}" for key, value in stage.settings.items())
            lines.append(f"{'  ' * number}{stage.name} ({stage.axis}): {settings}")
            indent = "  " * (number + 1)
            lines += [
                fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
                for text in (stage.why, *stage.notes)
            ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def explain(model: nn.Module) -> Explanation:
    """Say which stages a wrapped model runs, in which order, and why.

    Args:
        model: a wrapped model.

    Returns:
        The explanation; print it.

    Raises:
        NotWrappedError: the model is not wrapped.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> explain(vit)
        VisionTransformer (timm-vit), stages around the blocks 0 to 2 of 3, the outermost first
          dc (tokens): router=HostRouter, layout='bucketed', budget=keep=0.5
            needs every grid cell, so that no stage around it may take tokens away; gives fewer ...
    """
    blocks = require_adaptive(model)
    first, last = blocks.span
    parts = list(blocks.get_submodule("adaptok").named_children())
    stages = [(name, stage) for name, stage in parts if isinstance(stage, Stage)]
    inner = blocks.list_range(first, last)
    inside: list[tuple[str, Stage]] = []
    reasons: list[StageReason] = []
    for name, stage in reversed(stages):
        neighbour = inside[-1] if inside else None
        reasons.insert(0, explain_stage(name, stage, inner, neighbour))
        if stage.aside:
            continue
        if not isinstance(stage, ReduceStage):
            inner = inner.around(stage)
        inside.append((name, stage))
    return Explanation(
        type(model).__name__, blocks.backbone.name, len(blocks.all_blocks), blocks.span,
        tuple(reasons),
    )  # fmt: skip


def explain_stage(
    name: str, stage: Stage, inner: BlockRange, neighbour: tuple[str, Stage] | None
) -> StageReason:
    """Say why a stage stands around some blocks."""
    effects = stage.effects
    why = AXIS_REASONS[effects.axis]
    if effects.needs_grid:
        why = f"needs every grid cell, so that no stage around it may take tokens away; {why}"
    notes = []
    if stage.aside:
        notes.append("has stepped aside: it is not run (adaptok.set_budget brings it back)")
    if isinstance(stage, ReduceStage):
        notes += explain_sites(stage, inner)
        if neighbour and isinstance(neighbour[1], ReduceStage):
            notes.append(f"shares one loop over the blocks with {neighbour[0]!r}")
    if effects.needs_step:
        notes.append("reads the diffusion step, which the host hands over")
    if effects.keeps_state:
        notes.append("keeps state from step to step, by request and guidance branch")
    shown = {key: value for key, value in stage.describe().items() if key not in HEADINGS}
    return StageReason(name, effects.axis, why, shown, tuple(notes))


HEADINGS = ("stage", "chunker")  # the name is there already


def explain_sites(stage: ReduceStage, inner: BlockRange) -> list[str]:
    """Say where a stage that reduces tokens acts."""
    sites = stage.find_sites(inner)
    places: dict[str, list[int]] = {}
    for site in sites:
        places.setdefault(site.where, []).append(site.block)
    words = {"between": "between attention and MLP of", "before": "in front of"}
    notes = [
        f"acts {words[where]} {'block' if len(found) == 1 else 'blocks'} {list_numbers(found)}"
        for where, found in places.items()
    ]
    if not inner.can_split and stage.reads_keys:
        notes.append(f"not between attention and MLP: {inner.whole}")
    return notes


def list_numbers(numbers: list[int]) -> str:
    """Return numbers in words, a run of them by its ends.

    Example:
        >>> list_numbers([0, 1, 2, 3]), list_numbers([3, 6, 9])
        ('0 to 3', '3, 6 and 9')
    """
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    head, last = ", ".join(map(str, numbers[:-1])), str(numbers[-1])
    return f"{head} and {last}" if head else last
