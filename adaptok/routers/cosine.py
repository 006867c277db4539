"""Keep the cells that point another way than their neighbours."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from adaptok.errors import ConfigError
from adaptok.routers.neighbours import mean_of_neighbours
from adaptok.routers.untrained import UntrainedRouter, check_number, find_directions
from adaptok.tokens import Grid


class CosineRouter(UntrainedRouter):
    """Gives each cell (1 - cos) / 2, with cos its mean cosine similarity to its neighbours.

    H-Net's boundary probability on a grid, without its learned projections. The threshold of 0.5
    keeps the cells that point away from their neighbours.

    Args:
        centre: standardise cells and take away the sample's mean first. Features of trained
            transformers share a large component, beside which all cells look alike; False
            compares the features as they are.
        falloff: a neighbour at the distance r weighs r ** -falloff; 0 weighs all alike.

    Raises:
        ConfigError: centre is no boolean, or falloff no finite number of at least 0.

    Example:
        >>> import torch
        >>> from adaptok import Context, Tokens
        >>> x = torch.tensor([[1.0, 0], [1, 0], [0, 1]])[None]
        >>> CosineRouter(centre=False)(Tokens(x, grid=(1, 3)), Context()).keep_prob
        tensor([[0.0000, 0.2500, 0.5000]])

    Paper: after H-Net, arXiv 2507.07955.
    """

    def __init__(self, centre: bool = True, falloff: float = 2.0) -> None:
        super().__init__()
        if not isinstance(centre, bool):
            raise ConfigError(f"centre is True or False, got {centre!r}")
        check_number("falloff", falloff, 0)
        self.centre = centre
        self.falloff = float(falloff)

    def find_keep_prob(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b n"]:
        """Return the keep probability of each cell."""
        unit = find_directions(x) if self.centre else F.normalize(x, dim=-1)
        similarity = (unit * mean_of_neighbours(unit, grid, self.falloff)).sum(-1)
        return ((1 - similarity) / 2).clamp(0, 1)

    def extra_repr(self) -> str:
        """Name the options."""
        return f"centre={self.centre}, falloff={self.falloff:g}"
