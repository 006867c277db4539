"""Fixed sine-cosine codes of grid cells."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adaptok.tokens import Grid

MAX_PERIOD = 10_000.0


def encode_coordinates(position: Float[Tensor, " n"], width: int) -> Float[Tensor, "n d"]:
    """Return sines, then cosines of positions at geometrically falling frequencies.

    Args:
        position: positions along one axis, in cells, `(n)`.
        width: features of the code, even.

    Returns:
        The code, float32, `(n d)`.
    """
    steps = torch.arange(width // 2, dtype=torch.float64, device=position.device)
    frequency = MAX_PERIOD ** (-steps / (width / 2))
    angle = position.double()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def encode_grid(
    grid: Grid, width: int, device: torch.device | str | None = None, cells: int = 1
) -> Float[Tensor, "n d"]:
    """Return the position codes of all cells of a two-dimensional grid.

    The first half of a code is of the column, the second of the row.

    Args:
        grid: `(h, w)`.
        width: features of a token, a multiple of 4.
        device: where to make them.
        cells: cells per step of the code. With the patch side of a fixed-patch model, the cells
            of a patch lie around the position of that patch.

    Returns:
        Codes, `(h * w, width)`.

    Example:
        >>> encode_grid((2, 3), 8).shape
        torch.Size([6, 8])

    Paper: Peebles and Xie, Scalable Diffusion Models with Transformers, 2023.
    """
    h, w = grid
    rows, columns = (
        (torch.arange(length, device=device).float() + 0.5) / cells - 0.5 for length in (h, w)
    )
    of_row = encode_coordinates(rows, width // 2)
    of_column = encode_coordinates(columns, width // 2)
    return torch.cat([of_column.repeat(h, 1), of_row.repeat_interleave(w, 0)], dim=1)


class CellCodes(nn.Module):
    """Looks up the position codes of kept cells; a wrap hears here which cells they are."""

    def forward(
        self, cells: Int[Tensor, "..."], grid: Grid, table: Float[Tensor, "n d"]
    ) -> Float[Tensor, "... d"]:
        """Return the codes of some cells.

        Args:
            cells: flat cells; all samples in one run `(t)`, or with as many each `(b m)`.
            grid: `(h, w)`.
            table: the codes of all cells of the grid.

        Returns:
            One code per cell.
        """
        return table.index_select(0, cells.flatten()).view(*cells.shape, -1)
