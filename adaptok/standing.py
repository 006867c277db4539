"""Where the tokens of a host that shortens its own sequence stand in the image."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptok.routing import Routing
from adaptok.tokens import Grid

FindNearest = Callable[[Bool[Tensor, "b n"], Grid], Int[Tensor, "b n"]]


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """Which cells of the image the tokens of a call are, where the host chose them itself.

    Such a host chooses anew in each step, so token 5 of one step is another cell than token 5 of
    the next. A stage that keeps something between steps spreads it to the cells, and takes it back
    for the tokens that there are then.

    Args:
        cells: flat cell of each token, `(b m)`.
        grid: lengths of the axes of the image's grid, of `n` cells.
        nearest: finds the nearest kept cell of every cell.
        routing: what the host's own router said of all cells, where it has one.

    Example:
        >>> def nearest(mask, grid):  # of a line whose first cell alone is kept
        ...     return torch.zeros_like(mask, dtype=torch.long)
        >>> standing = Standing(torch.tensor([[0]]), (1, 3), nearest)
        >>> standing.spread(torch.tensor([[[7.0]]]))[0, :, 0]
        tensor([7., 7., 7.])
    """

    cells: Int[Tensor, "b m"]
    grid: Grid
    nearest: FindNearest
    routing: Routing | None = None

    @property
    def num_cells(self) -> int:
        """How many cells the image has."""
        return math.prod(self.grid)

    @property
    def keep_mask(self) -> Bool[Tensor, "b n"]:
        """Which cells are tokens."""
        b = self.cells.shape[0]
        mask = torch.zeros(b, self.num_cells, dtype=torch.bool, device=self.cells.device)
        return mask.scatter(1, self.cells, torch.ones_like(self.cells, dtype=torch.bool))

    def find_owners(self) -> Int[Tensor, "b n"]:
        """Return which token stands for each cell: the one that stands nearest."""
        b, m = self.cells.shape
        rank = torch.zeros(b, self.num_cells, dtype=torch.long, device=self.cells.device)
        tokens = torch.arange(m, device=self.cells.device).expand(b, m)
        rank = rank.scatter(1, self.cells, tokens)
        return rank.gather(1, self.nearest(self.keep_mask, self.grid))

    def spread(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b n d"]:
        """Give every cell what the token has that stands for it.

        Args:
            x: one row per token.
        """
        return x.gather(1, self.find_owners()[..., None].expand(-1, -1, x.shape[2]))

    def gather(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """Return the rows of the cells that are tokens now.

        Args:
            x: one row per cell.
        """
        return x.gather(1, self.cells[..., None].expand(-1, -1, x.shape[2]))

    def select(self, samples: Int[Tensor, " s"]) -> "Standing":
        """Return the places of some samples.

        Args:
            samples: which samples of the batch.
        """
        routing = None if self.routing is None else self.routing.select(samples)
        return replace(self, cells=self.cells.index_select(0, samples), routing=routing)
