"""Where pruning happens: which blocks, by default at each quarter of those that there are."""

from collections.abc import Sequence

from adaptok.errors import ConfigError, StackError

QUARTERS = (1, 2, 3)
SHORT = 2  # blocks: a wrap is tried on a range that short, in which not all sites lie


def check_blocks(blocks: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return blocks as a tuple, or raise a `ConfigError` unless they are numbers that rise.

    Args:
        blocks: indices of blocks; None means that the depth decides.
    """
    if blocks is None:
        return None
    listed = tuple(blocks)
    whole = all(int(block) == block and block >= 0 for block in listed)
    if not listed or not whole or list(listed) != sorted(set(listed)):
        raise ConfigError(
            "blocks is one index or several that rise, as in blocks=(3, 6, 9), or None for a "
            f"quarter, a half and three quarters of the depth, got {blocks!r:.80}"
        )
    return listed


def choose_blocks(
    blocks: tuple[int, ...] | None, first: int, last: int, short: int = SHORT
) -> tuple[int, ...]:
    """Return the blocks of a range at which tokens go.

    Args:
        blocks: indices of blocks; None takes a quarter, a half and three quarters of the range.
        first: the first block of the range.
        last: the block behind the last one.
        short: ranges of up to so many blocks may hold some of the blocks only.

    Returns:
        Indices that rise.

    Raises:
        StackError: a block lies outside of the range.

    Example:
        >>> choose_blocks(None, 0, 12), choose_blocks((3, 6, 9), 3, 5)
        ((3, 6, 9), (3,))
    """
    if blocks is None:
        return tuple(sorted({first + (last - first) * part // 4 for part in QUARTERS}))
    inside = tuple(block for block in blocks if first <= block < last)
    if len(inside) < len(blocks) and last - first > short:
        outside = ", ".join(str(block) for block in blocks if block not in inside)
        raise StackError(
            f"tokens are to go at block {outside}, and the blocks here are {first} to "
            f"{last - 1}: give blocks= inside of them, or None for a quarter, a half and three "
            "quarters"
        )
    return inside
