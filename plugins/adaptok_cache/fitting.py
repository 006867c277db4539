"""The polynomial of TeaCache from data: how far the output moves when the input moves so far."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok import BlockCall, BlockRange
from adaptok.calibrated import CalibrationRecord, Fitted
from adaptok.errors import ConfigError, DataError
from adaptok_cache.book import count_batch, find_rows, sign
from adaptok_cache.distances import relative_change
from adaptok_cache.history import spread_cells
from adaptok_cache.runs import SampleRun, follow

DEGREE = 4
Pairs = tuple[list[float], list[float]]


@dataclass(slots=True, eq=False)
class Walked:
    """The latest step of one sample.

    Args:
        run: where it is; None before its first step.
        pairs: how far input and output moved in each step.
        signal: what the next step is compared with.
        out: the grid tokens behind the blocks.
    """

    run: SampleRun | None = None
    pairs: Pairs = field(default_factory=lambda: ([], []))
    signal: Tensor | None = None
    out: Tensor | None = None

    def note(self, time: float, signal: Tensor, out: Tensor) -> None:
        """Note one step.

        Args:
            time: diffusion time.
            signal: what is compared from step to step.
            out: the grid tokens behind the blocks.
        """
        run = follow(self.run, time)
        if self.signal is not None and self.out is not None:
            (x,) = relative_change(signal[None], self.signal[None])
            (y,) = relative_change(out[None], self.out[None])
            sure = run.step > (1 if run.unsure else 0) and not run.blind
            if sure and math.isfinite(x) and math.isfinite(y):  # not from nothing
                self.pairs[0].append(x)
                self.pairs[1].append(y)
        self.run, self.signal, self.out = run, signal.clone(), out.clone()


class PairLog:
    """Collects how far input and output of the blocks move from step to step, sample by sample."""

    def __init__(self) -> None:
        self.walked: dict[Hashable, list[Walked]] = {}

    def run(self, inner: BlockRange, call: BlockCall, signal: Float[Tensor, "b ..."]) -> BlockCall:
        """Run a step in full, and note how far it moved from the one before.

        Args:
            inner: the blocks.
            call: what goes into them.
            signal: what is compared from step to step.
        """
        assert call.timestep is not None
        after = inner(call)
        numbers = call.numbers
        owner = None if numbers is None else (numbers.request, tuple(numbers.branches))
        b = count_batch(call)
        fresh = [Walked() for _ in range(b)]
        walks = self.walked.setdefault((owner, sign(inner, call)), fresh)
        out = spread_cells(call, after.cell_x)
        times = call.timestep.tolist()
        for place, row in enumerate(find_rows(call) or range(b)):
            walks[row].note(times[place], signal[place], out[place])
        return after

    def list_rows(self) -> list[dict[str, tuple[float, ...]]]:
        """Return the pairs of each sample.

        Raises:
            DataError: no step followed another one.
        """
        pairs = [walked.pairs for walks in self.walked.values() for walked in walks]
        if not any(x for x, _ in pairs):
            raise DataError(
                "'teacache' compares successive steps, and this batch has none: give a function "
                "that takes the model and runs a whole sampling walk"
            )
        return [{"input": tuple(x), "output": tuple(y)} for x, y in pairs]


def check_degree(degree: object) -> None:
    """Raise a `ConfigError` unless a degree is a whole number from 1 to 4."""
    if isinstance(degree, bool) or not isinstance(degree, int) or not 1 <= degree <= DEGREE:
        raise ConfigError(f"degree of 'teacache' is 1 to {DEGREE}, got {degree!r}")


def fit_steps(
    chosen: CalibrationRecord, held_out: CalibrationRecord, wanted: Mapping[str, Any]
) -> Fitted:
    """Fit the polynomial to steps, each of a sample counting alike (see `Calibrated`).

    Args:
        chosen: steps to fit to.
        held_out: others.
        wanted: `degree` and `signal`.

    Returns:
        Coefficients, with R^2 on both parts, and that of the identity on the held-out one.
    """
    x, y = chosen.values("input"), chosen.values("output")
    coefficients = fit_polynomial(x, y, wanted["degree"])
    other_x, other_y = held_out.values("input"), held_out.values("output")
    return Fitted(
        {"coefficients": coefficients, "signal": wanted["signal"]},
        {
            "pairs": len(x),
            "r2": explain_variance(coefficients, x, y),
            "pairs_held_out": len(other_x),
            "r2_held_out": explain_variance(coefficients, other_x, other_y),
            "r2_identity": explain_variance((1.0, 0.0), other_x, other_y),
        },
    )


def fit_polynomial(
    x: Float[Tensor, " k"], y: Float[Tensor, " k"], degree: int = DEGREE
) -> list[float]:
    """Return the polynomial of least squares, highest power first, with five coefficients.

    Args:
        x: where.
        y: values.
        degree: the highest power.

    Returns:
        The coefficients.

    Raises:
        DataError: there are too few places to tell.

    Example:
        >>> x = torch.linspace(0, 1, 9, dtype=torch.float64)
        >>> [round(c, 6) for c in fit_polynomial(x, 2 * x**2 + 1, 2)]
        [0.0, 0.0, 2.0, 0.0, 1.0]
    """
    places = len(x.unique())
    if places <= degree:
        raise DataError(
            f"steps moved by {places} different distances, and a polynomial of degree {degree} "
            f"needs {degree + 1}: give more or longer walks, or a lower degree="
        )
    scale = x.abs().max()
    powers = torch.arange(degree, -1, -1, dtype=torch.float64)
    table = (x / scale)[:, None] ** powers
    found = torch.linalg.lstsq(table, y[:, None], driver="gelsd").solution[:, 0] / scale**powers
    return [0.0] * (DEGREE - degree) + [float(value) for value in found]


def explain_variance(
    coefficients: Sequence[float], x: Float[Tensor, " k"], y: Float[Tensor, " k"]
) -> float | None:
    """Return R^2 of a polynomial whose negative values count as 0; None where nothing varies.

    Args:
        coefficients: highest power first.
        x: where.
        y: values.

    Example:
        >>> y = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        >>> explain_variance((1.0, 0.0), y, y), explain_variance((2.0,), y, y)
        (1.0, 0.0)
    """
    if len(y) == 0:
        return None
    value = torch.zeros_like(x)
    for coefficient in coefficients:
        value = value * x + coefficient
    total = float(((y - y.mean()) ** 2).sum())
    rest = float(((y - value.clamp(min=0.0)) ** 2).sum())
    return None if total == 0.0 else 1.0 - rest / total
