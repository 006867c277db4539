"""Schedules: how many blocks a sample runs at each amount of noise, as a table."""

import math
from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float, Int
from torch import Tensor

from adaptok.errors import ConfigError, HandOverError

Table = tuple[tuple[float, float], ...]

FULL: Table = ((0.0, 1.0),)
# ASE on 28 blocks: 28, 24, 20, 16 and 12 of them, a fifth of the steps each, clean images first.
ASE: Table = tuple((fifth / 5, (28 - 4 * fifth) / 28) for fifth in range(5))
PRESETS: dict[str, Table] = {"full": FULL, "ase": ASE}

LEAST = 2  # blocks that every sample runs
SLACK = 0.01  # by which a step may lie beyond the ends of its scale


def read_schedule(schedule: str | Sequence[Sequence[float]]) -> Table:
    """Return a schedule as a table, or raise a `ConfigError`.

    Args:
        schedule: the name of a preset, or pairs of the share of noise from which on a row holds,
            and the share of the blocks that run then. The first row begins at 0 (a clean image).

    Returns:
        The table.

    Raises:
        ConfigError: it is no such table; the message says what is wrong.

    Example:
        >>> read_schedule([(0, 1), (0.5, 0.5)])
        ((0.0, 1.0), (0.5, 0.5))
    """
    if isinstance(schedule, str):
        if schedule not in PRESETS:
            raise ConfigError(
                f"there is no schedule {schedule!r}: take {' or '.join(map(repr, PRESETS))}, or "
                "give pairs (share of noise, share of the blocks)"
            )
        return PRESETS[schedule]
    table = read_table(schedule, "share of the blocks")
    wrong = [share for _, share in table if not 0.0 < share <= 1.0]
    if wrong:
        raise ConfigError(f"a schedule runs a share of the blocks in (0, 1], got {wrong[0]:g}")
    return table


def read_table(rows: Sequence[Sequence[float]], meaning: str) -> Table:
    """Return pairs of a share of noise and a number as a table, or raise a `ConfigError`."""
    try:
        table = tuple((float(noise), float(value)) for noise, value in rows)
    except (TypeError, ValueError):
        raise ConfigError(
            f"pairs (share of noise, {meaning}) are needed, as in ((0.0, 1.0), (0.5, 0.6)), got "
            f"{rows!r:.80}"
        ) from None
    bounds = [noise for noise, _ in table]
    if not bounds or bounds[0] != 0.0:
        raise ConfigError(
            f"the first row holds from noise 0 (a clean image) on, got {bounds[:1] or 'no row'}"
        )
    rising = all(low < high for low, high in pairwise(bounds))
    if not rising or not all(0.0 <= bound < 1.0 for bound in bounds):
        raise ConfigError(
            f"the shares of noise rise from 0 and stay below 1 (pure noise), got {bounds}"
        )
    if not all(math.isfinite(value) for _, value in table):
        raise ConfigError(f"a {meaning} is a finite number, got {table}")
    return table


def measure_noise(
    timestep: Float[Tensor, " b"] | Int[Tensor, " b"], scale: tuple[float, float]
) -> list[float]:
    """Return how noisy each sample is, from 0 for a clean image to 1 for pure noise.

    Args:
        timestep: the step of each sample on the host's own scale.
        scale: the step of pure noise, and that of a clean image.

    Returns:
        One number per sample.

    Raises:
        HandOverError: a step does not lie on the scale.

    Example:
        >>> import torch
        >>> measure_noise(torch.tensor([0, 250, 1000]), (1000.0, 0.0))
        [0.0, 0.25, 1.0]
    """
    noisy, clean = scale
    shares = [(step - clean) / (noisy - clean) for step in timestep.double().tolist()]
    wrong = [place for place, share in enumerate(shares) if not -SLACK <= share <= 1.0 + SLACK]
    if wrong:
        raise HandOverError(
            f"the diffusion step {float(timestep[wrong[0]]):g} of sample {wrong[0]} does not lie "
            f"between {clean:g} (clean) and {noisy:g} (noise): give the host's own ends, as in "
            '{"name": "schedule", "scale": (noise, clean)}'
        )
    return [min(max(share, 0.0), 1.0) for share in shares]


def find_row(noise: float, table: Table) -> int:
    """Return the row of a table that holds at a share of noise.

    Example:
        >>> find_row(0.39, ASE), find_row(0.4, ASE), find_row(1.0, ASE)
        (1, 2, 4)
    """
    rows = [row for row, (bound, _) in enumerate(table) if bound <= noise + 1e-9]
    return rows[-1]


def count_blocks(share: float, blocks: int, least: int = LEAST) -> int:
    """Return how many of some blocks a share is, rounded half up.

    Args:
        share: share of the blocks.
        blocks: how many there are.
        least: how many run in any case.

    Example:
        >>> [count_blocks(share, 12) for _, share in ASE]
        [12, 10, 9, 7, 5]
    """
    return min(blocks, max(least, int(share * blocks + 0.5)))


def look_up(noise: Sequence[float], table: Table) -> list[float]:
    """Return what a table says at some shares of noise.

    Example:
        >>> look_up([0.1, 0.9], ((0.0, 1.0), (0.5, 2.0)))
        [1.0, 2.0]
    """
    return [table[find_row(share, table)][1] for share in noise]
