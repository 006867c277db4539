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
    return F.mse_loss(F.layer_norm(early.float(), shape), F.layer_norm(last.detach().float(), shape))


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
                full, record = record_call(model, stage, batch, place)
                loss = torch.zeros((), device=full.device)
                for number in range(stage.num_exits):
                    part, agrees = exit_loss(
                        model, stage, number, batch, record, full, compared, similarity, token_weight
                    )
                    loss = loss + part / stage.num_exits
                    agreed[number] += float(agrees.sum())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, seen, steps = total + float(loss.detach()) * len(full), seen + len(full), steps + 1
            if not seen:
                raise DataError(
                    f"there is no batch in epoch {epoch + 1}: give a list or a loader, which can "
                    "be gone through again, not a generator"
                )
            losses.append(total / seen)
            agreed /= seen
    return ExitTraining(tuple(losses), tuple(agreed.tolist()), steps)


def record_call(
    model: nn.Module, stage: ConfidenceExit, batch: Batch, place: int
) -> tuple[Float[Tensor, "b k"], ExitRecord]:
    """Run a model in full and return its answer with what its exits saw."""
    with torch.no_grad(), stage.record() as records:
        full = call_model(model, batch)
    check_numbers(batch, full, place)
    (record,) = records
    if len(record.exits) != stage.num_exits:
        raise ConfigError(
            f"{len(record.exits)} of {stage.num_exits} exits lie inside the span, and there is "
            "nothing to train the others by: give a longer span, or blocks= of different numbers"
        )
    return full, record


def answer_early(
    model: nn.Module, stage: ConfidenceExit, number: int, batch: Batch, record: ExitRecord
) -> Float[Tensor, "b k"]:
    """Return what a model answers if all samples leave at one exit."""
    with stage.replay(number, record):
        return call_model(model, batch)


def exit_loss(
    model: nn.Module,
    stage: ConfidenceExit,
    number: int,
    batch: Batch,
    record: ExitRecord,
    full: Float[Tensor, "b k"],
    compared: Compared,
    similarity: float,
    token_weight: float,
) -> tuple[Float[Tensor, ""], Bool[Tensor, " b"]]:
    """Return the loss of one exit, and which samples agree there."""
    call, judge = record.exits[number], stage.judge(number)
    out = answer_early(model, stage, number, batch, record)
    agrees = compare(out.detach(), full, compared, similarity)
    if not bool(judge.out.weight.any()):  # fresh: begin at the rate that there is
        rate = min(max(float(agrees.float().mean()), 0.05), 0.95)
        with torch.no_grad():
            judge.out.bias.fill_(math.log(rate / (1.0 - rate)))
    loss = distance_between(out, full, compared) + judge_loss(judge(call), agrees)
    if token_weight:
        loss = loss + token_weight * token_loss(stage.adapters[number](call.x), record.last.x)
    return loss, agrees
