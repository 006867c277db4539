"""Scales: edges of patches, counted in patches of the host."""

from collections.abc import Sequence
from itertools import pairwise

from adaptok.errors import ConfigError, ShapeError
from adaptok.tokens import Grid

SCALES = (1, 2, 4)


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """Return scales as a tuple, or raise a `ConfigError` unless they are powers of two from 1.

    Args:
        scales: from fine to coarse, beginning with the host's own patch.

    Returns:
        The same.

    Raises:
        ConfigError: they are none.

    Example:
        >>> check_scales([1, 2, 4])
        (1, 2, 4)
    """
    found = tuple(scales)
    rising = all(first < second for first, second in pairwise(found))
    powers = all(type(scale) is int and scale > 0 and not scale & (scale - 1) for scale in found)
    if len(found) < 2 or found[0] != 1 or not rising or not powers:
        raise ConfigError(
            f"scales are powers of two from fine to coarse, such as (1, 2, 4), got {found}"
        )
    return found


def level_of(scale: int) -> int:
    """Return how often the edge of a patch is doubled until it has a scale."""
    return scale.bit_length() - 1


def split_grid(grid: Grid | None, name: str) -> tuple[int, int, int]:
    """Return frames, height and width of a grid.

    Args:
        grid: `(h, w)` or `(f, h, w)`.
        name: who wants it, for the message.

    Returns:
        Frames (1 for images), height, width.

    Raises:
        ShapeError: there is no grid, or it has another number of axes.
    """
    if grid is None or len(grid) not in (2, 3):
        raise ShapeError(f"{name} needs a grid (h, w) or (f, h, w), got {grid}")
    frames, h, w = (1, *grid)[-3:]
    return frames, h, w


def check_thresholds(thresholds: Sequence[float], scales: Sequence[int]) -> tuple[float, ...]:
    """Return thresholds as a tuple, or raise a `ConfigError` unless there is one a coarse scale."""
    found = tuple(float(value) for value in thresholds)
    if len(found) != len(scales) - 1 or any(value != value for value in found):
        raise ConfigError(
            f"thresholds are numbers of bits, one for each of the scales {tuple(scales[1:])}, from "
            f"fine to coarse, got {found}"
        )
    return found
