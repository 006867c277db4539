"""Keep the cells where features change."""

import torch
from torch import Tensor, nn

from adaptok import Context, Router, Routing, Tokens

SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


class EdgeRouter(Router):
    """Gives each cell the size of the Sobel gradient of its features.

    With e the size over the mean size in the sample, and c the contrast, the keep probability is
    e^c / (1 + e^c): above 0.5 where an edge is stronger than the mean.

    Args:
        contrast: how sharply strong edges are told from weak ones.
    """

    compilable = True

    def __init__(self, contrast: float = 1.0) -> None:
        super().__init__()
        if not contrast > 0:
            raise ValueError(f"contrast is a positive number, got {contrast}")
        self.contrast = float(contrast)  # an option is an attribute of the same name

    def forward(self, tokens: Tokens, context: Context) -> Routing:
        """Judge the cells; frames of a video one by one."""
        if tokens.grid is None or tokens.cells is not None:
            raise ValueError("EdgeRouter needs one token for each cell of a grid")
        with torch.autocast(tokens.x.device.type, enabled=False):
            edge = measure_edges(tokens.x.float(), tokens.grid)
            mean = edge.mean(dim=1, keepdim=True)
            share = edge / mean.clamp(min=torch.finfo(edge.dtype).tiny)
            strong = share**self.contrast
            return Routing(strong / (1 + strong))


def measure_edges(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return the size of the gradient of each cell's features.

    Args:
        x: features of the cells, `(b n d)`.
        grid: lengths of the grid axes, `(h, w)` or `(f, h, w)`.

    Returns:
        Sizes, `(b n)`; 0 where a cell is like its neighbours.
    """
    h, w = (1, *grid)[-2:]
    b, n, d = x.shape
    planes = x.mT.reshape(-1, 1, h, w)  # each feature of each frame by itself
    right = torch.tensor(SOBEL, device=x.device)
    kernels = torch.stack([right, right.T])[:, None]
    padded = nn.functional.pad(planes, (1, 1, 1, 1), mode="replicate")
    gradient = nn.functional.conv2d(padded, kernels)
    return gradient.reshape(b, d, n // (h * w), 2, h * w).square().sum(dim=(1, 3)).sqrt().flatten(1)
