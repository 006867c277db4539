"""Keep cells by chance: the floor that every other router has to beat."""

from hashlib import blake2b

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptok.errors import ConfigError
from adaptok.routers.untrained import UntrainedRouter
from adaptok.tokens import Grid

WORD = 0xFFFFFFFF
FACTOR = 0x45D9F3B  # below 2 ** 31, so that a product with 32 bits stays within 64


class RandomRouter(UntrainedRouter):
    """Ranks cells at random; it has no threshold.

    Args:
        seed: None draws new numbers in each call, for each sample its own, from torch's default
            generator of the device. A whole number gives each cell index one fixed number: the
            same ranking in each call, on each device, and for each sample, whatever its batch
            mates are.

    Raises:
        ConfigError: the seed is no whole number.

    Example:
        >>> from adaptok import Context, Tokens
        >>> tokens = Tokens(torch.zeros(2, 3, 8), grid=(1, 3))
        >>> RandomRouter(seed=0)(tokens, Context()).keep_prob
        tensor([[...],
                [...]])
    """

    needs_budget = True

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ConfigError(f"seed is a whole number or None, got {seed!r}")
        self.seed = seed
        self.key = 0 if seed is None else make_key(seed)

    def find_keep_prob(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b n"]:
        """Return the keep probability of each cell."""
        b, n, _ = x.shape
        if self.seed is None:
            return torch.rand(b, n, device=x.device, dtype=x.dtype)
        return scatter_cells(torch.arange(n, device=x.device), self.key).repeat(b, 1)

    def extra_repr(self) -> str:
        """Name the options."""
        return f"seed={self.seed}"


def make_key(seed: int) -> int:
    """Turn a whole number of any size into 32 bits that differ for near seeds."""
    return int.from_bytes(blake2b(str(seed).encode(), digest_size=4).digest())


def scatter_cells(cells: Int[Tensor, " n"], key: int) -> Float[Tensor, " n"]:
    """Give each cell a fixed number in [0, 1) that looks random.

    A hash by whole-number arithmetic, so that every device and a compiled graph agree.

    Args:
        cells: indices of cells, below 2 ** 32.
        key: 32 bits.

    Returns:
        The numbers, multiples of 2 ** -24.

    Example:
        >>> scatter_cells(torch.arange(3), make_key(0)) == scatter_cells(torch.arange(3), 7)
        tensor([False, False, False])
    """
    bits = cells ^ key
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * FACTOR) & WORD
    bits = bits ^ (bits >> 16)
    return (bits >> 8).float() / 2**24
