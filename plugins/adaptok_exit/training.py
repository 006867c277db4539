"""Training of heads and adapters by the host's own answers; the host stays as it is."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from adaptok.errors import ConfigError, DataError
from adaptok_exit.comparing import (
    SIMILARITY,
    Batch,
    Compared,
    call_model,
    check_compared,
    check_numbers,
    compare,
    distance_between,
    find_exit,
    frozen,
)
from adaptok_exit.confidence import ConfidenceExit, ExitRecord


@dataclass(frozen=True, slots=True)
class ExitTraining:
    """What a training of exits saw.

    Args:
        losses: mean loss of each epoch.
        agreement: share of the samples of the last epoch on which each exit agreed with the full
            model, before the update that saw them.
        steps: number of updates.
    """

    losses: tuple[float, ...]
    agreement: tuple[float, ...]
    steps: int


@dataclass(frozen=True, slots=True, eq=False)
class FullRun:
    """A call of a model in which nobody left.

    Args:
        batch: what it was called with.
        out: its classes or features.
        record: what its exits saw.
    """

    batch: Batch
    out: Float[Tensor, "b k"]
    record: ExitRecord


def token_loss(early: Float[Tensor, "b s d"], last: Float[Tensor, "b s d"]) -> Float[Tensor, ""]:
    """Return the squared distance of tokens as a norm behind the blocks sees them.

    Args:
        early: what left, mapped by its adapter.
        last: tokens behind the last block; they get no gradient.

    Example:
        >>> x = torch.randn(2, 3, 8)
        >>> token_loss(2 * x + 1, x) < 1e-3
        tensor(True)
    """
    shape = early.shape[-1:]
    return F.mse_loss(
        F.layer_norm(early.float(), shape), F.layer_norm(last.detach().float(), shape)
    )


def judge_loss(logits: Float[Tensor, " b"], agrees: Bool[Tensor, " b"]) -> Float[Tensor, ""]:
    """Return how badly confidences foretell who agrees (binary cross-entropy).

    Args:
        logits: of a judge.
        agrees: whether each sample agrees with the full model.

    Example:
        >>> round(float(judge_loss(torch.zeros(2), torch.tensor([True, False]))), 3)
        0.693
    """
    return F.binary_cross_entropy_with_logits(logits, agrees.float())


def train_exits(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    epochs: int = 1,
    learning_rate: float = 1e-3,
    compared: Compared = "classes",
    similarity: float = SIMILARITY,
    token_weight: float = 1.0,
) -> ExitTraining:
    """Train the heads and adapters of a model's exits; the host teaches, and stays as it is.

    For each batch the model runs once in full. What its exits saw is then mapped by the adapters
    and read by the host's own norm and head, without any block: adapters learn to answer as the
    full model does, heads to foretell whether they do.

    Args:
        model: a model wrapped with `stack=["exit"]`.
        batches: images, or all arguments by name; a list or a loader, gone through once an epoch.
        epochs: how often.
        learning_rate: of AdamW.
        compared: `"classes"`, or `"features"` for a model without classes.
        similarity: cosine from which on features count as the same.
        token_weight: weight of the distance of the tokens behind the last block.

    Returns:
        Losses and agreement.

    Raises:
        NotWrappedError: the model has no exits.
        DataError: there is no batch, or one holds NaN.
        ConfigError: an option or a batch has a wrong form.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=["exit"])
        >>> train_exits(vit, [torch.randn(4, 3, 32, 48)], epochs=2).steps
        2
    """
    stage = find_exit(model)
    check_compared(compared)
    if epochs < 1 or not learning_rate > 0:
        raise ConfigError(
            f"epochs is at least 1 and learning_rate above 0, got {epochs} and {learning_rate}"
        )
    optimizer = torch.optim.AdamW(stage.parameters(), lr=learning_rate, weight_decay=0.0)
    losses: list[float] = []
    agreed, steps = torch.zeros(stage.num_exits), 0
    with frozen(model, stage), torch.enable_grad():
        for epoch in range(epochs):
            total, seen, agreed = 0.0, 0, torch.zeros(stage.num_exits)
            for place, batch in enumerate(batches):
                full = run_fully(model, batch, place)
                parts = []
                for number in range(stage.num_exits):
                    out = answer_early(model, full, number)
                    agrees = compare(out.detach(), full.out, compared, similarity)
                    start_judge(stage, number, agrees)
                    parts.append(
                        distance_between(out, full.out, compared)
                        + token_weight * compare_tokens(stage, full, number)
                        + judge_loss(stage.judge(number)(full.record.exits[number]), agrees)
                    )
                    agreed[number] += float(agrees.sum())
                loss = torch.stack(parts).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                b = full.out.shape[0]
                total, seen, steps = total + float(loss.detach()) * b, seen + b, steps + 1
            if not seen:
                raise DataError(
                    f"there is no batch in epoch {epoch + 1}: give a list or a loader, which can "
                    "be gone through again, not a generator"
                )
            losses.append(total / seen)
            agreed /= seen
    return ExitTraining(tuple(losses), tuple(agreed.tolist()), steps)


def run_fully(model: nn.Module, batch: Batch, place: int) -> FullRun:
    """Run a model in full, and note what its exits see.

    Args:
        model: a wrapped model.
        batch: its inputs.
        place: number of the batch, for errors.

    Raises:
        DataError: there is NaN or infinity in it.
        ConfigError: not all exits lie inside the span.
    """
    stage = find_exit(model)
    with torch.no_grad(), stage.record() as records:
        out = call_model(model, batch)
    check_numbers(batch, out, place)
    (record,) = records
    if len(record.exits) != stage.num_exits:
        raise ConfigError(
            f"{len(record.exits)} of {stage.num_exits} exits lie inside the span, and there is "
            "nothing to train the others by: give a longer span, or blocks= with one exit"
        )
    return FullRun(batch, out, record)


def answer_early(model: nn.Module, full: FullRun, number: int) -> Float[Tensor, "b k"]:
    """Return what a model answers if all samples of a call leave at one exit."""
    with find_exit(model).replay(number, full.record):
        return call_model(model, full.batch)


def compare_tokens(stage: ConfidenceExit, full: FullRun, number: int) -> Float[Tensor, ""]:
    """Return how far tokens that left at an exit are from those behind the last block."""
    return token_loss(stage.adapters[number](full.record.exits[number].x), full.record.last.x)


def start_judge(stage: ConfidenceExit, number: int, agrees: Bool[Tensor, " b"]) -> None:
    """Let a fresh judge begin at the share of samples that agree."""
    judge = stage.judge(number)
    if bool(judge.out.weight.any()):
        return
    rate = min(max(float(agrees.float().mean()), 0.05), 0.95)
    with torch.no_grad():
        judge.out.bias.fill_(math.log(rate / (1.0 - rate)))
