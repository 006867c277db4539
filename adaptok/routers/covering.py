"""Keep the cells that their neighbours do not predict, and some of every region."""

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.errors import ConfigError
from adaptok.routers.predictability import measure_surprise
from adaptok.routers.untrained import UntrainedRouter, check_number
from adaptok.tokens import Grid


class CoveringRouter(UntrainedRouter):
    """Ranks by surprise, and gives a share of the places to cells spread evenly over the grid.

    A large smooth region has no surprising cell; without any token of its own it is left to the
    update of a distant edge. Of any number of kept cells about `share` are spread evenly, the
    others are the most surprising ones. Only ranks, so that it needs a budget.

    Args:
        share: of the places, in [0, 1).
        falloff: how the weight of a neighbour falls with its distance, see
            `PredictabilityRouter`.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> from adaptok import Context, Tokens
        >>> x = torch.zeros(1, 64, 8)
        >>> x[0, :16] = torch.randn(16, 8)  # content in the first rows only
        >>> routing = CoveringRouter()(Tokens(x, grid=(8, 8)), Context())
        >>> best = routing.keep_prob[0].argsort(descending=True)[:16]
        >>> bool((best < 24).sum() >= 10), bool((best >= 24).any())
        (True, True)

    Paper: after DC-DiT, arXiv 2603.06351; the even cells are a sequence of Roberts (R_d).
    """

    needs_budget = True

    def __init__(self, share: float = 0.35, falloff: float = 2.0) -> None:
        super().__init__()
        check_number("share", share, 0)
        check_number("falloff", falloff, 0)
        if not share < 1:
            raise ConfigError(f"share is a fraction of the places below 1, got {share:g}")
        self.share = float(share)
        self.falloff = float(falloff)

    def find_keep_prob(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b n"]:
        """Return one minus each cell's place in the ranking, as a fraction of the cells."""
        surprise = measure_surprise(x, grid, self.falloff)
        place = place_of(-surprise).float() / (1.0 - self.share)
        if self.share > 0:
            even = place_of(order_evenly(grid, x.device)[None]).float() / self.share
            place = torch.minimum(place, even)
        n = x.shape[1]
        return 1.0 - (place_of(place).float() + 0.5) / n

    def extra_repr(self) -> str:
        """Name the options."""
        return f"share={self.share:g}, falloff={self.falloff:g}"


def place_of(key: Float[Tensor, "b n"]) -> Tensor:
    """Return each cell's place when keys are sorted upwards, ties by index, `(b n)`."""
    order = key.argsort(dim=1, stable=True)
    places = torch.arange(key.shape[1], device=key.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def order_evenly(grid: Grid, device: torch.device) -> Float[Tensor, " n"]:
    """Return a number for each cell; the cells below any number lie evenly over the grid.

    Args:
        grid: lengths of the grid axes, any number of them.
        device: where the numbers lie.

    Returns:
        Numbers in [0, 1), `(n)`: the fractional part of a sum of coordinates times powers of an
        irrational number, the root of `phi ** (axes + 1) = phi + 1`.

    Example:
        >>> even = order_evenly((4, 4), torch.device("cpu"))
        >>> (even < 0.25).view(4, 4).sum(0).tolist()  # one in each column
        [1, 1, 1, 1]
    """
    phi = 1.5
    for _ in range(60):
        phi = (1.0 + phi) ** (1.0 / (len(grid) + 1))
    total = torch.full((1,), 0.5, dtype=torch.float64, device=device)
    for axis, length in enumerate(grid, 1):
        step = torch.arange(length, dtype=torch.float64, device=device) * phi**-axis
        total = (total[:, None] + step).flatten()
    return (total - total.floor()).float()
