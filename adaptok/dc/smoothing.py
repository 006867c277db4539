"""Gaussian smoothing over kept cells, as a blur of a sparse grid, one axis after the other."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptok.tokens import Grid

# A kept cell with the least weight, 1e-4, beside confident ones: what lies beyond 8 sigma
# weighs exp(-32) and cannot be seen in float32, what lies beyond 6 sigma can.
WINDOW_IN_SIGMAS = 8
NORMALISER = 1e-8
LEAST_BLOCK = 64  # smaller products cost more in calls than they save in work
LEAST_PROB = 1e-4
PIECES = 4  # of a batch that is blurred in place


def smooth_kept(
    h: Float[Tensor, "t d"],
    prob: Float[Tensor, " t"],
    rows: Int[Tensor, " t"],
    b: int,
    grid: Grid,
    sigma: float,
) -> Float[Tensor, "t d"]:
    """Smooth the kept tokens of each sample with a Gaussian weighted by keep probability.

    `h_smooth_i = sum_j W_ij h_j / (sum_j W_ij + 1e-8)` with
    `W_ij = exp(-|u_i - u_j|^2 / (2 sigma^2)) p_j` over the kept cells `u` of one sample, and
    the result is `p_i h_i + (1 - p_i) h_smooth_i`, p clamped to `[1e-4, 1 - 1e-4]`.

    Args:
        h: features of the kept tokens of all samples, float32, `(t d)`.
        prob: their keep probabilities, float32, `(t)`.
        rows: their places among all cells of the batch, `(t)`.
        b: number of samples.
        grid: lengths of the grid axes.
        sigma: width of the Gaussian in cells.

    Returns:
        Smoothed features, `(t d)`.

    Example:
        >>> h, prob = torch.tensor([[1.0], [3.0]]), torch.tensor([0.5, 0.5])
        >>> smooth_kept(h, prob, torch.tensor([0, 3]), 1, (1, 4), 1.0).flatten()
        tensor([1.0110, 2.9890])
    """
    p = prob.clamp(LEAST_PROB, 1.0 - LEAST_PROB)[:, None]
    n = math.prod(grid)
    weighted = torch.cat([p * h, p], dim=1)
    sparse = weighted.new_zeros(b * n, weighted.shape[1]).index_copy_(0, rows, weighted)
    cells = sparse.view(b, *grid, -1)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        blurred: Tensor = Blur.apply(cells, sigma)
    else:
        blurred = blur_in_place(cells, sigma)
    at_kept = blurred.reshape(b * n, -1).index_select(0, rows)
    smooth = at_kept[:, :-1] / (at_kept[:, -1:] + NORMALISER)
    return p * h + (1.0 - p) * smooth


class Blur(torch.autograd.Function):
    """Gaussian blur of a grid with zeros around it; symmetric, so it is its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sigma: float) -> Tensor:  # noqa: ANN401
        """Blur all axes between the first and the last."""
        ctx.sigma = sigma
        return blur_grid(x, sigma)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        """Blur the gradient alike."""
        return Blur.apply(grads[0], ctx.sigma), None


def blur_grid(x: Float[Tensor, "b ... d"], sigma: float) -> Float[Tensor, "b ... d"]:
    """Blur all axes between the first and the last with an unnormalised Gaussian."""
    shape = x.shape
    before = shape[0]
    for axis in range(1, x.ndim - 1):
        behind = math.prod(shape[axis + 1 :])
        x = blur_axis(x.reshape(before, shape[axis], behind), sigma).reshape(shape)
        before *= shape[axis]
    return x


def blur_in_place(x: Float[Tensor, "b ... d"], sigma: float) -> Float[Tensor, "b ... d"]:
    """Blur as `blur_grid` does, a few samples at a time, so that no second grid is needed."""
    for samples in x.chunk(PIECES):
        samples.copy_(blur_grid(samples, sigma))
    return x


def blur_axis(x: Float[Tensor, "b n d"], sigma: float) -> Float[Tensor, "b n d"]:
    """Blur the middle axis: a banded matrix product, block by block.

    The work per cell does not grow with the length of the axis beyond a block.
    """
    length = x.shape[1]
    radius = math.ceil(WINDOW_IN_SIGMAS * sigma)
    block = max(LEAST_BLOCK, 2 * radius)
    if length <= block + 2 * radius:
        return torch.matmul(gaussian_matrix(length, length, 0, sigma, x), x)
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        low, high = max(0, start - radius), min(length, stop + radius)
        weights = gaussian_matrix(stop - start, high - low, start - low, sigma, x)
        parts.append(torch.matmul(weights, x[:, low:high]))
    return torch.cat(parts, dim=1)


def gaussian_matrix(
    rows: int, columns: int, offset: int, sigma: float, like: Tensor
) -> Float[Tensor, "rows columns"]:
    """Return `exp(-d^2 / (2 sigma^2))` where d is the distance of row i + offset to column j."""
    i = torch.arange(rows, device=like.device, dtype=like.dtype)[:, None] + offset
    j = torch.arange(columns, device=like.device, dtype=like.dtype)
    return torch.exp((i - j).square() * (-0.5 / sigma**2))
