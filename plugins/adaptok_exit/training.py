"""Training of heads and adapters by the host's own answers; the host stays as it is."""

import math
from collections.abc import Iterable, Iterator
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
from adaptok_exit.judging import ExitJudge, pool_tokens

JUDGE_STEPS, JUDGE_RATE, JUDGE_DECAY = 200, 3e-3, 0.05


@dataclass(frozen=True, slots=True)
class ExitTraining:
    """What a training of exits saw.

    Args:
        losses: mean loss of the adapters in each epoch.
        judged: cross-entropy of each head on samples that it did not learn from; of a coin .69.
        agreement: share of the samples on which each exit agrees with the full model in the end.
        steps: updates of the adapters.
    """

    losses: tuple[float, ...]
    judged: tuple[float, ...]
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
    keep: bool = False,
) -> ExitTraining:
    """Train the adapters and heads of a model's exits; the host teaches, and stays as it is.

    For each batch the model runs once in full. What its exits saw is then mapped by the adapters
    and read by the host's own norm and head, without any block, and adapters learn to answer as the
    full model does. One more pass notes who agrees, and the heads learn to foretell it.

    Args:
        model: a model wrapped with `stack=["exit"]`.
        batches: images, or all arguments by name; a list or a loader, gone through `epochs + 1`
            times.
        epochs: how often adapters see it.
        learning_rate: of the adapters (AdamW).
        compared: `"classes"`, or `"features"` for a model without classes.
        similarity: cosine from which on features count as the same.
        token_weight: weight of the distance of the tokens behind the last block.
        keep: run the host once, and keep what the exits saw in memory for all epochs: `b s d`
            numbers for each exit and for the end, of all batches.

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
    optimizer = torch.optim.AdamW(stage.adapters.parameters(), lr=learning_rate, weight_decay=0.0)
    losses: list[float] = []
    steps = 0
    with frozen(model, stage), torch.enable_grad():
        kept = list(run_batches(model, batches, 0)) if keep else None
        for epoch in range(epochs):
            total, seen = 0.0, 0
            for full in kept or run_batches(model, batches, epoch):
                loss = torch.stack(
                    [
                        distance_between(answer_early(model, full, number), full.out, compared)
                        + token_weight * compare_tokens(stage, full, number)
                        for number in range(stage.num_exits)
                    ]
                ).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                b = full.out.shape[0]
                total, seen, steps = total + float(loss.detach()) * b, seen + b, steps + 1
            losses.append(total / seen)
        pooled: list[list[Tensor]] = [[] for _ in stage.judges]
        agreed: list[list[Tensor]] = [[] for _ in stage.judges]
        for full in kept or run_batches(model, batches, epochs):
            for number, call in enumerate(full.record.exits):
                with torch.no_grad():
                    out = answer_early(model, full, number)
                agreed[number].append(compare(out, full.out, compared, similarity))
                pooled[number].append(pool_tokens(call))
        judged = [
            fit_judge(stage.judge(number), torch.cat(pooled[number]), torch.cat(agreed[number]))
            for number in range(stage.num_exits)
        ]
    rates = tuple(float(torch.cat(parts).float().mean()) for parts in agreed)
    return ExitTraining(tuple(losses), tuple(judged), rates, steps)


def fit_judge(judge: ExitJudge, pooled: Float[Tensor, "n e"], agrees: Bool[Tensor, " n"]) -> float:
    """Train a head to foretell which samples agree, and return its loss.

    Every fifth sample is left out and says when to stop.

    Args:
        judge: the head, changed in place.
        pooled: what it reads of each sample.
        agrees: whether each sample agrees with the full model.
    """
    rate = min(max(float(agrees.float().mean()), 0.02), 0.98)
    with torch.no_grad():
        judge.out.bias.fill_(math.log(rate / (1.0 - rate)))
    other = torch.arange(len(agrees), device=agrees.device) % 5 == 4
    seen = ~other if bool(other.any()) else other | True
    watched = other if bool(other.any()) else seen
    optimizer = torch.optim.AdamW(judge.parameters(), lr=JUDGE_RATE, weight_decay=JUDGE_DECAY)
    best, weights = math.inf, judge.state_dict()
    for _ in range(JUDGE_STEPS):
        with torch.no_grad():
            loss = float(judge_loss(judge.score(pooled[watched]), agrees[watched]))
        if loss < best:
            best, weights = loss, {k: v.clone() for k, v in judge.state_dict().items()}
        optimizer.zero_grad()
        judge_loss(judge.score(pooled[seen]), agrees[seen]).backward()
        optimizer.step()
    judge.load_state_dict(weights)
    return best


def run_batches(model: nn.Module, batches: Iterable[Batch], number: int) -> Iterator[FullRun]:
    """Run a model in full on all batches of one pass over the data.

    Args:
        model: a wrapped model.
        batches: its inputs.
        number: of the pass, from 0, for errors.

    Raises:
        DataError: there is no batch, or one holds NaN.
    """
    place = -1
    for place, batch in enumerate(batches):
        yield run_fully(model, batch, place)
    if place < 0:
        raise DataError(
            f"there is no batch in pass {number + 1} over the data: give a list or a loader, which "
            "can be gone through again, not a generator"
        )


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
