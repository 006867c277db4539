"""The quadtree of APT: from coarse to fine, a coarse patch where its entropy is low."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptok.errors import ConfigError, ShapeError
from adaptok.tokens import Grid
from adaptok_patch.scales import check_scales, check_thresholds


@dataclass(frozen=True, slots=True, eq=False)
class Leaves:
    """Patches of several sizes that tile a grid.

    Args:
        scale: edge of the patch that each cell lies in, `(b h w)`.
        leaf: which of the sample's patches that is, `(b h w)`; they are counted in the order of
            their upper left cells.

    Example:
        >>> leaves = quadtree({2: torch.tensor([[[1.0, 9.0]]])}, (5.0,), grid=(2, 4))
        >>> leaves.leaf[0]
        tensor([[0, 0, 1, 2],
                [0, 0, 3, 4]])
        >>> leaves.counts
        tensor([5])
    """

    scale: Int[Tensor, "b h w"]
    leaf: Int[Tensor, "b h w"]

    @property
    def counts(self) -> Int[Tensor, " b"]:
        """How many patches each sample has."""
        return self.leaf.amax((1, 2)) + 1


def quadtree(
    entropy: Mapping[int, Float[Tensor, "b _h _w"]], thresholds: Sequence[float], grid: Grid
) -> Leaves:
    """Tile a grid with patches: coarse ones where their entropy is below the threshold.

    From coarse to fine: a patch whose entropy is below the threshold of its scale is used, and
    switches off everything beneath it. What no coarse patch covers stays fine, and so do blocks
    that the border of the grid cuts.

    Args:
        entropy: by scale in cells (2, 4, ...), the entropy of each block of so many cells, `(b,
            ceil(h / scale), ceil(w / scale))`, in bits; see `measure_entropy`.
        thresholds: in bits, one a scale, from fine to coarse.
        grid: height and width in cells.

    Returns:
        The patches.

    Raises:
        ConfigError: the scales are no powers of two, or there is not one threshold for each.
        ShapeError: a map does not fit the grid.

    Example:
        >>> flat = {2: torch.zeros(1, 3, 3), 4: torch.zeros(1, 2, 2)}
        >>> quadtree(flat, (6.0, 4.0), grid=(5, 6)).scale[0]  # 5 rows: the last one stays fine
        tensor([[4, 4, 4, 4, 2, 2],
                [4, 4, 4, 4, 2, 2],
                [4, 4, 4, 4, 2, 2],
                [4, 4, 4, 4, 2, 2],
                [1, 1, 1, 1, 1, 1]])

    Paper: APT, arXiv 2510.18091.
    """
    scales = check_scales((1, *sorted(entropy)))
    limits = check_thresholds(thresholds, scales)
    if len(grid) != 2:
        raise ConfigError(f"grid is (h, w), got {grid}: one frame at a time")
    h, w = grid
    first = next(iter(entropy.values()))
    b, device = first.shape[0], first.device
    size = torch.ones(b, h, w, dtype=torch.long, device=device)
    for scale, limit in list(zip(scales[1:], limits, strict=True))[::-1]:
        check_map(entropy[scale], scale, (b, h, w))
        rows, columns = h // scale * scale, w // scale * scale
        low = entropy[scale][:, : h // scale, : w // scale] < limit
        wide = low.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        inner = size[:, :rows, :columns]
        size[:, :rows, :columns] = torch.where(wide & (inner == 1), scale, inner)
    y = torch.arange(h, device=device)[:, None]
    x = torch.arange(w, device=device)
    corner = (y // size * size) * w + x // size * size
    starts = (corner == y * w + x).flatten(1)
    leaf = (starts.cumsum(1) - 1).gather(1, corner.flatten(1))
    return Leaves(size, leaf.view(b, h, w))


def check_map(entropy: Tensor, scale: int, cells: tuple[int, int, int]) -> None:
    """Raise a `ShapeError` unless a map has one entropy per block of a scale."""
    b, h, w = cells
    needed = (b, -(-h // scale), -(-w // scale))
    if tuple(entropy.shape) != needed:
        raise ShapeError(
            f"the entropy map of scale {scale} needs the shape {needed} for {b} samples of {h} by "
            f"{w} cells, got {tuple(entropy.shape)}: measure_entropy(images, patch) makes it; of a "
            "call with guidance, repeat it for each half"
        )
