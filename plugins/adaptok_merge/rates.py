"""How many tokens merge at each block: a number, a list, or a schedule."""

from collections.abc import Sequence

from adaptok.errors import BudgetError, ConfigError

Rates = int | list[int | float] | tuple[int | float, ...]
USUAL = 8


def check_rates(r: object) -> int | list[int | float]:
    """Return what was given for `r`, a tuple as a list; it is the same after a trip through JSON.

    Args:
        r: a number for all blocks, a list with one for each, or `(r, inflect)` with a float.

    Returns:
        A whole number of at least 0, a list of those, or `[r, inflect]`.

    Raises:
        ConfigError: it is something else.

    Example:
        >>> check_rates((8, -1.0))
        [8, -1.0]
    """
    if isinstance(r, int) and is_count(r):
        return r
    if isinstance(r, list | tuple) and r and (is_schedule(r) or all(map(is_count, r))):
        return list(r)
    raise ConfigError(
        "r is a whole number of at least 0, a list with one for each block, or (r, inflect) with "
        f"inflect a float from -1.0 to 1.0; got {r!r:.80}"
    )


def is_count(value: object) -> bool:
    """Say whether a value is a whole number of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_schedule(r: Sequence[object]) -> bool:
    """Say whether a list is `(r, inflect)`: its second number is a float."""
    if len(r) != 2 or not is_count(r[0]):
        return False
    inflect = r[1]
    return isinstance(inflect, float) and -1.0 <= inflect <= 1.0


def list_rates(r: int | Sequence[int | float], steps: int) -> tuple[int, ...]:
    """Return how many tokens merge at each step.

    `(r, inflect)` goes in a straight line from `r (1 - inflect)` to `r (1 + inflect)`, rounded to
    whole numbers: -1.0 begins at 2 r and ends at 0.

    Args:
        r: what `check_rates` returned.
        steps: number of blocks.

    Returns:
        A number for each block.

    Raises:
        ConfigError: a list has another length.

    Example:
        >>> list_rates([8, -1.0], 5)
        (16, 12, 8, 4, 0)
    """
    if isinstance(r, int):
        return (r,) * steps
    if is_schedule(r):
        mean, inflect = r
        last = max(1, steps - 1)
        shares = [inflect * (2 * step / last - 1) if steps > 1 else 0.0 for step in range(steps)]
        return tuple(int(mean * (1 + share) + 0.5) for share in shares)
    if len(r) != steps:
        raise ConfigError(
            f"r as a list has one number for each block: {steps} are needed, got {len(r)} (a "
            "schedule (r, inflect) has a float as its second)"
        )
    return tuple(int(rate) for rate in r)


def limit_rate(r: int, m: int) -> int:
    """Return how many of `m` tokens merge in one round: `r`, or half of them.

    Args:
        r: how many are wanted.
        m: how many tokens there are.

    Example:
        >>> limit_rate(13, 196), limit_rate(13, 20)
        (13, 10)
    """
    return r if r <= m // 2 else m // 2  # noqa: FURB136 - lengths of a graph stay linear in r


def check_rate(r: int, n: int) -> None:
    """Raise a `BudgetError` if so many could not merge at any block.

    Args:
        r: how many are wanted.
        n: tokens of the grid.
    """
    if r > n:
        raise BudgetError(
            f"r={int(r)} is more than the {n} tokens of the grid: give at most {n // 2}, since one "
            "block merges at most half of its tokens"
        )


def count_left(rates: Sequence[int], n: int) -> int:
    """Return how many tokens are left behind the last step.

    Args:
        rates: how many are to merge at each step.
        n: tokens in front of the first.

    Example:
        >>> count_left((13,) * 12, 196)
        40
    """
    m = n
    for r in rates:
        m -= limit_rate(r, m)
    return m


def schedule_by_rates(rates: Sequence[int], n: int, final: int) -> tuple[int, ...]:
    """Return how many tokens are left behind each step, so that `final` are left in the end.

    Args:
        rates: what each step takes, in proportion; all 0 means all alike.
        n: tokens in front of the first step.
        final: tokens behind the last.

    Example:
        >>> schedule_by_rates((3, 0, 1), 12, 4)
        (6, 6, 4)
    """
    shares = rates if any(rates) else (1,) * len(rates)
    total, so_far, left = sum(shares), 0, []
    for share in shares:
        so_far += share
        left.append(n - (n - final) * so_far // total)
    return tuple(left)
