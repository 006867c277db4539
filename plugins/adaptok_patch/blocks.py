"""The nested square blocks of a grid, and the cell that stands for each of them.

Level 0 are the cells; a block of level l covers 2^l by 2^l cells, less where the border cuts it;
the last level is the whole grid. Of the representatives of the blocks inside it, the one nearest
to its centre stands for a block (the lower row, then the lower column, where two are as near).
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Int, Shaped
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BlockGrid:
    """What is the same for all pictures of a grid.

    Args:
        height: cells.
        width: cells.
        leaves_at: for each cell, the first level whose block another cell stands for, `(h w)`; of
            the one cell that stands for the whole grid, the number of levels plus one.
        order: the cells in the order in which they lose their token where nothing else decides:
            fine levels first, then those near their representative, then the higher index.
    """

    height: int
    width: int
    leaves_at: Int[Tensor, " n"]
    order: Int[Tensor, " n"]

    @property
    def levels(self) -> int:
        """How often blocks are doubled until one covers the grid."""
        return count_levels(self.height, self.width)


def count_levels(height: int, width: int) -> int:
    """Return how often cells are doubled until one block covers the grid."""
    return (max(height, width) - 1).bit_length()


def lay_blocks(height: int, width: int, device: torch.device | str = "cpu") -> BlockGrid:
    """Return the nested blocks of a grid.

    Args:
        height: cells.
        width: cells.
        device: where the tensors lie.

    Returns:
        The blocks.

    Example:
        >>> lay_blocks(4, 4).leaves_at.view(4, 4)
        tensor([[2, 1, 2, 1],
                [1, 1, 1, 1],
                [2, 1, 3, 1],
                [1, 1, 1, 1]])
    """
    levels = count_levels(height, width)
    rows = torch.tensor(axis_representatives(height, levels), device=device)
    columns = torch.tensor(axis_representatives(width, levels), device=device)
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    kept = (rows == y)[:, :, None] & (columns == x)[:, None]  # levels, h, w: still stands for one
    leaves_at = kept.sum(0)  # a cell stands for blocks up to some level, and for none above
    level = leaves_at.clamp(max=levels)
    up = rows[level, y[:, None]] - y[:, None]
    aside = columns[level, x] - x
    distance = up.square() + aside.square()
    n, far = height * width, height**2 + width**2
    index = torch.arange(n, device=device).view(height, width)
    key = (leaves_at * far + distance) * n + (n - 1 - index)
    return BlockGrid(height, width, leaves_at.flatten(), key.flatten().argsort())


def axis_representatives(length: int, levels: int) -> list[list[int]]:
    """Return for each level and each coordinate of an axis the one that stands for its block.

    Blocks are squares whose representatives lie on the crossings of rows and columns, so that
    nearest to the centre is nearest along each axis.

    Args:
        length: cells of the axis.
        levels: number of levels above the cells.

    Returns:
        `levels + 1` lists of `length` coordinates.

    Example:
        >>> axis_representatives(5, 3)
        [[0, 1, 2, 3, 4], [0, 0, 2, 2, 4], [2, 2, 2, 2, 4], [2, 2, 2, 2, 2]]
    """
    current = list(range(length))
    found = [current]
    for level in range(1, levels + 1):
        edge = 1 << level
        chosen = []
        for first in range(0, length, edge):
            last = min(first + edge, length) - 1
            candidates = sorted(set(current[first : last + 1]))
            nearest = min(candidates, key=lambda place: abs(2 * place - first - last))
            chosen += [nearest] * (last - first + 1)
        current = chosen
        found.append(current)
    return found


def gather_children(
    values: Shaped[Tensor, "b h w"], outside: float
) -> Shaped[Tensor, "b h2 w2 four"]:
    """Return the four parts of each block of the next level; `outside` where there is no cell."""
    _, h, w = values.shape
    padded = torch.nn.functional.pad(values, (0, w % 2, 0, h % 2), value=outside)
    return rearrange(padded, "b (h p) (w q) -> b h w (p q)", p=2, q=2)


def widen(
    values: Shaped[Tensor, "b h w"], level: int, grid: BlockGrid
) -> Shaped[Tensor, "b h2 w2"]:
    """Give each cell the value of its block.

    Args:
        values: one per block of a level.
        level: which one.
        grid: the blocks.

    Returns:
        One value per cell.
    """
    wide = values.repeat_interleave(1 << level, 1).repeat_interleave(1 << level, 2)
    return wide[:, : grid.height, : grid.width]
