"""Thresholds from data: what leaves early is to agree with the full model as often as promised."""

import math
from collections.abc import Iterable
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from adaptok.config import Config
from adaptok.errors import ConfigError, DataError
from adaptok_exit.comparing import (
    SIMILARITY,
    Batch,
    Compared,
    check_compared,
    compare,
    find_exit,
    frozen,
)
from adaptok_exit.training import answer_early, run_fully


class ExitCalibration(Config):
    """Thresholds of exits, and what they did on samples that they were not chosen on.

    Args:
        agreement: share of those who leave that is to agree with the full model.
        certainty: of the bound that the thresholds were chosen by.
        compared: what was compared.
        thresholds: of each exit; 1: nobody leaves there.
        chosen_on: samples that the thresholds were chosen on.
        held_out: other samples, of which the rest is told.
        left: share of those that left at each exit.
        agreed: share of those who left at each exit that agreed; None where nobody left.
        measured: the same over all exits; None where nobody left.

    Raises:
        ConfigError: a value is missing or wrong.

    Example:
        >>> made = ExitCalibration(
        ...     agreement=0.98, certainty=0.9, compared="classes", thresholds=(0.97, 1.0),
        ...     chosen_on=500, held_out=500, left=(0.3, 0.0), agreed=(0.99, None), measured=0.99)
        >>> ExitCalibration.from_json(made.to_json()) == made, made.holds
        (True, True)
    """

    agreement: float
    certainty: float
    compared: Compared
    thresholds: tuple[float, ...]
    chosen_on: int
    held_out: int
    left: tuple[float, ...]
    agreed: tuple[float | None, ...]
    measured: float | None

    @property
    def holds(self) -> bool:
        """Whether the promise held on the samples that were held out."""
        return self.measured is None or self.measured >= self.agreement

    def apply(self, model: nn.Module) -> None:
        """Let samples of a model leave above these thresholds from now on.

        Args:
            model: the wrapped model that they were found for.

        Raises:
            NotWrappedError: it has no exits.
            ConfigError: it has another number of them.
        """
        find_exit(model).set_threshold(self.thresholds)


def calibrate_thresholds(
    model: nn.Module,
    batches: Iterable[Batch],
    agreement: float = 0.98,
    *,
    held_out: Iterable[Batch] | None = None,
    certainty: float = 0.9,
    compared: Compared = "classes",
    similarity: float = SIMILARITY,
) -> ExitCalibration:
    """Find thresholds with which those who leave agree with the full model often enough.

    Each threshold is the lowest one at which the lower bound of the agreement (Wilson, one-sided)
    is still as high as promised; an exit with too few samples that agree gets 1, so that nobody
    leaves there. Nothing changes on the model: see `ExitCalibration.apply`.

    Args:
        model: a model wrapped with `stack=["exit"]`, with trained heads.
        batches: images, or all arguments by name, that nothing was trained on.
        agreement: the promise, in (0, 1).
        held_out: batches to measure on; None takes every second sample of `batches` away for it.
            Give them where neighbours are alike, such as frames or variants.
        certainty: of the bound, in (0, 1); .5 leaves no margin.
        compared: as in training.
        similarity: as in training.

    Returns:
        The thresholds, and what was measured on the samples held out.

    Raises:
        NotWrappedError: the model has no exits.
        DataError: there is no batch, or one holds NaN.
        ConfigError: an option is out of range.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=["exit"])
        >>> calibrate_thresholds(vit, [torch.randn(4, 3, 32, 48)]).thresholds
        (1.0, 1.0)
    """
    check_compared(compared)
    for name, value in (("agreement", agreement), ("certainty", certainty)):
        if not 0.0 < value < 1.0:
            raise ConfigError(f"{name} is a share in (0, 1), got {value!r}")
    confidence, agrees = judge_batches(model, batches, compared, similarity)
    if held_out is None:
        if confidence.shape[1] < 2:
            raise DataError("two samples are needed, one to choose on and one to measure on")
        other = confidence[:, 1::2], agrees[:, 1::2]
        confidence, agrees = confidence[:, ::2], agrees[:, ::2]
    else:
        other = judge_batches(model, held_out, compared, similarity)
    thresholds = choose_thresholds(confidence, agrees, agreement, certainty)
    exits = leave_by(other[0], thresholds)
    n = exits.shape[0]
    gone = [exits == number for number in range(len(thresholds))]
    right = [float(other[1][number][gone[number]].sum()) for number in range(len(thresholds))]
    counts = [int(mask.sum()) for mask in gone]
    return ExitCalibration(
        agreement=agreement,
        certainty=certainty,
        compared=compared,
        thresholds=thresholds,
        chosen_on=confidence.shape[1],
        held_out=n,
        left=tuple(count / n for count in counts),
        agreed=tuple(x / count if count else None for x, count in zip(right, counts, strict=True)),
        measured=sum(right) / sum(counts) if sum(counts) else None,
    )


