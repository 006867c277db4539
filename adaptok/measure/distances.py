"""How far one set of images is from another, by the features of an extractor, with intervals.

Two distances: the squared maximum mean discrepancy with a cubic kernel (KID), which is unbiased,
and the Frechet distance of two Gaussians, whose bias grows as the sets get smaller. Both are named
after the extractor; `adaptok.measure.extractors` has one.

Spread comes from random halves of the images, drawn without replacement. The usual bootstrap draws
an image several times: the kernel of an image with itself then counts as one of a pair, which
shifts KID upwards, and covariances lose rank. A half holds each image once, so that KID stays
unbiased on it; the variance of a mean over half of n images around the mean of all is that of a
mean over n, so that no factor is needed. Where two distributions are the same the leading term of
KID vanishes and the interval is too wide (at most 1.7 times), never too narrow.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from adaptok.config import Config
from adaptok.errors import ConfigError, DataError, DtypeError, ShapeError

Progress = Callable[[int, int], None]
RESAMPLES = 1000
FRECHET_RESAMPLES = 50  # each one takes about a second for 1,280 features
FLOOR_SPLITS = 10
LEAST_IMAGES = 4  # halves of two images each
KERNEL_ELEMENTS = 2**24  # of a block of the kernel matrix: 134 MB
WEIGHT_ROWS = 250  # resamples that are weighed at once
SAMPLES_STREAM, REAL_STREAM, SPLIT_STREAM = range(3)


class Estimate(Config):
    """A figure with its interval.

    Args:
        value: the figure for all images.
        low: lower end.
        high: upper end.
        resamples: random halves that gave the interval.
    """

    value: float
    low: float
    high: float
    resamples: int

    def __str__(self) -> str:
        return f"{show(self.value)} ({show(self.low)} to {show(self.high)})"


class Distances(Config):
    """Distances of one set of images to another.

    Args:
        kid: squared maximum mean discrepancy with the cubic kernel.
        frechet: Frechet distance.
        left: images of the first set.
        right: images of the second set.
    """

    kid: Estimate
    frechet: Estimate
    left: int
    right: int


def show(value: float) -> str:
    """Write a distance: four decimals below 10, one above."""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x.y / d + 1)^3.

    Equal distributions give values around 0, of either sign.

    Args:
        x: features of the first images, at least two.
        y: features of the second images, at least two.

    Returns:
        The distance, computed in float64; known as KID on the features of an extractor.

    Raises:
        ShapeError: no two axes, different widths, or fewer than two images.
        DtypeError: the features are no real floats.
        DataError: a feature is NaN or infinite.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> kernel_distance(x, x + 1)  # 1 + 27 - 2 * (1 + 1 + 8 + 27) / 4, by pairs
        9.5

    Paper: https://arxiv.org/abs/1801.01401
    """
    x, y = check_features(x, y, least=2)
    all_x, all_y = take_all(x), take_all(y)
    within_x = mean_within(x, all_x)
    within_y = mean_within(y, all_y)
    return float(within_x + within_y - 2 * mean_across(x, y, all_x, all_y))


