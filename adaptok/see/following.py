"""What tokens stand for behind each stage and each site of a traced step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptok.chunking import ChunkPlan, Provenance
from adaptok.errors import ShapeError
from adaptok.plan_notes import PlanNote, trace_cells
from adaptok.reductions import ReducePlan
from adaptok.trace_step import TraceStep
from adaptok.tracing import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """For each cell, the token that stands for it at one place of a stack.

    Args:
        name: the place in words.
        token: index of the token, -1 for none, `(b n)`.
        counts: how many tokens are there, per sample.
    """

    name: str
    token: Int[Tensor, "b n"]
    counts: tuple[int, ...]


def choose_step(trace: Trace | TraceStep, step: int = -1) -> TraceStep:
    """Return one step of a trace.

    Args:
        trace: what `adaptok.trace` gave, or one of its steps.
        step: which step.

    Raises:
        ShapeError: there is no such step.
    """
    if isinstance(trace, TraceStep):
        return trace
    if not -len(trace.steps) <= step < len(trace.steps):
        raise ShapeError(
            f"there is no step {step} in a trace of {len(trace.steps)}: call the model inside "
            "`with adaptok.trace(model) as seen:`"
        )
    return trace.steps[step]


def order_of(trace: Trace | TraceStep, step: TraceStep) -> tuple[str, ...]:
    """Return the names of the stages, the outermost first; of a bare step as they ran."""
    if isinstance(trace, Trace) and trace.order:
        return trace.order
    return tuple(dict.fromkeys(name.split("+")[0] for name in step.stages))


def follow_stages(trace: Trace | TraceStep, step: int = -1) -> list[Standing]:
    """Return what tokens stand for behind each stage, the outermost first.

    A stage that decides anew in every piece of the blocks counts with its last decision.

    Args:
        trace: what `adaptok.trace` gave, or one of its steps.
        step: which step.

    Returns:
        One for each stage that told of tokens; the last one is what stood in the end.

    Raises:
        ShapeError: there is no such step.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=["dc", "tome"], budget=0.5)
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(torch.randn(2, 3, 32, 48))
        >>> [(place.name, place.counts) for place in follow_stages(seen)]
        [('dc', (12, 12)), ('tome', (6, 6))]
    """
    chosen = choose_step(trace, step)
    order = order_of(trace, chosen)
    rank = {name: place for place, name in enumerate(order)}
    parts = zip(chosen.stages, chosen.routings, chosen.plans, strict=True)
    notes = [PlanNote(stage, routing, plan) for stage, routing, plan in parts]
    names = sorted(
        dict.fromkeys(chosen.stages), key=lambda name: rank.get(name.split("+")[0], len(rank))
    )
    b, n = chosen.provenance.token.shape
    found = []
    for place, name in enumerate(names):
        outer = [note for note in notes if note.stage in names[: place + 1]]
        cells = trace_cells(outer, order, b, n, chosen.provenance.token.device)
        found.append(Standing(name, cells.token.cpu(), count_tokens(cells.token)))
    return found


def follow_sites(trace: Trace | TraceStep, step: int = -1) -> list[Standing]:
    """Return what tokens stand for behind each site of the stages that merge or prune.

    Args:
        trace: what `adaptok.trace` gave, or one of its steps.
        step: which step.

    Returns:
        One for each site, in the order in which they were passed; empty without such a stage.

    Raises:
        ShapeError: there is no such step.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=[{"name": "tome", "r": 4}])
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(torch.randn(1, 3, 32, 48))
        >>> [(place.name, place.counts) for place in follow_sites(seen)]
        [('tome, block 0', (20,)), ('tome, block 1', (16,)), ('tome, block 2', (12,))]
    """
    chosen = choose_step(trace, step)
    places = follow_stages(trace, step)
    b, n = chosen.provenance.token.shape
    found = []
    for stage, plan in zip(chosen.stages, chosen.plans, strict=True):
        if not isinstance(plan, ReducePlan):
            continue
        number = next(at for at, place in enumerate(places) if place.name == stage)
        before = Provenance(places[number - 1].token) if number else Provenance.identity(b, n)
        for event in plan.events:
            token = before.then(Provenance(event.owner.cpu())).token
            name = f"{event.stage}, block {event.site.block}"
            found.append(Standing(name, token, tuple(event.counts)))
    return found


def find_own_cells(trace: Trace | TraceStep, step: int = -1) -> Bool[Tensor, "b n"]:
    """Return the cells whose place their token has, behind all stages.

    Args:
        trace: what `adaptok.trace` gave, or one of its steps.
        step: which step.

    Returns:
        One cell for each token.

    Raises:
        ShapeError: there is no such step.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=["dc", "tome"], budget=0.5)
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(torch.randn(2, 3, 32, 48))
        >>> find_own_cells(seen).sum(1)
        tensor([6, 6])
    """
    chosen = choose_step(trace, step)
    order, b = order_of(trace, chosen), chosen.provenance.token.shape[0]
    last = dict(zip(chosen.stages, chosen.plans, strict=True))  # the last decision of each counts
    rank = {name: place for place, name in enumerate(order)}
    token = Provenance.identity(b, chosen.provenance.token.shape[1]).token
    own = torch.ones_like(token, dtype=torch.bool)
    for name in sorted(last, key=lambda name: rank.get(name.split("+")[0], len(rank))):
        mask, here = last[name].keep_mask.cpu(), last[name].provenance.token.cpu()
        unseen = ~mask.any(1, keepdim=True)
        index = token.clamp(min=0, max=mask.shape[1] - 1)
        own &= (token >= 0) & (mask.gather(1, index) | unseen)
        token = torch.where((token < 0) | unseen, token, here.gather(1, index))
    return own


def count_tokens(token: Int[Tensor, "b n"]) -> tuple[int, ...]:
    """Return how many tokens stand for cells, per sample.

    Example:
        >>> count_tokens(torch.tensor([[0, 0, 2], [-1, 1, 1]]))
        (2, 1)
    """
    return tuple(len(row[row >= 0].unique()) for row in token)


def find_probabilities(step: TraceStep) -> Float[Tensor, "b n"] | None:
    """Return the keep probability of each cell of the grid, where a router said one.

    Args:
        step: a step of a trace.

    Returns:
        Those of the first stage that judged all cells; None where there is no such stage, or
        where its answers are only yes and no.
    """
    n = step.provenance.token.shape[1]
    for routing, plan in zip(step.routings, step.plans, strict=True):
        prob = routing.keep_prob.detach().float().cpu()
        if prob.shape[1] == n and not isinstance(plan, ReducePlan) and is_graded(prob):
            return prob
    return None


def is_graded(prob: Float[Tensor, "b n"]) -> bool:
    """Say whether probabilities are more than yes and no."""
    return bool(((prob > 0) & (prob < 1)).any()) and float(prob.max() - prob.min()) > 0


def represents_itself(plan: ChunkPlan) -> bool:
    """Say whether a plan keeps cells of the grid, and is no merging of tokens."""
    return not isinstance(plan, ReducePlan) and bool(plan.keep_mask.any())


def show_all(places: Sequence[Standing], most: int) -> list[Standing]:
    """Return at most so many places, evenly spread, the last one among them."""
    if len(places) <= most:
        return list(places)
    return [places[len(places) * (part + 1) // most - 1] for part in range(most)]


def split_frames(token: Tensor, grid: tuple[int, ...], frame: int) -> Tensor:
    """Return the cells of one frame of a sample, `(h w)`; of an image all of them.

    Args:
        token: a value for each cell of one sample, `(n)`.
        grid: lengths of the grid axes.
        frame: which frame of a video.

    Raises:
        ShapeError: there is no such frame.
    """
    frames = token.view(-1, *grid[-2:])
    if not -len(frames) <= frame < len(frames):
        raise ShapeError(f"there is no frame {frame} in a video of {len(frames)}")
    return torch.as_tensor(frames[frame])