def judge_batches(
    model: nn.Module, batches: Iterable[Batch], compared: Compared, similarity: float
) -> tuple[Float[Tensor, "exits n"], Bool[Tensor, "exits n"]]:
    """Return for each exit and sample the confidence, and whether it agrees if it leaves there.

    Args:
        model: a wrapped model.
        batches: its inputs.
        compared: what is compared.
        similarity: when features are the same.

    Raises:
        DataError: there is no batch, or one holds NaN.
    """
    stage = find_exit(model)
    confidences, agreements = [], []
    with frozen(model, stage), torch.no_grad():
        for place, batch in enumerate(batches):
            full = run_fully(model, batch, place)
            sure, same = [], []
            for number, call in enumerate(full.record.exits):
                out = answer_early(model, full, number)
                same.append(compare(out, full.out, compared, similarity).cpu())
                sure.append(stage.judge(number)(call).sigmoid().cpu())
            confidences.append(torch.stack(sure))
            agreements.append(torch.stack(same))
    if not confidences:
        raise DataError("there is no batch to calibrate on")
    return torch.cat(confidences, dim=1), torch.cat(agreements, dim=1)


def choose_thresholds(
    confidence: Float[Tensor, "exits n"],
    agrees: Bool[Tensor, "exits n"],
    agreement: float,
    certainty: float = 0.9,
) -> tuple[float, ...]:
    """Return the lowest threshold of each exit that keeps a promise; 1 where none does.

    Args:
        confidence: of each sample at each exit.
        agrees: whether it agrees with the full model if it leaves there.
        agreement: the promise.
        certainty: of the lower bound that has to keep it.

    Returns:
        One threshold per exit; who leaves at one is not seen by the next.

    Example:
        >>> sure = torch.linspace(0.01, 0.99, 99)[None]
        >>> choose_thresholds(sure, sure > 0.5, agreement=0.9)[0] < 0.55
        True
    """
    thresholds = []
    here = torch.ones(confidence.shape[1], dtype=torch.bool)
    for sure, same in zip(confidence, agrees, strict=True):
        values, order = sure[here].double().sort(descending=True)
        right = same[here][order].cumsum(0).tolist()
        limits = values.tolist()
        threshold = 1.0
        for count in range(len(limits), 0, -1):
            below = limits[count] if count < len(limits) else 0.0
            if below == limits[count - 1]:  # a tie: both leave, or none does
                continue
            if bound_share(right[count - 1], count, certainty) >= agreement:
                threshold = round_between(below, limits[count - 1])
                break
        thresholds.append(threshold)
        here &= ~(sure > torch.tensor(threshold))
    return tuple(thresholds)


def round_between(low: float, high: float) -> float:
    """Return a float32 threshold that `high` exceeds and `low` does not, both float32."""
    middle = float(torch.tensor((low + high) / 2))
    return middle if low <= middle < high and middle > 0.0 else max(low, 1e-6)


def bound_share(right: float, count: int, certainty: float) -> float:
    """Return the lower bound of a share, one-sided, by Wilson's score interval.

    Args:
        right: how many were right.
        count: of how many.
        certainty: of the bound.

    Example:
        >>> round(bound_share(100, 100, 0.9), 3), bound_share(1, 2, 0.5)
        (0.984, 0.5)
    """
    z = NormalDist().inv_cdf(certainty)
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - spread) / (1 + z * z / count)


def leave_by(confidence: Float[Tensor, "exits n"], thresholds: tuple[float, ...]) -> Tensor:
    """Return the exit at which each sample leaves, -1 for those that stay to the end."""
    exits = torch.full((confidence.shape[1],), -1)
    for number, limit in enumerate(thresholds):
        leaves = (confidence[number] > torch.tensor(limit)) & (exits < 0)
        exits[leaves] = number
    return exits