def frechet_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Return the Frechet distance of the Gaussians with the means and covariances of two sets.

    It is |mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)). With few images it is too
    large: compare it only between sets of the same sizes.

    Args:
        x: features of the first images, at least two.
        y: features of the second images, at least two.

    Returns:
        The distance, computed in float64, with covariances by n - 1.

    Raises:
        ShapeError: no two axes, different widths, or fewer than two images.
        DtypeError: the features are no real floats.
        DataError: a feature is NaN or infinite.

    Example:
        >>> x = torch.tensor([[-1.0], [0.0], [1.0]])  # variance 1; that of 3 x is 9
        >>> round(frechet_distance(x, 3 * x + 2), 6)  # 2^2 + (3 - 1)^2
        8.0

    Paper: https://arxiv.org/abs/1706.08500
    """
    x, y = check_features(x, y, least=2)
    centred_x, centred_y = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    shift = (x.mean(0) - y.mean(0)).square().sum()
    traces = centred_x.square().sum() + centred_y.square().sum()
    # With C = R^T R the eigenvalues of C_x C_y are those of the symmetric P P^T, P = R_x R_y^T.
    product = reduce_rows(centred_x) @ reduce_rows(centred_y).T
    symmetric = product @ product.T if len(product) <= product.shape[1] else product.T @ product
    root = torch.linalg.eigvalsh(symmetric).clamp(min=0).sqrt().sum()
    return max(0.0, float(shift + traces - 2 * root))


def compare_features(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    frechet_resamples: int = FRECHET_RESAMPLES,
    level: float = 0.95,
    progress: Progress | None = None,
) -> Distances:
    """Measure both distances with intervals from random halves of the images.

    A seed draws the same halves of `y` whatever `x` is, so that two models compared with the same
    real images meet the same of them.

    Args:
        x: features of the samples, at least four.
        y: features of the real images, at least four.
        seed: of the halves.
        resamples: halves for KID, at least two.
        frechet_resamples: how many of them serve the Frechet distance, at least two.
        level: probability that the interval shall hold.
        progress: called with the number of steps done and their total.

    Returns:
        The distances. The interval of the Frechet distance holds its spread only: the halves are
        smaller and thus further apart, so their distances are centred on the estimate.

    Raises:
        ShapeError: no two axes, different widths, or fewer than four images.
        DtypeError: the features are no real floats.
        DataError: a feature is NaN or infinite.
        ConfigError: a number of resamples or the level is out of range.

    Example:
        >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        >>> found = compare_features(x, x.flip(1) + 1, frechet_resamples=20)
        >>> 0 < found.kid.low < found.kid.value < found.kid.high
        True
    """
    x, y = check_features(x, y, least=LEAST_IMAGES)
    check_resampling(resamples, frechet_resamples, level)
    count = max(resamples, frechet_resamples)
    halves_x = draw_halves(len(x), count, (seed, SAMPLES_STREAM)).to(x.device)
    halves_y = draw_halves(len(y), count, (seed, REAL_STREAM)).to(x.device)
    total = frechet_resamples + 2
    note = progress or ignore_progress
    note(0, total)
    take_x = torch.cat([take_all(x), halves_x[:resamples]])
    take_y = torch.cat([take_all(y), halves_y[:resamples]])
    kid = mean_within(x, take_x) + mean_within(y, take_y) - 2 * mean_across(x, y, take_x, take_y)
    note(1, total)
    whole = frechet_distance(x, y)
    note(2, total)
    spread = []
    for place in range(frechet_resamples):
        spread.append(frechet_distance(x[halves_x[place]], y[halves_y[place]]))
        note(3 + place, total)
    return Distances(
        kid=enclose(float(kid[0]), kid[1:].tolist(), level),
        frechet=enclose(whole, spread, level, least=0),
        left=len(x),
        right=len(y),
    )


def measure_floor(
    y: Float[Tensor, "m d"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    frechet_resamples: int = FLOOR_SPLITS,
    level: float = 0.95,
    progress: Progress | None = None,
) -> Distances:
    """Measure how far one half of the real images is from the other: what no model undercuts.

    Args:
        y: features of the real images, at least four.
        seed: of the splits.
        resamples: random splits for KID, at least two.
        frechet_resamples: splits for the Frechet distance, at least two.
        level: share of the splits that lie between the ends.
        progress: called with the number of steps done and their total.

    Returns:
        Medians over the splits, and the range that holds `level` of them. The halves hold half
        as many images as the whole, which makes both wider and the Frechet distance larger.

    Raises:
        ShapeError: no two axes, or fewer than four images.
        DtypeError: the features are no real floats.
        DataError: a feature is NaN or infinite.
        ConfigError: a number of resamples or the level is out of range.

    Example:
        >>> y = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
        >>> floor = measure_floor(y)
        >>> floor.kid.low < 0 < floor.kid.high, (floor.left, floor.right)
        (True, (30, 30))
    """
    y, _ = check_features(y, y, least=LEAST_IMAGES)
    check_resampling(resamples, frechet_resamples, level)
    count = max(resamples, frechet_resamples)
    first = draw_halves(len(y), count, (seed, SPLIT_STREAM)).to(y.device)
    note = progress or ignore_progress
    note(0, frechet_resamples + 1)
    within = mean_within(y, torch.cat([first[:resamples], ~first[:resamples]]))
    across = mean_across(y, y, first[:resamples], ~first[:resamples])
    kid = within[:resamples] + within[resamples:] - 2 * across
    note(1, frechet_resamples + 1)
    frechet = []
    for place in range(frechet_resamples):
        frechet.append(frechet_distance(y[first[place]], y[~first[place]]))
        note(2 + place, frechet_resamples + 1)
    return Distances(
        kid=summarise(kid.tolist(), level),
        frechet=summarise(frechet, level),
        left=len(y) // 2,
        right=len(y) - len(y) // 2,
    )


def mean_within(x: Float[Tensor, "n d"], taken: Bool[Tensor, "r n"]) -> Float[Tensor, " r"]:
    """Return the mean kernel over all pairs of different images that a resample takes."""
    own = (x.square().mean(1) + 1) ** 3
    counts = taken.sum(1)
    return (sum_kernel(x, x, taken, taken) - taken.double() @ own) / (counts * (counts - 1))


def mean_across(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    taken_x: Bool[Tensor, "r n"],
    taken_y: Bool[Tensor, "r m"],
) -> Float[Tensor, " r"]:
    """Return the mean kernel over all pairs of one taken image of each set."""
    return sum_kernel(x, y, taken_x, taken_y) / (taken_x.sum(1) * taken_y.sum(1))


def sum_kernel(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "m d"],
    taken_x: Bool[Tensor, "r n"],
    taken_y: Bool[Tensor, "r m"],
) -> Float[Tensor, " r"]:
    """Add up the kernel over the pairs of each resample; the matrix exists in blocks of rows."""
    total = x.new_zeros(len(taken_x))
    rows = max(1, KERNEL_ELEMENTS // len(y))
    for start in range(0, len(x), rows):
        block = (x[start : start + rows] @ y.T / x.shape[1] + 1) ** 3
        for first in range(0, len(taken_x), WEIGHT_ROWS):
            part = slice(first, first + WEIGHT_ROWS)
            sums = taken_y[part].double() @ block.T
            total[part] += (sums * taken_x[part, start : start + rows]).sum(1)
    return total


def reduce_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "k d"]:
    """Return a matrix of at most d rows with the same x^T x."""
    if len(x) <= x.shape[1]:
        return x
    upper: Tensor = torch.linalg.qr(x, mode="r").R
    return upper


def take_all(x: Float[Tensor, "n d"]) -> Bool[Tensor, "1 n"]:
    """Return one resample that takes every image."""
    return torch.ones(1, len(x), dtype=torch.bool, device=x.device)


def draw_halves(n: int, count: int, seed: Sequence[int]) -> Bool[Tensor, "count n"]:
    """Draw random halves of n images, without replacement.

    Args:
        n: images.
        count: halves; the first ones are the same whatever the count.
        seed: whole numbers from 0.

    Returns:
        True for the `n // 2` images of each half.

    Example:
        >>> draw_halves(7, 3, (0, 1)).sum(1)
        tensor([3, 3, 3])
    """
    generator = np.random.default_rng(tuple(seed))
    taken = np.zeros((count, n), dtype=bool)
    for row in taken:
        row[generator.permutation(n)[: n // 2]] = True
    return torch.from_numpy(taken)


def ignore_progress(done: int, total: int) -> None:
    """Show nothing."""


def enclose(
    value: float, resampled: Sequence[float], level: float, *, least: float = -math.inf
) -> Estimate:
    """Put the spread of resamples around a figure, whatever their mean is."""
    spread = np.asarray(resampled) - np.mean(resampled)
    low, high = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(
        value=value,
        low=max(least, value + float(low)),
        high=value + float(high),
        resamples=len(resampled),
    )


def summarise(values: Sequence[float], level: float) -> Estimate:
    """Return the median of some figures and the range that holds most of them."""
    low, middle, high = np.quantile(values, [(1 - level) / 2, 0.5, (1 + level) / 2])
    return Estimate(value=float(middle), low=float(low), high=float(high), resamples=len(values))


def check_resampling(resamples: int, frechet_resamples: int, level: float) -> None:
    """Raise a `ConfigError` unless an interval can be made of so many resamples."""
    if min(resamples, frechet_resamples) < 2:
        raise ConfigError(
            f"an interval needs at least 2 resamples, got {resamples} for KID and "
            f"{frechet_resamples} for the Frechet distance: give more"
        )
    if not 0 < level < 1:
        raise ConfigError(f"the level of an interval lies between 0 and 1, got {level}")


def check_features(
    x: Tensor, y: Tensor, *, least: int
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Return both sets of features in float64, or raise what is wrong with them."""
    for name, z in (("first", x), ("second", y)):
        if z.ndim != 2 or z.shape[1] == 0:
            raise ShapeError(
                f"the {name} features have shape {tuple(z.shape)}: give (images, features)"
            )
        if not z.is_floating_point():
            raise DtypeError(f"the {name} features are of {z.dtype}: give floats")
        if len(z) < least:
            raise ShapeError(f"the {name} features are of {len(z)} images: give at least {least}")
        finite = z.isfinite().all(1)
        if not bool(finite.all()):
            place = int((~finite).nonzero()[0])
            raise DataError(
                f"the {name} features hold NaN or infinity, first in row {place}: leave such "
                "images out, or mend the extractor"
            )
    if x.shape[1] != y.shape[1]:
        raise ShapeError(
            f"the features have widths {x.shape[1]} and {y.shape[1]}: take one extractor for both"
        )
    return x.detach().double(), y.detach().double()
