"""Floating-point operations of one forward pass, counted from the real lengths.

A multiply-add is two operations. Matrix products, convolutions, norms and elementwise work
count; moving data (gather, scatter, reshape) and integer work (nearest kept cell) do not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from adaptok.budgets import check_room
from adaptok.dc.blocks import MLP_RATIO
from adaptok.dc.config import SMALLEST_LATENT, DCDiTConfig, DiTConfig, TransformerConfig
from adaptok.dc.scaffold import FREQUENCY_FEATURES
from adaptok.dc.smoothing import WINDOW_IN_SIGMAS
from adaptok.errors import BudgetError, ShapeError

# Operations per number that goes through.
LAYER_NORM = 6  # mean, difference, square and its mean, division (twice: root and product)
GROUP_NORM = 8  # the same, with weight and bias
RMS_NORM = 4  # square and its mean, product, weight
SILU = 4  # negation, exponential, sum, division
SIGMOID = 4
GELU = 9  # the tanh form
MODULATE = 3  # 1 + scale, product, shift
GATE = 2  # product and sum
SOFTMAX = 3  # difference, exponential, division; with the scale in the matrix product


@dataclass(frozen=True, slots=True)
class FlopCount:
    """Operations of one forward pass by part, summed over its samples.

    Args:
        embed: convolution or patches of the latent, time and label.
        encoder: convolutions in front of the router.
        router: keep probabilities.
        backbone: DiT blocks on the kept tokens.
        dechunk: smoothing and gated residual.
        decoder: convolutions behind it.
        head: final layer.
    """

    embed: float = 0.0
    encoder: float = 0.0
    router: float = 0.0
    backbone: float = 0.0
    dechunk: float = 0.0
    decoder: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """The sum over all parts."""
        return float(sum(getattr(self, field.name) for field in fields(self)))


def count_flops(
    config: DCDiTConfig | DiTConfig, grid: tuple[int, int], kept: Sequence[int]
) -> float:
    """Count the operations of one forward pass, summed over its samples.

    Args:
        config: options of the model.
        grid: height and width of the latents in cells.
        kept: tokens that run through the blocks, one number per sample. A sample that runs
            twice for guidance counts twice. For a fixed-patch model it is the number of
            patches.

    Returns:
        Floating-point operations.

    Raises:
        BudgetError: a count is less than 1, or more than the cells of the grid.
        ShapeError: the grid does not fit the model.

    Example:
        >>> from adaptok.dc.config import DiTConfig
        >>> flops = count_flops(DiTConfig(scale="XL", patch_size=2), (32, 32), [256])
        >>> f"{250 * flops / 1e12:.1f} TFLOPs per image of 250 steps"
        '59.5 TFLOPs per image of 250 steps'

    Paper: DC-DiT, arXiv 2603.06351.
    """
    return count_flops_by_part(config, grid, kept).total


def count_flops_by_part(
    config: DCDiTConfig | DiTConfig, grid: tuple[int, int], kept: Sequence[int]
) -> FlopCount:
    """Count the operations of each part of a model; see `count_flops`.

    Args:
        config: options of the model.
        grid: height and width of the latents in cells.
        kept: tokens that run through the blocks, one number per sample.

    Returns:
        Floating-point operations by part.

    Raises:
        BudgetError: a count is less than 1, or more than the cells of the grid.
        ShapeError: the grid does not fit the model.

    Example:
        >>> from adaptok.dc.config import DCDiTConfig
        >>> config = DCDiTConfig(scale="S")
        >>> few, all_ = (count_flops_by_part(config, (32, 32), [n]) for n in (256, 1024))
        >>> few.encoder == all_.encoder, few.backbone < all_.backbone
        (True, True)
    """
    h, w = grid
    if min(h, w) < SMALLEST_LATENT:
        raise ShapeError(
            f"a grid of {h} x {w} cells is smaller than a kernel: at least {SMALLEST_LATENT} x "
            f"{SMALLEST_LATENT} cells are needed"
        )
    if isinstance(config, DiTConfig):
        return count_fixed(config, grid, kept)
    return count_adaptive(config, grid, kept)


def count_fixed(config: DiTConfig, grid: tuple[int, int], kept: Sequence[int]) -> FlopCount:
    """Count a fixed-patch model, whose tokens are its patches."""
    d, p, b = config.hidden_size, config.patch_size, len(kept)
    if any(side % p for side in grid):
        raise ShapeError(f"a grid of {grid[0]} x {grid[1]} cells is no multiple of the patch {p}")
    patches = math.prod(grid) // p**2
    if any(count != patches for count in kept):
        raise BudgetError(
            f"a fixed-patch model runs all its {patches} patches, got kept={list(kept)}"
        )
    cells = b * patches
    return FlopCount(
        embed=linear(cells, p * p * config.in_channels, d) + cells * d + embed_condition(config, b),
        backbone=run_blocks(config, kept, norm=0),
        head=finish(cells, d, d, p * p * config.out_channels, b),
    )


def count_adaptive(config: DCDiTConfig, grid: tuple[int, int], kept: Sequence[int]) -> FlopCount:
    """Count DC-DiT: convolutions on all cells, blocks on the kept ones."""
    n, b, d = math.prod(grid), len(kept), config.hidden_size
    for count in kept:
        if count < 1:
            raise BudgetError(f"every sample keeps at least one token, got kept={list(kept)}")
        check_room(count, n)
    narrow, cells = d // config.narrowing, b * n
    adapted = 2 * b * d * (LAYER_NORM + 2) if config.condition_norm else 0  # encoder and decoder
    widths_in = (narrow,) * config.encoder_blocks + (d,)
    widths_out = (d,) + (narrow,) * config.decoder_blocks
    return FlopCount(
        embed=convolve(cells, config.in_channels, narrow) + embed_condition(config, b) + adapted,
        encoder=run_convolutions(widths_in, d, cells, b),
        router=route(cells, d),
        backbone=sum(kept) * d + run_blocks(config, kept, norm=RMS_NORM),
        dechunk=restore(config, grid, kept),
        decoder=run_convolutions(widths_out, d, cells, b),
        head=finish(cells, narrow, d, config.out_channels, b),
    )


def linear(rows: float, width_in: int, width_out: int, *, bias: bool = True) -> float:
    """Count a linear layer on so many rows."""
    return rows * width_out * (2 * width_in + bias)


def convolve(cells: float, width_in: int, width_out: int, kernel: int = 3) -> float:
    """Count a convolution with bias on a padded grid of so many cells."""
    return linear(cells, kernel * kernel * width_in, width_out)


def embed_condition(config: TransformerConfig, b: int) -> float:
    """Count the embedding of time and label: frequencies, two linear layers, their sum."""
    d = config.hidden_size
    angles = 2 * FREQUENCY_FEATURES
    mlp = linear(1, FREQUENCY_FEATURES, d) + SILU * d + linear(1, d, d)
    return b * (angles + mlp + d)


def run_blocks(config: TransformerConfig, kept: Sequence[int], *, norm: int) -> float:
    """Count the DiT blocks and, with so many operations per number, the norm behind them."""
    d, b, tokens = config.hidden_size, len(kept), sum(kept)
    products = linear(1, d, 3 * d) + linear(1, d, d) + 2 * MLP_RATIO * d * 2 * d
    biases = MLP_RATIO * d + d
    elementwise = 2 * (LAYER_NORM + MODULATE + GATE) * d + GELU * MLP_RATIO * d
    modulation = SILU * d + linear(1, d, 6 * d)
    block = tokens * (products + biases + elementwise) + attend(config, kept) + b * modulation
    return config.depth * block + norm * tokens * d


def attend(config: TransformerConfig, lengths: Sequence[int]) -> float:
    """Count `softmax(q k) v` over the real lengths: heads * sum of L^2 (4 d_head + 3)."""
    d_head = config.hidden_size // config.num_heads
    return config.num_heads * sum(count**2 for count in lengths) * (4 * d_head + SOFTMAX)


def run_convolutions(widths: Sequence[int], width_condition: int, cells: int, b: int) -> float:
    """Count the convolution blocks of encoder or decoder, and the norm behind them."""
    total = float(RMS_NORM * cells * widths[-1])
    for width_in, width_out in pairwise(widths):
        inner = min(width_in, width_out)
        total += (GROUP_NORM + SILU) * cells * (width_in + inner)
        total += convolve(cells, width_in, inner) + convolve(cells, inner, width_out)
        total += b * (SILU * width_condition + linear(1, width_condition, inner)) + cells * inner
        total += cells * width_out  # the sum with the skip
        if width_in != width_out:
            total += convolve(cells, width_in, width_out, kernel=1)
    return total


def route(cells: int, d: int) -> float:
    """Count the router: projection, prediction from the neighbours, score."""
    inner = d // 4
    total = convolve(cells, d, inner, kernel=1) + convolve(cells, inner, inner)
    total += cells * inner  # what the prediction misses
    total += convolve(cells, inner, inner) + (GROUP_NORM + SILU) * cells * inner
    return total + convolve(cells, inner, 1, kernel=1) + SIGMOID * cells


def restore(config: DCDiTConfig, grid: tuple[int, int], kept: Sequence[int]) -> float:
    """Count the dechunker: separable smoothing, the gate, the residual of all cells."""
    d, tokens, cells = config.hidden_size, sum(kept), len(kept) * math.prod(grid)
    blur = sum(2 * cells * (d + 1) * blur_window(side, config.dechunk_sigma) for side in grid)
    mix = tokens * d * (1 + 2 + 3)  # weight by p; divide; p h + (1 - p) smooth
    gate_and_sum = 2 * cells * d
    return blur + mix + gate_and_sum + linear(cells, d, d)


def blur_window(side: int, sigma: float) -> float:
    """Return how many cells of its line the blur reads for a cell, on average.

    See `adaptok.dc.smoothing.blur_axis`: a banded matrix, block by block.
    """
    radius = math.ceil(WINDOW_IN_SIGMAS * sigma)
    block = max(16, radius)
    if side <= block + 2 * radius:
        return side
    read = 0
    for start in range(0, side, block):
        stop = min(start + block, side)
        read += (stop - start) * (min(side, stop + radius) - max(0, start - radius))
    return read / side


def finish(cells: int, width: int, width_condition: int, width_out: int, b: int) -> float:
    """Count the final layer."""
    modulation = SILU * width_condition + linear(1, width_condition, 2 * width)
    elementwise = (LAYER_NORM + MODULATE) * cells * width
    return elementwise + b * modulation + linear(cells, width, width_out)
