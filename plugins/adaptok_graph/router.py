"""A graph network on the cells of a token grid that says which ones deserve a token."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from adaptok import Context, Router, Routing, Tokens
from adaptok.errors import ConfigError, ShapeError
from adaptok.float32 import Float32Module
from adaptok_graph.geometric import import_geometric
from adaptok_graph.grids import check_neighbours, repeat_edges
from adaptok_graph.similarity import sketch_cells

Kind = Literal["sage", "gat", "graph"]
Prior = Literal["neighbours"]

START_BIAS = 4.0  # sigmoid(4) = 0.98: every cell is kept at the start
PRIOR_RANGE = 2.0  # the logits of a fresh router lie in 4 +- 2
SHARE = 4  # the network is a quarter as wide as a token


class GraphRouter(Float32Module, Router):
    """Judges each cell by what message passing between neighbours tells of it.

    Tokens are normalised and projected to a quarter of their width; each of `layers` rounds adds
    `silu(conv(norm(z)))`, a layer of torch-geometric on the graph of the grid; one logit per
    cell comes out. The logit is `bias + 2 (2 s - 1) + learned`: the learned part starts at zero,
    and `s`, in [0, 1), says how much a cell differs from the mean of its neighbours. So a fresh
    router keeps every cell, and ranks them sensibly. Runs in float32 always.

    Args:
        width: features of a token.
        layers: rounds of message passing, at least 1.
        kind: the layer: `"sage"` (SAGEConv), `"gat"` (GATv2Conv) or `"graph"` (GraphConv with
            the mean of the neighbours).
        neighbours: 4, or 8 with the corners; in a video the frames before and after, too.
        prior: `"neighbours"`, or None for the learned part alone.
        bias: bias of the logit at the start.

    Raises:
        MissingPackageError: torch-geometric is not installed.
        ConfigError: an option is out of range.
        ShapeError: (when called) the tokens are not all cells of a grid, or have another width.

    Example:
        >>> router = GraphRouter(64)
        >>> routing = router(Tokens(torch.randn(2, 12, 64), grid=(3, 4)), Context())
        >>> bool(routing.natural_mask.all())
        True

    Paper: Hamilton, Ying and Leskovec, Inductive representation learning on large graphs, 2017.
    """

    starts_full = True
    compilable = True

    def __init__(
        self,
        width: int,
        layers: int = 2,
        kind: Kind = "sage",
        neighbours: int = 4,
        prior: Prior | None = "neighbours",
        bias: float = START_BIAS,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ConfigError(f"layers is at least 1, got {layers}")
        if prior not in (None, *get_args(Prior)):
            raise ConfigError(f'prior is "neighbours" or None, got {prior!r}')
        if not math.isfinite(bias):
            raise ConfigError(f"bias is a finite number, got {bias}")
        self.layers, self.kind, self.prior = layers, kind, prior
        self.neighbours = check_neighbours(neighbours)
        self.bias = float(bias)
        make_layer = choose_layer(kind)
        inner = -(-width // SHARE)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, inner)
        self.norms = nn.ModuleList(nn.LayerNorm(inner) for _ in range(layers))
        self.convs = nn.ModuleList(make_layer(inner) for _ in range(layers))
        self.logit = nn.Linear(inner, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.constant_(self.logit.bias, bias)

    def extra_repr(self) -> str:
        """Name the options."""
        return f"kind={self.kind!r}, neighbours={self.neighbours}, prior={self.prior!r}"

    def forward(self, tokens: Tokens, context: Context) -> Routing:
        """Judge the cells (see `Router.forward`)."""
        if tokens.grid is None or tokens.is_packed or tokens.cells is not None:
            raise ShapeError("the graph router needs one token for each cell of a known grid")
        if tokens.valid is not None:
            raise ShapeError("the graph router needs tokens without padding")
        if tokens.width != self.project.in_features:
            raise ShapeError(
                f"this router was made for {self.project.in_features} features of a token, and "
                f'{tokens.width} came: give width={tokens.width}, or the name "graph"'
            )
        self.check_float32()
        with torch.autocast(tokens.x.device.type, enabled=False):
            x = tokens.x.float()
            edges = repeat_edges(x, tokens.grid, len(x), self.neighbours)
            logit = self.find_logit(x, edges)
            if self.prior is not None:
                logit = logit + PRIOR_RANGE * (2.0 * measure_difference(x, edges) - 1.0)
            return Routing(logit.sigmoid())

    def find_logit(
        self, x: Float[Tensor, "b n d"], edges: Int[Tensor, "2 be"]
    ) -> Float[Tensor, "b n"]:
        """Return the trainable part of the logits, with the bias."""
        z = self.project(self.norm(rearrange(x, "b n d -> (b n) d")))
        for norm, conv in zip(self.norms, self.convs, strict=True):
            z = z + F.silu(conv(norm(z), edges))
        logit: Tensor = self.logit(z)
        return logit.view(x.shape[:2])


def choose_layer(kind: str) -> Callable[[int], nn.Module]:
    """Return what makes a layer of torch-geometric of some width."""
    layers: Any = import_geometric("nn")
    makers: dict[str, Callable[[int], nn.Module]] = {
        "sage": lambda d: layers.SAGEConv(d, d),
        "gat": lambda d: layers.GATv2Conv(d, d, add_self_loops=False),
        "graph": lambda d: layers.GraphConv(d, d, aggr="mean"),
    }
    if kind not in makers:
        raise ConfigError(f"kind is one of {', '.join(makers)}, got {kind!r}")
    return makers[kind]


def measure_difference(
    x: Float[Tensor, "b n d"], edges: Int[Tensor, "2 be"]
) -> Float[Tensor, "b n"]:
    """Return how much each cell differs from the mean of its neighbours.

    With e the length of the difference over the typical length of a cell of its sample (both of
    `sketch_cells`), the answer is e / (1 + e).

    Args:
        x: features of the cells.
        edges: edges between them, in both directions.

    Returns:
        Numbers in [0, 1): 0 where the neighbours tell all, about .5 where they tell nothing.

    Example:
        >>> x = torch.ones(1, 5, 4).cumsum(2)
        >>> x[0, 4] *= -1
        >>> edges = repeat_edges(x, (1, 5), 1)
        >>> measure_difference(x, edges).argmax().item()
        4
    """
    z = sketch_cells(x)
    flat = rearrange(z, "b n k -> (b n) k")
    scatter = import_geometric("utils").scatter
    mean = scatter(flat.index_select(0, edges[0]), edges[1], dim_size=len(flat), reduce="mean")
    difference: Tensor = torch.linalg.vector_norm(flat - mean, dim=-1).view(x.shape[:2])
    return difference / (1.0 + difference)
