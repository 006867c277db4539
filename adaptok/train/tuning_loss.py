"""What a tuning learns from: how far a wrapped model is from itself without its stages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from adaptok.budgeted import budget
from adaptok.calls import BlockCall
from adaptok.chunking import ChunkPlan
from adaptok.errors import ConfigError, ShapeError
from adaptok.hosts import HostInputs, device_of
from adaptok.observers import Observer
from adaptok.routing import Routing
from adaptok.tracing import collect_losses, observe, plain, require_adaptive

SMALLEST_SPREAD = 1e-12

# What a model is called with: its one tensor, its arguments by place or by name, or both.
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | HostInputs
Batches = Sequence[Inputs] | Callable[[int], Inputs]


class BlockExit(Observer):
    """Takes in the tokens that leave the block list and the plans, for one call."""

    def __init__(self) -> None:
        self.call: BlockCall | None = None
        self.plans: list[tuple[Routing, ChunkPlan]] = []

    @property
    def x(self) -> Float[Tensor, "b s d"]:
        """All tokens, each brought to mean 0 and variance 1, as the norm of most heads does."""
        assert self.call is not None
        return F.layer_norm(self.call.x.float(), self.call.x.shape[-1:])

    @property
    def cells(self) -> Float[Tensor, "b n d"]:
        """Those of them that are grid cells."""
        assert self.call is not None
        return self.x[:, self.call.start : self.call.start + self.call.num_cells]

    def note_exit(self, call: BlockCall) -> None:
        """Take in the tokens."""
        self.call = call

    def note_plan(self, stage: str, routing: Routing, plan: ChunkPlan) -> None:
        """Take in a plan."""
        self.plans.append((routing, plan))

    def note_part(
        self, stage: str, routing: Routing, plan: ChunkPlan, samples: Sequence[int]
    ) -> None:
        """Refuse a plan of some samples, which the losses of whole batches would leave out."""
        raise ConfigError(
            f"{stage!r} ran on a part of the batch, and its plan would not count in the loss: tune "
            "it without the stages around it, then wrap again with all of them"
        )


def choose_batch(batches: Batches, step: int, model: nn.Module) -> HostInputs:
    """Return what a step calls the model with, on the model's device."""
    chosen = batches(step) if callable(batches) else batches[step % len(batches)]
    if isinstance(chosen, HostInputs):
        inputs = chosen
    elif isinstance(chosen, Mapping):
        inputs = HostInputs((), dict(chosen))
    elif isinstance(chosen, Tensor):
        inputs = HostInputs((chosen,))
    elif isinstance(chosen, tuple):
        inputs = HostInputs(chosen)
    else:
        raise ConfigError(
            f"a batch is a tensor, a tuple of arguments, a mapping of arguments or a HostInputs, "
            f"got a {type(chosen).__name__}"
        )
    device = device_of(model)
    return HostInputs(
        tuple(place_on(value, device) for value in inputs.args),
        {name: place_on(value, device) for name, value in inputs.kwargs.items()},
    )


def place_on(value: Any, device: torch.device) -> Any:  # noqa: ANN401
    """Return a tensor on a device, and anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def measure_parts(
    model: nn.Module, teacher: nn.Module, inputs: HostInputs, keep: float
) -> dict[str, Tensor]:
    """Return the terms of the loss on one batch by name (see `TuneStep`).

    Args:
        model: a wrapped model.
        teacher: the same one, or a copy of it; its stages are passed over.
        inputs: what both are called with.
        keep: fraction of the cells to keep.

    Returns:
        Scalars; `ranking` is there only if cells were dropped.
    """
    read = require_adaptive(model).backbone.output
    given, wanted = BlockExit(), BlockExit()
    with torch.no_grad(), plain(teacher), observe(teacher, wanted):
        target = read(teacher(*inputs.args, **inputs.kwargs)).float()
    with budget(model, keep=keep), observe(model, given), collect_losses(model) as losses:
        output = read(model(*inputs.args, **inputs.kwargs)).float()
    wrong = (given.cells.detach() - wanted.cells).square().mean(-1)
    rankings = [
        rank_dropped(routing.keep_prob, ~plan.keep_mask, wrong)
        for routing, plan in given.plans
        if routing.keep_prob.shape == wrong.shape and not bool(plan.keep_mask.all())
    ]
    parts = {
        "output": relative_distance(output, target),
        "tokens": relative_distance(given.x, wanted.x),
        **losses,
    }
    return parts | ({"ranking": torch.stack(rankings).mean()} if rankings else {})


def rank_dropped(
    prob: Float[Tensor, "b n"], dropped: Bool[Tensor, "b n"], wrong: Float[Tensor, "b n"]
) -> Float[Tensor, ""]:
    """Say how little a router tells which dropped cells come out wrong.

    Args:
        prob: keep probability of each cell.
        dropped: cells that had no token of their own.
        wrong: how wrong each cell came out, not negative.

    Returns:
        1 minus the correlation, over the dropped cells of each sample, of the logit of the
        probability and the logarithm of the error; the mean over the samples.
    """
    logit = torch.logit(prob.float(), eps=1e-6)
    share = dropped.float() / dropped.sum(1, keepdim=True).clamp(min=1)
    a, b = (x - (x * share).sum(1, keepdim=True) for x in (logit, (wrong + 1e-8).log()))
    both = (a * b * share).sum(1)
    scale = ((a.square() * share).sum(1) * (b.square() * share).sum(1) + 1e-12).sqrt()
    return (1.0 - both / scale).mean()


def relative_distance(
    x: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."]
) -> Float[Tensor, ""]:
    """Return the squared distance as a share of the spread of the target around its mean.

    The mean is that of the batch, so that what all samples have in common does not count; a
    batch of one sample is its own mean, and its spread is that around zero.
    """
    if x.shape != target.shape:
        raise ShapeError(
            f"the wrapped model gave {tuple(x.shape)} and the plain one {tuple(target.shape)}"
        )
    centred = target - target.mean(0) if target.shape[0] > 1 else target
    spread = centred.square().mean().clamp(min=SMALLEST_SPREAD)
    return (x - target).square().mean() / spread


def give_gradients(
    parts: Mapping[str, Tensor],
    weights: Mapping[str, float],
    trained: Mapping[str, nn.Parameter],
    routers: Mapping[str, nn.Parameter],
) -> Float[Tensor, ""]:
    """Give each weight the gradient of what it learns from, and return the whole loss.

    Args:
        parts: terms of the loss; those of stages, except `ratio`, count for all weights.
        weights: their weights, 1 where none is given.
        trained: the weights to train, by name.
        routers: those of them that are routers'; they do not learn from the distances.

    Returns:
        The weighted sum of all terms.
    """
    scaled = {name: weights.get(name, 1.0) * part for name, part in parts.items()}
    ranks = ("ranking", "ratio")
    distance = [part for name, part in scaled.items() if name not in ranks]
    choice = [part for name, part in scaled.items() if name not in ("output", "tokens")]
    others = {name: weight for name, weight in trained.items() if name not in routers}
    for terms, learning in ((distance, others), (choice, routers)):
        for weight in learning.values():
            weight.grad = None
        terms = [term for term in terms if term.requires_grad]
        if not terms or not learning:
            continue
        found = torch.autograd.grad(
            torch.stack(terms).sum(), list(learning.values()), retain_graph=True, allow_unused=True
        )
        for weight, gradient in zip(learning.values(), found, strict=True):
            weight.grad = gradient
    return torch.stack(list(scaled.values())).sum().detach()
