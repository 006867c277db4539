"""A token for each patch that the entropy asks for."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok import Context, Router, Routing, Tokens
from adaptok.errors import ShapeError
from adaptok_patch.blocks import lay_blocks
from adaptok_patch.features import default_thresholds, feature_entropy
from adaptok_patch.scales import SCALES, check_scales, check_thresholds, level_of, split_grid
from adaptok_patch.scoring import score_cells
from adaptok_patch.tree import check_map


class Entropies(Protocol):
    """Entropies that a caller gives (see `entropy_maps`)."""

    @property
    def maps(self) -> Mapping[int, Float[Tensor, "b _h _w"]]:
        """Entropies by scale."""

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Thresholds of the scales."""


class AptRouter(Router):
    """Keeps one cell of each patch of a quadtree: coarse patches where the entropy is low.

    A coarse patch is used where its entropy is below the threshold of its scale; see `quadtree`.
    The entropy is that of the tokens (`feature_entropy`), since no router inside a host sees the
    picture; `entropy_maps` gives it that of the pixels. The keep probability of a cell says how far
    all thresholds would have to move until another cell stands for it (`score_cells`), so that any
    budget gives the quadtree of other thresholds. The chunker `"apt"` reads the patches off it;
    others keep the same cells.

    Args:
        scales: edges of patches in cells: powers of two, from 1.
        thresholds: of the entropy of tokens, in bits, one a coarse scale; None takes 3
            and 2, with which real features have about as many patches as pixels at 6 and 4 bits.

    Raises:
        ConfigError: the scales are no powers of two, or there is not one threshold for each.
        ShapeError: (when called) the tokens do not lie on a grid, or given maps do not fit it.

    Example:
        >>> x = torch.randn(1, 16, 64)
        >>> x[:, 8:] = x[:, 8:9]  # the lower half is flat, but for its upper row
        >>> AptRouter()(Tokens(x, grid=(4, 4)), Context()).natural_mask.view(4, 4).int()
        tensor([[1, 1, 1, 1],
                [1, 1, 1, 1],
                [1, 0, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)

    Paper: APT, arXiv 2510.18091.
    """

    compilable: ClassVar[bool] = True

    def __init__(
        self, scales: Sequence[int] = SCALES, thresholds: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.scales = check_scales(scales)
        self.thresholds = None if thresholds is None else check_thresholds(thresholds, self.scales)
        self.given: Entropies | None = None  # a setting of the caller, as a budget is

    def extra_repr(self) -> str:
        """Show the options."""
        return f"scales={self.scales}, thresholds={self.thresholds}"

    def forward(self, tokens: Tokens, context: Context) -> Routing:
        """Judge the cells (see `Router.forward`); frames of a video one by one."""
        frames, h, w = check_dense(tokens, "AptRouter")
        with torch.autocast(tokens.x.device.type, enabled=False):
            b = tokens.x.shape[0]
            if self.given is None:
                limits: Sequence[float] = self.thresholds or default_thresholds(self.scales)
                found: Mapping[int, Tensor] = feature_entropy(
                    tokens.x.float(), (frames, h, w), self.scales
                )
            else:
                limits, found = self.given.thresholds, self.given.maps
                for scale in self.scales[1:]:
                    check_map(found[scale], scale, (b * frames, h, w))
            excess = {
                level_of(scale): found[scale].float() - limit
                for scale, limit in zip(self.scales[1:], limits, strict=True)
            }
            prob, natural = score_cells(excess, lay_blocks(h, w, tokens.x.device))
        return Routing(prob.reshape(b, -1), natural_mask=natural.reshape(b, -1))


def check_dense(tokens: Tokens, name: str) -> tuple[int, int, int]:
    """Return frames, height and width, or raise a `ShapeError` unless each cell has one token."""
    if tokens.is_packed or tokens.cells is not None or tokens.valid is not None:
        raise ShapeError(
            f"{name} needs dense tokens (b n d), one for each grid cell in order, without padding: "
            "let it run before tokens are taken away"
        )
    return split_grid(tokens.grid, name)
