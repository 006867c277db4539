"""The learned part of a coarse patch's token, from the cells beneath it."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from adaptok import ChunkPlan
from adaptok_patch.scales import level_of


class PatchJoiner(nn.Module):
    """Joins the features of two by two parts by a convolution, scale after scale.

    The features of a coarse patch are a convolution of stride 2 over those of its four parts; a
    linear layer, zero at the start, gives what is added to the token of such a patch.

    Args:
        width: features of a token.
        scales: edges of patches in cells, from 1.

    Example:
        >>> sum(p.numel() for p in PatchJoiner(64, (1, 2, 4)).parameters())
        41216

    Paper: APT, arXiv 2510.18091.
    """

    def __init__(self, width: int, scales: Sequence[int]) -> None:
        super().__init__()
        levels = [level_of(scale) for scale in scales[1:]]
        self.join = nn.ModuleList(nn.Conv2d(width, width, 2, stride=2) for _ in range(max(levels)))
        self.out = nn.ModuleDict({str(level): nn.Linear(width, width) for level in levels})
        for layer in self.out.values():
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        grid: tuple[int, int, int],
        plan: ChunkPlan,
        members: Int[Tensor, " t"],
    ) -> Float[Tensor, "t d"]:
        """Return what is added to each token: zero for cells, and for blocks that are not whole.

        Args:
            x: features of all cells.
            grid: frames, height and width.
            plan: which cells stand for which tokens.
            members: how many cells each token stands for.
        """
        _, h, w = grid
        weight = next(self.parameters())
        part = rearrange(x.to(weight.dtype), "b (f h w) d -> (b f) d h w", h=h, w=w)
        added = part.new_zeros(members.shape[0], part.shape[1])
        picture = plan.rows // (h * w)  # sample and frame
        y, column = plan.rows % (h * w) // w, plan.rows % w
        for level, join in enumerate(self.join, start=1):
            high, wide = h >> level, w >> level
            if not high or not wide:
                break  # no block of this level fits into the grid
            part = join(part)
            if str(level) not in self.out:
                continue
            row, place = y >> level, column >> level
            whole = (members == 1 << 2 * level) & (row < high) & (place < wide)
            block = (picture * high + row.clamp(max=high - 1)) * wide + place.clamp(max=wide - 1)
            flat = rearrange(part, "k d h w -> (k h w) d").index_select(0, block)
            added = added + torch.where(whole[:, None], self.out[str(level)](flat), 0.0)
        return added
