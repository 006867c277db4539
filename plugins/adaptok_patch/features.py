"""What stands for the entropy of the pixels where only tokens are seen."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from adaptok_patch.blocks import gather_children
from adaptok_patch.scales import level_of

# Thresholds in bits: about as many blocks of real features lie below them as blocks of pixels lie
# below 6 and 4 bits (docs/methods/apt.md). Coarser scales have the last one.
THRESHOLDS = {2: 3.0, 4: 2.0}
NOISE = 0.01  # squared difference of neighbours that counts as little
EVEN = 1e-3  # deviation over the largest channel; below it the channels of a cell are equal


def feature_entropy(
    x: Float[Tensor, "b n d"], grid: tuple[int, int, int], scales: Sequence[int]
) -> dict[int, Float[Tensor, "bf _h _w"]]:
    """Return how unlike their neighbours the cells of each coarse patch are, in bits.

    With z the features of a cell at mean 0 and deviation 1, and D the mean over the up to four
    neighbours j of `|z_i - z_j|^2 / d` (twice one minus their correlation), a cell has
    `log2(1 + D / 0.01) / 2` bits: what a Gaussian of that variance says through noise of a
    hundredth. A patch has the mean over its cells, so that one edge does not speak for all.

    Args:
        x: features of the cells, float32.
        grid: frames, height and width; neighbours are of the same frame.
        scales: edges of patches in cells, the finest one first.

    Returns:
        By coarse scale, `(b f, ceil(h / scale), ceil(w / scale))`; of patches that the border
        cuts, the mean over their cells.

    Example:
        >>> x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
        >>> x[:, 8:] = x[:, 8:9]  # the lower half is flat
        >>> feature_entropy(x, (1, 4, 4), (1, 2))[2].round(decimals=1)
        tensor([[[3.9000, 3.8000],
                 [1.5000, 1.5000]]])
    """
    _, h, w = grid
    z = rearrange(normalise_cells(x), "b (f h w) d -> (b f) h w d", h=h, w=w)
    bits = torch.log2(1 + neighbour_difference(z) / NOISE) / 2
    total, count = bits, torch.ones_like(bits)
    found = {}
    for level in range(1, level_of(scales[-1]) + 1):
        total, count = gather_children(total, 0).sum(-1), gather_children(count, 0).sum(-1)
        if 1 << level in scales:
            found[1 << level] = total / count
    return found


def normalise_cells(x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Bring the features of each cell to mean 0 and deviation 1; equal ones become about 0."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    floor = EVEN * x.abs().amax(-1, keepdim=True)
    scaled: Tensor = centred / torch.maximum(deviation, floor).clamp(min=1e-20)
    return scaled


def neighbour_difference(z: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w"]:
    """Return the mean squared difference of each cell to its neighbours; 0 where it has none."""
    down = (z[:, 1:] - z[:, :-1]).square().mean(-1)
    right = (z[:, :, 1:] - z[:, :, :-1]).square().mean(-1)
    count = sum_links(torch.ones_like(down[:1]), torch.ones_like(right[:1]))
    return sum_links(down, right) / count.clamp(min=1)


def sum_links(down: Float[Tensor, "b h_less_1 w"], right: Float[Tensor, "b h w_less_1"]) -> Tensor:
    """Return for each cell the sum over its links to the cells below, above and beside it."""
    pad = torch.nn.functional.pad
    vertical = pad(down, (0, 0, 0, 1)) + pad(down, (0, 0, 1, 0))
    return vertical + pad(right, (0, 1)) + pad(right, (1, 0))


def default_thresholds(scales: Sequence[int]) -> tuple[float, ...]:
    """Return the thresholds of scales that a user gave none for."""
    return tuple(THRESHOLDS.get(scale, min(THRESHOLDS.values())) for scale in scales[1:])
