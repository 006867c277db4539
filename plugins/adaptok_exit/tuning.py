"""Fine-tuning for a schedule: early answers learn from the target and from the full model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.errors import ConfigError, DataError, NotWrappedError, ShapeError
from adaptok_exit.comparing import frozen
from adaptok_exit.scheduled import ScheduledExit
from adaptok_exit.schedules import look_up, read_table

FLAT = ((0.0, 1.0),)  # every step counts alike
Weights = Sequence[Sequence[float]]
Inputs = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ScheduleTraining:
    """What a training for a schedule saw.

    Args:
        losses: mean loss of each epoch.
        steps: number of updates.
    """

    losses: tuple[float, ...]
    steps: int


def weigh_noise(noise: Sequence[float], weights: Weights = FLAT) -> list[float]:
    """Return the weight of the loss of each sample.

    Args:
        noise: how noisy each sample is, from 0 (clean) to 1.
        weights: a table: pairs of the share of noise from which on a row holds, and a weight.

    Returns:
        One weight per sample.

    Raises:
        ConfigError: the table is none, or has a negative weight.

    Example:
        >>> weigh_noise([0.1, 0.7], weights=((0.0, 1.0), (0.5, 0.25)))
        [1.0, 0.25]
    """
    table = read_table(weights, "weight")
    if any(value < 0 for _, value in table):
        raise ConfigError(f"a weight is at least 0, got {table}")
    return look_up(noise, table)


def scheduled_loss(
    early: Float[Tensor, "b ..."],
    target: Float[Tensor, "b ..."] | None,
    noise: Sequence[float],
    *,
    weights: Weights = FLAT,
    full: Float[Tensor, "b ..."] | None = None,
    full_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Return the loss of a diffusion transformer that runs by a schedule.

    The mean over samples of `w(noise) * (|early - target|^2 + full_weight * |early - full|^2)`,
    squares averaged over each sample.

    Args:
        early: what the model with its schedule answers.
        target: what it is to answer, such as the noise; None leaves this part out.
        noise: how noisy each sample is, from 0 (clean) to 1.
        weights: weight by noise, a table (see `weigh_noise`).
        full: what the full model answers; it gets no gradient. None leaves this part out.
        full_weight: weight of the second part.

    Returns:
        The loss.

    Raises:
        ShapeError: there is nothing to compare with, or shapes differ.
        ConfigError: the table is none.

    Example:
        >>> early, target = torch.zeros(2, 3), torch.ones(2, 3)
        >>> scheduled_loss(early, target, [0.1, 0.9], weights=((0.0, 1.0), (0.5, 3.0)))
        tensor(2.)

    Paper: Moon et al., arXiv 2408.05927: a loss weighted by step, exits chosen by step.
    """
    if target is None and full is None:
        raise ShapeError("an early answer is compared with target= or with full=: give one of them")
    w = torch.tensor(weigh_noise(noise, weights), device=early.device)
    if len(w) != early.shape[0]:
        raise ShapeError(f"{early.shape[0]} samples need one share of noise each, got {len(w)}")
    total = torch.zeros_like(w)
    for other, factor in ((target, 1.0), (full, full_weight)):
        if other is None:
            continue
        if other.shape != early.shape:
            raise ShapeError(
                f"the early answer is {tuple(early.shape)}, and what it is compared with "
                f"{tuple(other.shape)}"
            )
        square = (early.float() - other.detach().float()) ** 2
        total = total + factor * square.flatten(1).mean(1)
    return (w * total).mean()


def find_schedule(model: nn.Module) -> ScheduledExit:
    """Return the schedule of a wrapped model, or raise a `NotWrappedError`."""
    found = next((m for m in model.modules() if isinstance(m, ScheduledExit)), None)
    if found is None:
        raise NotWrappedError(
            f"{type(model).__name__} has no schedule: call adaptok.wrap(model, "
            "stack=['schedule']) first"
        )
    return found


def tune_schedule(
    model: nn.Module,
    batches: Iterable[Inputs],
    *,
    epochs: int = 1,
    learning_rate: float = 1e-3,
) -> ScheduleTraining:
    """Train the adapters of a schedule to answer as the full model does; the host stays.

    Args:
        model: a model wrapped with `stack=[{"name": "schedule", "adapt": True}]`.
        batches: arguments of its forward, in order or by name; gone through once an epoch.
        epochs: how often.
        learning_rate: of AdamW.

    Returns:
        The losses.

    Raises:
        NotWrappedError: the model has no schedule.
        ConfigError: it has no adapters, or an option is out of range.
        DataError: there is no batch, or the model answers one with NaN.
    """
    stage = find_schedule(model)
    if not len(stage.adapters):
        raise ConfigError(
            "this schedule has no adapters to train: wrap with "
            '{"name": "schedule", "adapt": True}, or train the host itself by scheduled_loss'
        )
    if epochs < 1 or not learning_rate > 0:
        raise ConfigError(
            f"epochs is at least 1 and learning_rate above 0, got {epochs} and {learning_rate}"
        )
    optimizer = torch.optim.AdamW(stage.parameters(), lr=learning_rate, weight_decay=0.0)
    losses, steps = [], 0
    with frozen(model, stage), torch.enable_grad():
        for epoch in range(epochs):
            total, seen = 0.0, 0
            for place, batch in enumerate(batches):
                with torch.no_grad(), stage.at_full_depth():
                    full = call_host(model, batch)
                if not bool(full.isfinite().all()):
                    raise DataError(
                        f"the model answers batch {place} with NaN or infinity, from which nothing "
                        "can be learnt: leave it out, or mend it"
                    )
                early = call_host(model, batch)
                seen += 1
                if not early.requires_grad:  # no sample of this batch leaves early
                    continue
                b = early.shape[0]
                loss = scheduled_loss(early, None, [0.0] * b, full=full)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total, steps = total + float(loss.detach()), steps + 1
            if not seen:
                raise DataError(
                    f"there is no batch in epoch {epoch + 1}: give a list or a loader, which can "
                    "be gone through again, not a generator"
                )
            losses.append(total / seen)
    return ScheduleTraining(tuple(losses), steps)


def call_host(model: nn.Module, batch: Inputs) -> Float[Tensor, "b ..."]:
    """Call a model with arguments in order or by name, and return the first tensor of it."""
    out: Any = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return out
