"""How alike cells are: short vectors whose distances are those of standardised features."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SKETCH = 32  # features of a sketch; squared distances are right to about a quarter
EVEN = 1e-8  # variance of the channels of a cell below which they count as equal
FLAT = 1e-6  # variance of the cells of a sample below which they count as equal


def sketch_cells(x: Float[Tensor, "b n d"], width: int = SKETCH) -> Float[Tensor, "b n k"]:
    """Return short vectors for comparing the cells of a sample.

    Each cell is brought to mean 0 and deviation 1, as blocks do at their entrance; more than
    `width` features are projected to as many by fixed random signs, which keeps distances
    (Johnson and Lindenstrauss); the mean cell is taken away; and all cells of a sample are
    divided by one number, so that half the squared distance of two unrelated cells is about 1.

    Args:
        x: features of the cells.
        width: features of the answer, at most.

    Returns:
        Vectors of float32, without gradient; zeros where all cells are alike.

    Example:
        >>> z = sketch_cells(torch.tensor([[[1.0, 3.0], [20.0, 10.0]]]))
        >>> z.square().sum(-1).round(decimals=3)
        tensor([[1., 1.]])
    """
    z = F.layer_norm(x.detach().float(), x.shape[-1:], eps=EVEN)
    if z.shape[-1] > width:
        z = z @ draw_signs(z.shape[-1], width, z.device)
    z = z - z.mean(1, keepdim=True)
    variance = z.square().sum(-1).mean(1)[:, None, None]
    # cells that differ by rounding only are alike; a NaN would never come to an end
    z = torch.where(variance > FLAT * x.shape[-1], z / variance.sqrt(), 0.0)
    return torch.nan_to_num(z)


def draw_signs(rows: int, columns: int, device: torch.device) -> Float[Tensor, "rows columns"]:
    """Return a matrix of random signs over the root of `columns`, always the same one."""
    bits = torch.arange(1, rows * columns + 1, device=device)
    for _ in range(2):  # a multiplicative hash of 32 bits, twice
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    signs = ((bits >> 16) & 1) * 2 - 1
    matrix: Tensor = signs.float().view(rows, columns) / columns**0.5
    return matrix
