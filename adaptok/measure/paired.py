"""Whether one way to draw images is further from real ones than another, pair by pair."""

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.config import Config
from adaptok.errors import ShapeError
from adaptok.measure.distances import (
    LEAST_IMAGES,
    REAL_STREAM,
    RESAMPLES,
    SAMPLES_STREAM,
    Estimate,
    check_features,
    check_resampling,
    draw_halves,
    enclose,
    mean_across,
    mean_within,
    take_all,
)


class PairedDistances(Config):
    """Kernel distances of two sets of samples that were drawn from the same noise.

    Args:
        first: of the first set to the real images.
        second: of the second one.
        difference: second minus first; above 0 the second is further away.
        change: the difference as a fraction of the first distance.
        pairs: samples of each set.
        real: real images.
    """

    first: Estimate
    second: Estimate
    difference: Estimate
    change: Estimate
    pairs: int
    real: int

    def loses_less_than(self, share: float) -> bool:
        """Say whether the interval excludes that the second set loses more than a share.

        Args:
            share: of the first distance, such as 0.02.
        """
        return self.change.high <= share


def compare_pairs(
    first: Float[Tensor, "n d"],
    second: Float[Tensor, "n d"],
    real: Float[Tensor, "m d"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> PairedDistances:
    """Compare the kernel distances of two sets of samples whose rows belong together.

    Each resample takes the same random half of the pairs from both sets, and the same half of the
    real images, so that what makes a half hard is hard for both and leaves the difference.

    Args:
        first: features of the samples of one model or setting.
        second: those of another one; row i was drawn from the same noise and for the same label.
        real: features of the real images.
        seed: of the halves.
        resamples: halves, at least two.
        level: probability that an interval shall hold.

    Returns:
        Both distances and their difference, each with its interval.

    Raises:
        ShapeError: the sets are no pairs, widths differ, or there are fewer than four images.
        DtypeError: the features are no real floats.
        DataError: a feature is NaN or infinite.
        ConfigError: resamples or level are out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> real, drawn = (torch.randn(200, 8, generator=generator) for _ in range(2))
        >>> worse = compare_pairs(drawn, drawn + 0.5, real, resamples=200)
        >>> worse.difference.low > 0, worse.loses_less_than(0.02)
        (True, False)
    """
    if first.shape != second.shape:
        raise ShapeError(
            f"the sets have shapes {tuple(first.shape)} and {tuple(second.shape)}: give the same "
            "number of samples in the same order, drawn from the same noise"
        )
    check_resampling(resamples, resamples, level)
    one, y = check_features(first, real, least=LEAST_IMAGES)
    other, _ = check_features(second, real, least=LEAST_IMAGES)
    halves = draw_halves(len(one), resamples, (seed, SAMPLES_STREAM)).to(one.device)
    taken = torch.cat([take_all(one), halves])
    taken_y = torch.cat(
        [take_all(y), draw_halves(len(y), resamples, (seed, REAL_STREAM)).to(one.device)]
    )
    within_y = mean_within(y, taken_y)
    found = []
    for x in (one, other):
        kid = mean_within(x, taken) + within_y - 2 * mean_across(x, y, taken, taken_y)
        found.append(kid)
    a, b = found
    return PairedDistances(
        first=enclose_first(a, level),
        second=enclose_first(b, level),
        difference=enclose_first(b - a, level),
        change=enclose_first((b - a) / a, level),
        pairs=len(one),
        real=len(y),
    )


def enclose_first(values: Float[Tensor, " r"], level: float) -> Estimate:
    """Put the spread of the resamples around the figure of all images, which comes first."""
    return enclose(float(values[0]), values[1:].tolist(), level)
