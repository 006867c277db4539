"""Where exits are: in front of which blocks, by default at a half and three quarters."""

from collections.abc import Sequence

from adaptok.errors import ConfigError, StackError

QUARTERS = (2, 3)
SHORT = 2  # blocks: a wrap is tried on a range that short, in which not all exits lie


def check_blocks(blocks: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return blocks as a tuple, or raise a `ConfigError` unless they are numbers that rise.

    Args:
        blocks: indices of blocks; None means that the span decides.
    """
    if blocks is None:
        return None
    listed = tuple(blocks)
    whole = all(type(block) is int and block >= 1 for block in listed)
    if not listed or not whole or list(listed) != sorted(set(listed)):
        raise ConfigError(
            "blocks is one index or several that rise, each at least 1, as in blocks=(6, 9), or "
            f"None for a half and three quarters of the span, got {blocks!r:.80}"
        )
    return listed


def find_places(
    blocks: tuple[int, ...] | None, first: int, last: int, short: int = SHORT
) -> tuple[tuple[int, int], ...]:
    """Return the exits of a range of blocks.

    Args:
        blocks: the blocks in front of which samples may leave; None takes a half and three
            quarters of the range.
        first: the first block of the range.
        last: the block behind the last one.
        short: ranges of up to so many blocks may hold some of the exits only.

    Returns:
        Pairs of the number of an exit and its block, in order.

    Raises:
        StackError: an exit lies outside of the range.

    Example:
        >>> find_places(None, 0, 12), find_places((3, 6), 5, 7)
        (((0, 6), (1, 9)), ((1, 6),))
    """
    if blocks is None:
        found: dict[int, int] = {}
        for number, quarters in enumerate(QUARTERS):
            found.setdefault(first + (last - first) * quarters // 4, number)
        return tuple((number, block) for block, number in found.items() if first < block < last)
    inside = tuple((n, block) for n, block in enumerate(blocks) if first < block < last)
    if len(inside) < len(blocks) and last - first > short:
        outside = [block for block in blocks if not first < block < last]
        raise StackError(
            f"samples are to leave in front of block {', '.join(map(str, outside))}, and the "
            f"blocks here are {first} to {last - 1}: give blocks= between {first + 1} and "
            f"{last - 1}, or None for a half and three quarters"
        )
    return inside
