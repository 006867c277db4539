"""Keep the cells that their neighbours do not predict."""

from jaxtyping import Float
from torch import Tensor

from adaptok.routers.neighbours import mean_of_neighbours
from adaptok.routers.untrained import (
    FLAT,
    UntrainedRouter,
    check_number,
    root_mean_square,
    standardise_cells,
)
from adaptok.tokens import Grid


class PredictabilityRouter(UntrainedRouter):
    """Scores what the mean of its neighbours misses of a cell: DC-DiT's idea without weights.

    With s the score of `measure_surprise`, the keep probability is s / (1 + s). The threshold of
    0.5 keeps the cells whose neighbours predict them worse than the sample's mean predicts a
    cell of that sample.

    Args:
        falloff: a neighbour at the distance r weighs r ** -falloff; 0 weighs all alike.

    Raises:
        ConfigError: falloff is no finite number of at least 0.

    Example:
        >>> import torch
        >>> from adaptok import Context, Tokens
        >>> x = torch.ones(1, 12, 4).cumsum(2)
        >>> x[0, 5] *= -1
        >>> routing = PredictabilityRouter()(Tokens(x, grid=(3, 4)), Context())
        >>> routing.natural_mask.nonzero().tolist()
        [[0, 5]]

    Paper: after DC-DiT, arXiv 2603.06351.
    """

    def __init__(self, falloff: float = 2.0) -> None:
        super().__init__()
        check_number("falloff", falloff, 0)
        self.falloff = float(falloff)

    def find_keep_prob(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b n"]:
        """Return the keep probability of each cell."""
        surprise = measure_surprise(x, grid, self.falloff)
        return surprise / (1 + surprise)

    def extra_repr(self) -> str:
        """Name the options."""
        return f"falloff={self.falloff:g}"


def measure_surprise(
    x: Float[Tensor, "b n d"], grid: Grid, falloff: float = 2.0
) -> Float[Tensor, "b n"]:
    """Return how badly the neighbours predict each cell.

    Args:
        x: features of the cells; they are standardised here.
        grid: lengths of the grid axes.
        falloff: how the weight of a neighbour falls with its distance.

    Returns:
        The size of the residual over the typical size of a cell of its sample (both after the
        sample's mean is taken away): 0 for a cell that equals the mean of its neighbours, about
        1 where neighbours tell nothing.

    Example:
        >>> import torch
        >>> measure_surprise(torch.ones(1, 6, 4), (2, 3)).tolist()
        [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    """
    z = standardise_cells(x)
    residual = root_mean_square(z - mean_of_neighbours(z, grid, falloff), (-1,)).squeeze(-1)
    spread = root_mean_square(z, (1, 2)).squeeze(-1)
    return residual / spread.clamp(min=FLAT)
