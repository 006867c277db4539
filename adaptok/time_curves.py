"""How long a call takes at each budget: measured points, made monotone, and read both ways."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from adaptok.errors import ConfigError

ROUNDING = 1e-6  # of a cell: a share times the cells may miss a whole number by so much
SLACK = 1 + 1e-9  # a time may miss its target by so much


@dataclass(frozen=True, slots=True)
class CallShape:
    """What a measured time depends on beside the budget, in plain numbers.

    Args:
        batch: samples of a call.
        num_cells: grid cells of a sample (`n`).
        dtype: of the features, or what autocast makes of them.
        device: type of the device.
        threads: threads of a CPU; 0 elsewhere, None where it is not known.
        compiled: whether `adaptok.compile` compiled the model.

    Example:
        >>> CallShape(8, 196, "bfloat16", "cuda", 0).describe()
        'batch 8 of 196 cells, bfloat16 on cuda'
    """

    batch: int
    num_cells: int
    dtype: str
    device: str
    threads: int | None
    compiled: bool = False

    @classmethod
    def of(
        cls,
        batch: int,
        num_cells: int,
        dtype: torch.dtype,
        device: torch.device,
        compiled: bool = False,
    ) -> "CallShape":
        """Return the shape of a call that is made now, under the autocast that is on."""
        kind = device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        threads: int | None = 0
        if kind == "cpu":  # a compiled graph cannot ask for it
            threads = None if torch.compiler.is_compiling() else torch.get_num_threads()
        name = str(dtype).removeprefix("torch.")
        return cls(batch, num_cells, name, kind, threads, compiled)

    def fits(self, other: "CallShape") -> bool:
        """Say whether a time of one holds for the other."""
        unknown = self.threads is None or other.threads is None
        return self == (replace(other, threads=self.threads) if unknown else other)

    def describe(self) -> str:
        """Say in words what was measured."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        mode = ", compiled" if self.compiled else ""
        return (
            f"batch {self.batch} of {self.num_cells} cells, {self.dtype} on {self.device}{threads}"
            f"{mode}"
        )


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One budget and how long it takes.

    Args:
        keep: share of the cells that is kept.
        ms: milliseconds of a call.
        spread: from the first to the third quartile, as a fraction of the median.

    Raises:
        ConfigError: the share or the time is no finite number, or the time is negative.
    """

    keep: float
    ms: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.keep) and math.isfinite(self.ms) and self.ms >= 0):
            raise ConfigError(
                "a measured time is finite and not negative, got "
                f"{self.ms:g} ms at keep={self.keep:g}: measure again"
            )


@dataclass(frozen=True, slots=True)
class TimeCurve:
    """Milliseconds over the share of kept cells: straight between points, never falling.

    Args:
        shape: which calls it is for.
        points: by rising `keep`, with `ms` that does not fall (see `fit_curve`).

    Raises:
        ConfigError: there is no point, or they do not rise.

    Example:
        >>> shape = CallShape(8, 100, "float32", "cpu", 2)
        >>> curve = TimeCurve(shape, (CurvePoint(0.1, 20.0), CurvePoint(1.0, 80.0)))
        >>> curve.ms_at(0.4), curve.find_keep(40.0), curve.find_keep(10.0)
        (40.0, 0.4, None)
    """

    shape: CallShape
    points: tuple[CurvePoint, ...]

    def __post_init__(self) -> None:
        pairs = zip(self.points, self.points[1:], strict=False)
        if not self.points or any(a.keep >= b.keep or a.ms > b.ms for a, b in pairs):
            raise ConfigError(
                "a curve needs points with rising keep and times that do not fall: make it with "
                "fit_curve"
            )

    @property
    def fastest_ms(self) -> float:
        """Milliseconds with the fewest cells that were measured."""
        return self.points[0].ms

    @property
    def full_ms(self) -> float:
        """Milliseconds with the most cells that were measured."""
        return self.points[-1].ms

    def bracket(self, keep: float) -> tuple[CurvePoint, CurvePoint]:
        """Return the points on both sides of a share; twice the same one at an end."""
        below = [point for point in self.points if point.keep <= keep]
        above = [point for point in self.points if point.keep >= keep]
        return (below or above)[-1 if below else 0], (above or below)[0 if above else -1]

    def ms_at(self, keep: float) -> float:
        """Return the milliseconds at a share of kept cells; level outside what was measured."""
        left, right = self.bracket(keep)
        if left.keep == right.keep:
            return left.ms
        part = (keep - left.keep) / (right.keep - left.keep)
        return min(right.ms, left.ms + part * (right.ms - left.ms))

    def spread_at(self, keep: float) -> float:
        """Return the larger spread of the points on both sides of a share."""
        return max(point.spread for point in self.bracket(keep))

    def find_keep(self, target_ms: float) -> float | None:
        """Return the largest share, of whole cells, whose time is at most a target.

        Args:
            target_ms: milliseconds of a call.

        Returns:
            The share; None if the fewest cells that were measured take longer.
        """
        if target_ms < self.fastest_ms:
            return None
        left = max(i for i, point in enumerate(self.points) if point.ms <= target_ms)
        keep = self.points[left].keep
        if left + 1 == len(self.points):
            return keep
        right = self.points[left + 1]
        rise = (target_ms - self.points[left].ms) / (right.ms - self.points[left].ms)
        n = self.shape.num_cells
        count = math.floor((keep + rise * (right.keep - keep)) * n + ROUNDING)
        while count / n > keep and self.ms_at(count / n) > target_ms * SLACK:
            count -= 1
        return max(keep, count / n)


def fit_curve(shape: CallShape, points: Iterable[CurvePoint]) -> TimeCurve:
    """Make a curve of measured points, and take the noise out that lets it fall.

    A point that was measured several times counts with the mean of its times. Neighbours that
    fall are pooled to their mean (isotonic regression), which is the nearest curve that rises.

    Args:
        shape: which calls it is for.
        points: in any order.

    Returns:
        The curve.

    Raises:
        ConfigError: there is no point.

    Example:
        >>> shape = CallShape(8, 100, "float32", "cpu", 2)
        >>> noisy = [CurvePoint(0.5, 52.0), CurvePoint(0.75, 50.0), CurvePoint(1.0, 80.0)]
        >>> [point.ms for point in fit_curve(shape, noisy).points]
        [51.0, 51.0, 80.0]
    """
    by_keep: dict[float, list[CurvePoint]] = {}
    for point in points:
        by_keep.setdefault(point.keep, []).append(point)
    keeps = sorted(by_keep)
    means = [math.fsum(p.ms for p in by_keep[keep]) / len(by_keep[keep]) for keep in keeps]
    spreads = [max(point.spread for point in by_keep[keep]) for keep in keeps]
    fitted = map(CurvePoint, keeps, raise_monotone(means), spreads)
    return TimeCurve(shape, tuple(fitted))


def raise_monotone(values: Sequence[float]) -> list[float]:
    """Return the nearest values that never fall, in the sense of least squares."""
    pools: list[tuple[float, int]] = []  # mean and how many
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [mean for mean, count in pools for _ in range(count)]


def show_ms(ms: float) -> str:
    """Return milliseconds in words, with three digits that count.

    Example:
        >>> show_ms(1349.7), show_ms(74.0), show_ms(0.0512)
        ('1350 ms', '74.0 ms', '0.0512 ms')
    """
    digits = 2 - math.floor(math.log10(ms)) if ms > 0 else 0
    return f"{ms:.{max(0, digits)}f} ms"
