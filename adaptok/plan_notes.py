"""What stages told of one pass, put together: parts of a batch, and one provenance through all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from adaptok.chunking import ChunkPlan, Provenance
from adaptok.routing import Routing
from adaptok.standing import Standing


@dataclass(frozen=True, slots=True, eq=False)
class PlanNote:
    """What a stage told.

    Args:
        stage: its name.
        routing: what its router said.
        plan: what it decided.
        samples: which samples of the batch that was about; None means all.
        of_host: whether the host itself chose, in front of all stages.
    """

    stage: str
    routing: Routing
    plan: ChunkPlan
    samples: tuple[int, ...] | None = None
    of_host: bool = False


def note_standing(host: str, standing: Standing, samples: tuple[int, ...] | None) -> PlanNote:
    """Return the choice of a host that shortens its own sequence as if a stage had made it.

    Args:
        host: name of its backbone.
        standing: the cells.
        samples: which samples of the batch that is; None means all.

    Returns:
        A note about the image's grid; where the host's router is not known, a cell is kept for
        certain or not at all.
    """
    mask, said = standing.keep_mask, standing.routing
    routing = Routing(mask.float(), mask) if said is None else said.with_keep_mask(mask)
    lengths = (standing.cells.shape[1],) * mask.shape[0]
    provenance = Provenance(standing.find_owners())
    cells = standing.cells
    plan = ChunkPlan(standing.grid, "fixed", routing, mask, cells, provenance, lengths=lengths)
    return PlanNote(host, routing, plan, samples, of_host=True)


def join_notes(notes: Sequence[PlanNote], b: int) -> list[PlanNote]:
    """Put notes about parts of a batch together.

    Args:
        notes: what was told, in order.
        b: samples of the batch.

    Returns:
        Notes about whole batches, in the order in which each began; samples that a stage never
        saw have no token in it.
    """
    order: list[PlanNote | list[PlanNote]] = []
    open_parts: dict[str, list[PlanNote]] = {}
    for note in notes:
        if note.samples is None:
            open_parts.pop(note.stage, None)
            order.append(note)
            continue
        parts = open_parts.get(note.stage)
        seen = {sample for part in parts or () for sample in part.samples or ()}
        if parts is None or seen & set(note.samples):
            parts = open_parts[note.stage] = []
            order.append(parts)
        parts.append(note)
    return [join_parts(item, b) if isinstance(item, list) else item for item in order]


def join_parts(parts: Sequence[PlanNote], b: int) -> PlanNote:
    """Put the notes about different samples into one."""
    n = max(part.plan.keep_mask.shape[1] for part in parts)
    keep_mask = gather_rows(parts, [part.plan.keep_mask for part in parts], b, n, 0)
    prob = gather_rows(parts, [part.routing.keep_prob for part in parts], b, n, 0)
    natural = [part.routing.natural_mask for part in parts]
    masks = [mask for mask in natural if mask is not None]
    routing = Routing(
        prob,
        keep_mask,
        gather_rows(parts, masks, b, n, 0) if len(masks) == len(parts) else None,
        threshold=None,
    )
    token = gather_rows(parts, [part.plan.provenance.token for part in parts], b, n, -1)
    plans = [part.plan for part in parts]
    known = [fill_weight(plan) for plan in plans]
    weight = gather_rows(parts, known, b, n, 0) if has_weight(*plans) else None
    places = torch.arange(n, device=keep_mask.device).expand(b, n)
    longest = max(1, int(keep_mask.sum(1).max()))
    first = torch.where(keep_mask, places, n).sort(1).values[:, :longest]
    plan = ChunkPlan(
        parts[0].plan.grid,
        "fixed",
        routing,
        keep_mask,
        torch.where(first == n, -1, first),
        Provenance(token, weight),
        lengths=tuple(keep_mask.sum(1).tolist()),
    )
    return PlanNote(parts[0].stage, routing, plan)


def has_weight(*plans: ChunkPlan) -> bool:
    """Say whether cells have other weights than 1 in any of some plans."""
    return any(plan.provenance.weight is not None for plan in plans)


def fill_weight(plan: ChunkPlan) -> Float[Tensor, "b n"]:
    """Return the weights of the cells, ones where the plan has none."""
    weight = plan.provenance.weight
    return torch.ones_like(plan.provenance.token, dtype=torch.float32) if weight is None else weight


def gather_rows(
    parts: Sequence[PlanNote], values: Sequence[Tensor], b: int, n: int, fill: float
) -> Tensor:
    """Put rows of parts where their samples are in the batch, padded to one length."""
    whole = values[0].new_full((b, n), fill)
    for part, value in zip(parts, values, strict=True):
        rows = torch.tensor(part.samples, device=value.device)
        padded = F.pad(value, (0, n - value.shape[1]), value=fill)
        whole = whole.index_copy(0, rows, padded.to(whole.dtype))
    return whole


def trace_cells(
    notes: Sequence[PlanNote], order: Sequence[str], b: int, n: int, device: torch.device
) -> Provenance:
    """Return for each cell the token that stood for it after all stages.

    A stage that told of a sample several times, because an outer one ran its blocks in pieces,
    counts with the last time.

    Args:
        notes: about whole batches, in order.
        order: names of the stages, the outermost first.
        b: samples.
        n: cells of a sample.
        device: where the map lies.

    Returns:
        The map.
    """
    last: dict[str, PlanNote] = {}
    for note in notes:
        earlier = last.get(note.stage)
        last[note.stage] = note if earlier is None else update_rows(earlier, note)
    rank = {name: place for place, name in enumerate(order)}
    nested = sorted(last.values(), key=lambda note: rank.get(note.stage.split("+")[0], len(rank)))
    provenance = Provenance.identity(b, n, device)
    for note in nested:
        tokens = int(provenance.token.amax()) + 1
        provenance = provenance.then(pass_unseen(note.plan, tokens))
    return provenance


def update_rows(earlier: PlanNote, later: PlanNote) -> PlanNote:
    """Return the later of two notes, with the rows of the earlier one where it has none."""
    unseen = ~later.plan.keep_mask.any(1)
    if not bool(unseen.any()):
        return later
    old, new = earlier.plan, later.plan
    n = max(old.keep_mask.shape[1], new.keep_mask.shape[1])

    def choose(first: Tensor, second: Tensor, fill: int) -> Tensor:
        pads = [F.pad(value, (0, n - value.shape[1]), value=fill) for value in (first, second)]
        return torch.where(unseen[:, None], pads[0], pads[1])

    plan = replace(
        new,
        keep_mask=choose(old.keep_mask, new.keep_mask, 0),
        provenance=Provenance(
            choose(old.provenance.token, new.provenance.token, -1),
            choose(fill_weight(old), fill_weight(new), 0) if has_weight(old, new) else None,
        ),
    )
    return replace(later, plan=plan)


def pass_unseen(plan: ChunkPlan, tokens: int) -> Provenance:
    """Return the map of a plan; a sample that the stage never saw keeps all its tokens.

    Args:
        plan: what was decided; samples that it is not about have no token in it.
        tokens: the most that any sample has; one that the stage never saw may have more of them
            than all that it saw.
    """
    unseen = ~plan.keep_mask.any(1)
    if not bool(unseen.any()):
        return plan.provenance
    missing = max(0, tokens - plan.keep_mask.shape[1])
    token: Int[Tensor, "b n"] = F.pad(plan.provenance.token, (0, missing), value=-1)
    places = torch.arange(token.shape[1], device=token.device).expand_as(token)
    token = torch.where(unseen[:, None], places, token)
    weight = plan.provenance.weight
    if weight is not None:
        weight = torch.where(unseen[:, None], 1.0, F.pad(weight, (0, missing)))
    return Provenance(token, weight)
