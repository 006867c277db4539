"""Bootstrap intervals over test pictures."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ROUNDS = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and where it lies when pictures are drawn again.

    Args:
        mean: of the pictures at hand.
        low: 2.5 % of the means of drawn sets lie below.
        high: 2.5 % of them lie above.
    """

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Float[Tensor, " n"], seed: int, rounds: int = ROUNDS) -> Interval:
    """Draw pictures with replacement and look how far their mean wanders.

    Args:
        values: one number per picture.
        seed: seed of the draws.
        rounds: number of draws.

    Returns:
        Mean and 95 % percentile interval.

    Raises:
        ValueError: there are no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value, got none")
    values = values.double()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (rounds, n), generator=generator)
    means = values[draws].mean(1)
    edges = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return Interval(float(values.mean()), float(edges[0]), float(edges[1]))


def bootstrap_difference(
    first: Float[Tensor, " n"], second: Float[Tensor, " n"], seed: int, rounds: int = ROUNDS
) -> Interval:
    """Compare two methods on the same pictures.

    The pictures are drawn, not the answers: both methods are judged on each draw, so that what
    makes a picture hard for both cancels.

    Args:
        first: one number per picture.
        second: the same of another method.
        seed: seed of the draws.
        rounds: number of draws.

    Returns:
        Mean of first minus second, and its interval.

    Raises:
        ValueError: the methods were not measured on equally many pictures.
    """
    if len(first) != len(second):
        raise ValueError(
            f"a paired interval needs the same pictures twice, got {len(first)} and {len(second)}"
        )
    return bootstrap_mean(first.double() - second.double(), seed, rounds)
