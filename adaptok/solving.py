"""The solver of stacks: in which order stages can work together, and why they cannot."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from adaptok.chunk_stage import ChunkStage
from adaptok.errors import StackError
from adaptok.hosts import Backbone
from adaptok.reduce_stage import ReduceStage
from adaptok.stages import AXES, Axis, Stage

# why an axis stands where it stands, in the words of `adaptok.explain`
AXIS_REASONS: dict[Axis, str] = {
    "time": "reuses steps, so that nothing inside it runs for a sample that is reused",
    "depth": "leaves early, so that tokens are chosen for the blocks that really run",
    "tokens": "gives fewer tokens to the blocks inside it",
    "width": "changes what a block computes on the tokens that it gets",
}
ONCE: dict[Axis, str] = {
    "time": "both reuse earlier steps",
    "depth": "both decide how many blocks run",
    "width": "both slice the weights of the same blocks",
}


@dataclass(frozen=True, slots=True, eq=False)
class StackEntry:
    """A stage of a stack.

    Args:
        name: what the user calls it.
        stage: the stage.
    """

    name: str
    stage: Stage


def rank_stage(stage: Stage) -> tuple[int, int]:
    """Return where a stage belongs: by its axis, and whether it needs every grid cell.

    Args:
        stage: the stage.

    Returns:
        A key to sort by; smaller is further outside.
    """
    effects = stage.effects
    return AXES.index(effects.axis), 0 if effects.needs_grid else 1


def sort_stack(entries: Sequence[StackEntry]) -> list[StackEntry]:
    """Return a stack outermost first: time, depth, tokens, width, and what needs the grid first.

    Args:
        entries: the stack; what does not matter stays as given.
    """
    return sorted(entries, key=lambda entry: rank_stage(entry.stage))


def find_conflicts(entries: Sequence[StackEntry], host: Backbone) -> list[str]:
    """Return why a stack cannot run in its order on a host.

    Args:
        entries: the stack, outermost first.
        host: the adapter of the model.

    Returns:
        One sentence for each reason; empty if it can run.
    """
    found = [reason for entry in entries if (reason := find_lack(entry, host))]
    for place, outer in enumerate(entries):
        for inner in entries[place + 1 :]:
            reason = find_clash(outer, inner)
            if reason:
                found.append(reason)
    return found


def find_lack(entry: StackEntry, host: Backbone) -> str | None:
    """Return what a stage needs and a host does not have."""
    if entry.stage.effects.needs_step and not host.has_step:
        named = ": name its argument, ListBackbone(timestep=...)" if host.name == "list" else ""
        return (
            f"{entry.name!r} needs the diffusion step, and the adapter {host.name!r} "
            f"({host.family}) hands none over (it is for diffusion transformers{named})"
        )
    if entry.stage.effects.needs_grid and not host.has_grid:
        return (
            f"{entry.name!r} needs every grid cell, and {host.family} has a chunker of its own, "
            "behind which the stages stand: its budget chooses cells (keep=, tokens=, drop=), and "
            'stages that need no grid, such as "tome", go on from there'
        )
    return None


def find_clash(outer: StackEntry, inner: StackEntry) -> str | None:
    """Return why a stage cannot run around another one."""
    first, second = outer.stage.effects, inner.stage.effects
    both = f"{outer.name!r} and {inner.name!r}"
    if first.axis == second.axis and first.axis in ONCE:
        return f"{both} {ONCE[first.axis]}"
    if second.needs_grid and first.changes_count:
        if first.needs_grid:
            return f"{both} both need every grid cell, and only the outer one gets it"
        return f"{inner.name!r} needs every grid cell, and {outer.name!r} takes some away before it"
    if isinstance(outer.stage, ChunkStage) and is_packed(outer.stage):
        return (
            f"{outer.name!r} with layout 'packed' runs its own form of the blocks, and "
            f"{inner.name!r} would have to run in front of them: give it layout 'bucketed'"
        )
    if first.needs_attention and not isinstance(inner.stage, ReduceStage):
        return (
            f"{outer.name!r} reads the attention inside the blocks, and {inner.name!r} stands "
            "before them"
        )
    return None


def is_packed(stage: ChunkStage) -> bool:
    """Say whether a chunker runs packed forms of the blocks."""
    return getattr(stage.chunker, "layout", None) == "packed"


def check_stack(entries: Sequence[StackEntry], host: Backbone) -> None:
    """Raise unless a stack can run in its order.

    Args:
        entries: the stack, outermost first.
        host: the adapter of the model.

    Raises:
        StackError: it cannot; the message says why, and names the nearest stack that can.
    """
    reasons = find_conflicts(entries, host)
    if not reasons:
        return
    names = ", ".join(repr(entry.name) for entry in entries)
    nearest = find_nearest(entries, host)
    advice = "No part of it can run here"
    if nearest:
        left = [entry.name for entry in entries if entry not in nearest]
        shown = ", ".join(repr(entry.name) for entry in nearest)
        advice = f"The nearest stack that can is [{shown}], without {' and '.join(map(repr, left))}"
    raise StackError(f"the stack [{names}] cannot run: {'; '.join(reasons)}. {advice}")


def find_nearest(entries: Sequence[StackEntry], host: Backbone) -> tuple[StackEntry, ...]:
    """Return the largest part of a stack that can run; of equal ones, that of the first stages."""
    for size in range(len(entries) - 1, 0, -1):
        for part in combinations(entries, size):
            if not find_conflicts(part, host):
                return part
    return ()
