"""Finding a budget by its time: which budgets to measure, and what follows from the figures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from adaptok.errors import ConfigError
from adaptok.measure.latency import Timing
from adaptok.time_curves import CallShape, CurvePoint, TimeCurve, fit_curve


@dataclass(frozen=True, slots=True)
class Round:
    """What was measured in turns, in one run.

    Args:
        by_keep: times by the share of kept cells.
        plain: of the model without adaptive parts, where there is one.
    """

    by_keep: Mapping[float, Timing]
    plain: Timing | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """The times of all budgets, and of the plain model.

    Args:
        curve: milliseconds over the share of kept cells.
        plain: the plain model at `keep=1`; None if there is none to compare with.
    """

    curve: TimeCurve
    plain: CurvePoint | None

    @property
    def break_even(self) -> float | None:
        """The largest share that is no slower than the plain model; None if none is."""
        return None if self.plain is None else self.curve.find_keep(self.plain.ms)


def search_budgets(
    measure: Callable[[Sequence[float]], Round],
    shape: CallShape,
    *,
    points: int = 5,
    target_ms: float | None = None,
    keep: float | None = None,
) -> Measured:
    """Measure a handful of budgets, then a few more around what is asked for.

    Args:
        measure: measures budgets in turns, and the plain model with them.
        shape: of the measured call.
        points: budgets of the first round, at least 2.
        target_ms: a time whose budget is looked for.
        keep: a budget whose time is looked for.

    Returns:
        The curve through both rounds, and the plain model's time over both.

    Raises:
        ConfigError: there are fewer than two points.

    Example:
        >>> def measure(keeps):
        ...     times = {keep: 10 + 80 * keep for keep in keeps}
        ...     return Round({k: Timing(ms, ms, ms) for k, ms in times.items()})
        >>> found = search_budgets(measure, CallShape(8, 200, "float32", "cpu", 2), target_ms=50)
        >>> found.curve.find_keep(50)
        0.5
    """
    if points < 2:
        raise ConfigError(f"a curve needs points of at least 2, got {points}")
    n = shape.num_cells
    wanted = [whole(count / (points - 1), n) for count in range(points)]
    if keep is not None:
        wanted.append(whole(keep, n))
    rounds = [measure(sorted(set(wanted)))]
    first = combine(rounds, shape)
    answers = [1.0]
    for time in (target_ms, None if first.plain is None else first.plain.ms):
        if time is not None:
            found = first.curve.find_keep(time)
            answers.append(first.curve.points[0].keep if found is None else found)
    if keep is not None:
        answers.append(whole(keep, n))
    rounds.append(measure(sorted(surround(first.curve, answers))))
    return combine(rounds, shape)


def surround(curve: TimeCurve, answers: Iterable[float]) -> set[float]:
    """Return budgets to measure around some answers: half way to what was measured beside them."""
    measured = [point.keep for point in curve.points]
    found: set[float] = set()
    for answer in answers:
        below = max((keep for keep in measured if keep < answer), default=answer)
        above = min((keep for keep in measured if keep > answer), default=answer)
        sides = ((below + answer) / 2, (answer + above) / 2)
        found |= {answer, *(whole(side, curve.shape.num_cells) for side in sides)}
    return found


def combine(rounds: Sequence[Round], shape: CallShape) -> Measured:
    """Make one curve and one plain time of several rounds."""
    points = [
        CurvePoint(keep, timing.median_ms, timing.spread)
        for round_ in rounds
        for keep, timing in round_.by_keep.items()
    ]
    plain = [
        CurvePoint(1.0, round_.plain.median_ms, round_.plain.spread)
        for round_ in rounds
        if round_.plain is not None
    ]
    curve = fit_curve(shape, points)
    return Measured(curve, fit_curve(shape, plain).points[0] if plain else None)


def whole(keep: float, num_cells: int) -> float:
    """Return the nearest share of whole cells, at least one of them."""
    return max(1, round(keep * num_cells)) / num_cells
