"""What the routers without weights have in common."""

import math
from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from adaptok.errors import ConfigError, ShapeError
from adaptok.routing import Context, Router, Routing
from adaptok.tokens import Grid, Tokens

EVEN = 1e-3  # deviation over the largest channel; below it the channels of a cell are equal
FLAT = 1e-3  # size of a standardised cell; below it, it equals the mean cell, but for rounding


class UntrainedRouter(Router):
    """Judges the cells of a grid by their features alone, in float32 and sample by sample.

    A subclass implements `find_keep_prob`.

    Example:
        >>> class FirstChannelRouter(UntrainedRouter):
        ...     def find_keep_prob(self, x, grid):
        ...         return x[..., 0].sigmoid()
        >>> router = FirstChannelRouter()
        >>> router(Tokens(torch.zeros(1, 6, 8), grid=(2, 3)), Context()).keep_prob[0, 0]
        tensor(0.5000)
    """

    compilable: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False  # True: probabilities only rank, there is no threshold

    def forward(self, tokens: Tokens, context: Context) -> Routing:
        """Judge the cells (see `Router.forward`)."""
        grid = self.read_grid(tokens)
        with torch.autocast(tokens.x.device.type, enabled=False):
            prob = self.find_keep_prob(tokens.x.float(), grid)
        return Routing(prob, threshold=None if self.needs_budget else 0.5)

    @abstractmethod
    def find_keep_prob(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b n"]:
        """Return the keep probability of each cell, from float32 features."""

    def read_grid(self, tokens: Tokens) -> Grid:
        """Return the grid, or raise a `ShapeError` unless there is one token per cell."""
        name = type(self).__name__
        if tokens.is_packed:
            raise ShapeError(f"{name} needs dense tokens (b n d), got packed ones: unpack them")
        if tokens.grid is None:
            raise ShapeError(f"{name} needs a grid, got tokens without one: give grid=(h, w)")
        for part in ("valid", "cells"):
            if getattr(tokens, part) is not None:
                raise ShapeError(
                    f"{name} needs one token for each grid cell, in order, got tokens with "
                    f"{part}: route before tokens are taken away or padded"
                )
        return tokens.grid


def standardise_cells(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Bring each cell to mean 0 and deviation 1, then take away the mean cell of the sample.

    The scale of a token says little, and what all tokens share (a few channels that are large
    everywhere) says nothing about where an image changes.

    Args:
        x: features of the cells.

    Returns:
        Features of about unit size, 0 where a cell is like the mean cell.

    Example:
        >>> standardise_cells(torch.tensor([[[1.0, 3.0], [20.0, 10.0]]]))
        tensor([[[-1.,  1.],
                 [ 1., -1.]]])
    """
    centred = x - x.mean(-1, keepdim=True)
    floor = EVEN * x.abs().amax(-1, keepdim=True)
    deviation = torch.maximum(root_mean_square(centred, (-1,)), floor)
    z = centred / deviation.clamp(min=torch.finfo(x.dtype).tiny)
    return z - z.mean(1, keepdim=True)


def find_directions(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d_plus_1"]:
    """Return unit vectors whose products are the cosines of standardised cells.

    One more channel is the same for all cells, so that what rounding leaves of cells that are all
    equal points one way.

    Args:
        x: features of the cells; they are standardised here.

    Returns:
        Vectors of length 1.

    Example:
        >>> unit = find_directions(torch.tensor([[[1.0, 3.0], [20.0, 10.0]]]))
        >>> (unit @ unit.mT)[0].round(decimals=2)
        tensor([[ 1., -1.],
                [-1.,  1.]])
    """
    z = standardise_cells(x)
    return F.normalize(F.pad(z, (0, 1), value=FLAT * x.shape[-1] ** 0.5), dim=-1)


def root_mean_square(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return the root mean square over some axes, which stay with length 1."""
    size = math.prod([x.shape[axis] for axis in axes])
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    root: Tensor = norm / size**0.5
    return root


def check_number(name: str, value: object, minimum: float) -> None:
    """Raise a `ConfigError` unless an option is a finite number of at least a minimum."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
        if minimum <= number < math.inf:
            return
    raise ConfigError(f"{name} is a finite number of at least {minimum:g}, got {value!r}")
