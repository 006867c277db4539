"""Keep the cells that have few look-alikes."""

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.routers.untrained import UntrainedRouter, check_number, find_directions
from adaptok.tokens import Grid

LOWEST_TEMPERATURE = 1e-3  # cosines are exact to about 1e-7
ROWS = 1024  # similarities of so many cells to all others are held at once


class EntropyRouter(UntrainedRouter):
    """Gives each cell one over the number of cells that look like it, itself included.

    A cell spreads its attention over all cells of its sample, by softmax(cos / temperature);
    with H the entropy of that, exp(H) is the effective number of its look-alikes, and exp(-H)
    the keep probability: k equal cells that differ from all others get 1/k each, so that the
    probabilities of a sample add up to the number of different things in it. The threshold of 0.5
    keeps the cells with fewer than two look-alikes. The entropy of a token's own channels
    would be cheaper, but says how peaked the features are, not whether another token has them.

    Unlike the other routers it looks beyond the neighbours, and its time grows with n squared.

    Args:
        temperature: cosine distance at which two cells begin to count as different.

    Raises:
        ConfigError: the temperature is no finite number of at least 0.001.

    Example:
        >>> from adaptok import Context, Tokens
        >>> x = torch.eye(3)[[0, 0, 0, 1, 1, 2]][None]
        >>> router = EntropyRouter(temperature=0.05)
        >>> [round(p, 3) for p in router(Tokens(x, grid=(2, 3)), Context()).keep_prob[0].tolist()]
        [0.333, 0.333, 0.333, 0.5, 0.5, 1.0]
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        check_number("temperature", temperature, LOWEST_TEMPERATURE)
        self.temperature = float(temperature)

    def find_keep_prob(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b n"]:
        """Return the keep probability of each cell."""
        return (-measure_entropy(find_directions(x), self.temperature)).exp()

    def extra_repr(self) -> str:
        """Name the options."""
        return f"temperature={self.temperature:g}"


def measure_entropy(unit: Float[Tensor, "b n d"], temperature: float) -> Float[Tensor, "b n"]:
    """Return the entropy of each cell's similarity to all cells of its sample.

    Args:
        unit: directions of the cells, of length 1.
        temperature: what cosines are divided by in front of the softmax.

    Returns:
        Entropies in nats: 0 for a cell like no other, log(n) where all cells are alike.

    Example:
        >>> measure_entropy(torch.ones(1, 4, 1), 0.1).exp().round(decimals=3)
        tensor([[4., 4., 4., 4.]])
    """
    parts = []
    for rows in unit.split(ROWS, dim=1):
        log_share = (rows @ unit.mT / temperature).log_softmax(-1)
        parts.append(-(log_share.exp() * log_share).sum(-1))
    return torch.cat(parts, dim=1)
