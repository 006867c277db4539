"""H-Net's router: a cell deserves a token where it points another way than the one before it."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from adaptok import Context, Router, Routing, Tokens
from adaptok.errors import ShapeError
from adaptok.float32 import Float32Module, without_autocast
from adaptok.tokens import Grid
from adaptok_hnet.scan import Scan, check_scan, invert_order, order_on, read_grid


@dataclass(frozen=True, slots=True, eq=False)
class ScanRouting(Routing):
    """A routing that was made along a scan; the chunker cuts its runs along the same one.

    Args:
        keep_prob: see `adaptok.Routing`.
        keep_mask: see `adaptok.Routing`.
        natural_mask: see `adaptok.Routing`.
        threshold: see `adaptok.Routing`.
        scan: the order of the cells.

    Example:
        >>> import torch
        >>> ScanRouting(torch.tensor([[1.0, 0.2]]), scan="snake").natural_mask
        tensor([[ True, False]])
    """

    scan: Scan = "raster"


class HNetRouter(Float32Module, Router):
    """Gives each cell (1 - cos) / 2, with cos its similarity to the one before it in a scan.

    The cosine is that of two learned projections, which start as the identity: `W_q` of the cell
    before, `W_k` of the cell. The first cell of the scan gets probability 1. Runs in float32
    always. A fresh one does not keep every cell: it keeps those that point away from the cell
    before (`cos < 0`), which are few in features of a transformer.

    Args:
        width: features of a token.
        scan: order of the cells: `"raster"`, `"snake"` or `"hilbert"`.

    Raises:
        ConfigError: there is no such scan.
        ShapeError: (when called) the tokens do not lie on a grid, or have another width.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, -1]])[None]
        >>> HNetRouter(2)(Tokens(x, grid=(2, 2)), Context()).keep_prob
        tensor([[1.0000, 0.0000, 0.5000, 1.0000]], grad_fn=...)

    Paper: Hwang et al., Dynamic Chunking for End-to-End Hierarchical Sequence Modeling, 2025.
    """

    compilable = True

    def __init__(self, width: int, scan: Scan = "raster") -> None:
        super().__init__()
        check_scan(scan)
        self.scan: Scan = scan
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)

    def extra_repr(self) -> str:
        """Show the scan."""
        return f"scan={self.scan!r}"

    def forward(self, tokens: Tokens, context: Context) -> ScanRouting:
        """Judge the cells (see `Router.forward`)."""
        grid = read_grid(tokens, "HNetRouter")
        if tokens.width != self.query.in_features:
            raise ShapeError(
                f"this router was made for {self.query.in_features} features of a token, and the "
                f'host has {tokens.width}: give width={tokens.width}, or the name "hnet"'
            )
        self.check_float32()
        with without_autocast(tokens.x):
            return ScanRouting(self.find_keep_prob(tokens.x.float(), grid), scan=self.scan)

    def find_keep_prob(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b n"]:
        """Return the keep probability of each cell."""
        order = order_on(grid, self.scan, x.device)
        x = x.index_select(1, order)
        before = F.normalize(self.query(x[:, :-1]), dim=-1)
        here = F.normalize(self.key(x[:, 1:]), dim=-1)
        prob = (0.5 - 0.5 * (before * here).sum(-1)).clamp(0.0, 1.0)
        return F.pad(prob, (1, 0), value=1.0).index_select(1, invert_order(order))
