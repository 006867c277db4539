"""Keep the cells with the largest features."""

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.errors import ConfigError
from adaptok.routers.untrained import UntrainedRouter
from adaptok.tokens import Grid


class NormRouter(UntrainedRouter):
    """Ranks cells by the length of their feature vector; it has no threshold.

    With s the length over the mean length in the sample, the keep probability is s / (1 + s).

    Args:
        smallest: rank the cells with the smallest features first. In many trained transformers
            the largest features are those of background cells that store something global.

    Raises:
        ConfigError: smallest is no boolean.

    Example:
        >>> from adaptok import Context, Tokens
        >>> x = torch.tensor([1.0, 3.0, 2.0]).reshape(1, 3, 1)
        >>> NormRouter()(Tokens(x, grid=(1, 3)), Context()).keep_prob
        tensor([[0.3333, 0.6000, 0.5000]])
    """

    needs_budget = True

    def __init__(self, smallest: bool = False) -> None:
        super().__init__()
        if not isinstance(smallest, bool):
            raise ConfigError(f"smallest is True or False, got {smallest!r}")
        self.smallest = smallest

    def find_keep_prob(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b n"]:
        """Return the keep probability of each cell."""
        norm = torch.linalg.vector_norm(x, dim=-1)
        mean = norm.mean(1, keepdim=True)
        share: Tensor = norm / (norm + mean).clamp(min=torch.finfo(norm.dtype).tiny)
        return 1 - share if self.smallest else share

    def extra_repr(self) -> str:
        """Name the options."""
        return f"smallest={self.smallest}"
