"""Thresholds from data: what leaves early is to agree with the full model as often as promised."""

import math
from collections.abc import Iterable, Sequence

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

STEPS = 20  # sets of samples that a walk tries, each larger than the one before
STARTS = (0, 8, 4, 2)  # the share of the samples at which each walk begins; 0: as few as can tell
ROUNDING = 1e-9


class ExitCalibration(Config):
    """Thresholds of exits, and what they did on samples that they were not chosen on.

    Args:
        agreement: share of those who leave that is to agree with the full model.
        certainty: with which each exit was to keep it.
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

    Each threshold is as low as it can be while an agreement below the promise is unlikely (see
    `choose_thresholds`); an exit with too few samples that agree gets 1, so that nobody leaves
    there: 183 that all agree are needed for .98. Nothing changes on the model: see
    `ExitCalibration.apply`.

    Args:
        model: a model wrapped with `stack=["exit"]`, with trained heads.
        batches: images, or all arguments by name, that nothing was trained on.
        agreement: the promise, in (0, 1).
        held_out: batches to measure on; None takes every second sample of `batches` away for it.
            Give them where neighbours are alike, such as frames or variants.
        certainty: with which each exit keeps the promise, in (0, 1).
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
    return fit_thresholds(
        confidence, agrees, *other, agreement, certainty=certainty, compared=compared
    )


def fit_thresholds(
    confidence: Float[Tensor, "exits n"],
    agrees: Bool[Tensor, "exits n"],
    other_confidence: Float[Tensor, "exits k"],
    other_agrees: Bool[Tensor, "exits k"],
    agreement: float,
    *,
    certainty: float,
    compared: Compared,
) -> ExitCalibration:
    """Choose thresholds on some samples, and tell what they do to others.

    Args:
        confidence: of each sample at each exit.
        agrees: whether it agrees with the full model if it leaves there.
        other_confidence: the same of samples that were held out.
        other_agrees: likewise.
        agreement: the promise.
        certainty: with which each exit keeps it.
        compared: what was compared.

    Returns:
        The thresholds, and what was measured on the samples held out.
    """
    thresholds = choose_thresholds(confidence, agrees, agreement, certainty)
    exits = leave_by(other_confidence, thresholds)
    n = exits.shape[0]
    gone = [exits == number for number in range(len(thresholds))]
    right = [float(other_agrees[number][gone[number]].sum()) for number in range(len(thresholds))]
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

    Ever more samples are let go, the surest first, a twentieth of all at a time, as long as they
    agree so often that a true share below the promise is unlikely. The first doubt ends a walk: who
    tries all thresholds and takes the best finds one that is good by luck. Four walks begin at as
    few samples as can tell, an eighth, a quarter and half of them; each has a quarter of the doubt
    that is allowed, and the one that comes farthest counts.

    Args:
        confidence: of each sample at each exit.
        agrees: whether it agrees with the full model if it leaves there.
        agreement: the promise.
        certainty: with which each exit keeps it.

    Returns:
        One threshold per exit; who leaves at one is not seen by the next.

    Example:
        >>> sure = torch.linspace(0.01, 0.99, 99)[None]
        >>> choose_thresholds(sure, sure > 0.5, agreement=0.8)[0] < 0.55
        True

    Paper: fixed-sequence testing as in Angelopoulos et al., Learn then Test, arXiv 2110.01052.
    """
    thresholds = []
    here = torch.ones(confidence.shape[1], dtype=torch.bool)
    step = max(1, confidence.shape[1] // STEPS)
    doubt = (1.0 - certainty) / len(STARTS)
    # so many that agree without exception can tell
    fewest = max(1, math.ceil(math.log(doubt) / math.log(agreement) - ROUNDING))
    for sure, same in zip(confidence, agrees, strict=True):
        values, order = sure[here].double().sort(descending=True)
        right = [0, *same[here][order].cumsum(0).tolist()]
        limits = [*values.tolist(), 0.0]
        most = 0
        for start in {max(fewest, len(values) // share if share else 0) for share in STARTS}:
            for wanted in [*range(start, len(values), step), len(values)]:
                count = find_cut(limits, wanted)
                chance = tail_of_binomial(right[count], count, agreement)
                if count < start or chance > doubt + ROUNDING:
                    break
                most = max(most, count)
        threshold = round_between(limits[most], limits[most - 1]) if most else 1.0
        thresholds.append(threshold)
        here &= ~(sure > torch.tensor(threshold))
    return tuple(thresholds)


def find_cut(limits: Sequence[float], wanted: int) -> int:
    """Return how many samples leave if about so many are to: of equal ones, all do.

    Args:
        limits: confidences that fall, and a zero behind them.
        wanted: how many are to leave.

    Example:
        >>> find_cut([0.9, 0.8, 0.8, 0.1, 0.0], 2)
        3
    """
    while wanted < len(limits) - 1 and limits[wanted] == limits[wanted - 1]:
        wanted += 1
    return wanted


def round_between(low: float, high: float) -> float:
    """Return a float32 threshold that `high` exceeds and `low` does not, both float32."""
    middle = float(torch.tensor((low + high) / 2))
    return middle if low <= middle < high and middle > 0.0 else max(low, 1e-6)


def tail_of_binomial(right: int, count: int, share: float) -> float:
    """Return how likely at least so many are right if each is with a probability.

    Args:
        right: how many were right.
        count: of how many.
        share: the probability.

    Example:
        >>> round(tail_of_binomial(9, 10, 0.5), 4)
        0.0107
    """
    if right <= 0:
        return 1.0
    logs = (
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(share)
        + (count - k) * math.log1p(-share)
        for k in range(right, count + 1)
    )
    return min(1.0, math.fsum(math.exp(value) for value in logs))


def leave_by(confidence: Float[Tensor, "exits n"], thresholds: tuple[float, ...]) -> Tensor:
    """Return the exit at which each sample leaves, -1 for those that stay to the end."""
    exits = torch.full((confidence.shape[1],), -1)
    for number, limit in enumerate(thresholds):
        leaves = (confidence[number] > torch.tensor(limit)) & (exits < 0)
        exits[leaves] = number
    return exits
