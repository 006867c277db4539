"""Contraction of grid edges: similar neighbours become one segment, again and again."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptok.tokens import Grid
from adaptok_graph.geometric import import_geometric
from adaptok_graph.grids import pair_cells

MATCHING_ROUNDS = 64  # then every region follows its best edge, which halves their number
NOISE = 1e-6  # a lower cost is that of equal cells, but for rounding
NO_EDGE = torch.iinfo(torch.int64).max
LOW_BITS = 2**32 - 1


@dataclass(frozen=True, slots=True, eq=False)
class MergeTree:
    """Which region was merged into which one, and at what cost; a region is named by a cell of it.

    Args:
        parent: the region that a region was merged into, `(b n)`; itself where it never was.
        height: cost of that merge, at least that of the merges inside both regions, `(b n)`;
            infinite where there was none.
        turn: round of the merge, `(b n)`.
    """

    parent: Int[Tensor, "b n"]
    height: Float[Tensor, "b n"]
    turn: Int[Tensor, "b n"]

    def count_below(self, limit: float) -> Int[Tensor, " b"]:
        """Return how many segments are left when all merges up to a cost are done, `(b)`."""
        return self.parent.shape[1] - (self.height <= limit).sum(1)

    def cut(self, counts: Int[Tensor, " b"]) -> Int[Tensor, "b n"]:
        """Do the cheapest merges until so many segments are left.

        Args:
            counts: number of segments of each sample, `(b)`.

        Returns:
            For each cell, the cell that names its segment, `(b n)`.

        Example:
            >>> tree = MergeTree(
            ...     torch.tensor([[0, 0, 2, 2]]),
            ...     torch.tensor([[math.inf, 3.0, math.inf, 1.0]]),
            ...     torch.zeros(1, 4, dtype=torch.long))
            >>> tree.cut(torch.tensor([3])).tolist()
            [[0, 1, 2, 2]]
        """
        n = self.parent.shape[1]
        by_turn = self.turn.argsort(dim=1, stable=True)
        order = by_turn.gather(1, self.height.gather(1, by_turn).argsort(dim=1, stable=True))
        cells = torch.arange(n, device=order.device).expand_as(order)
        place = torch.empty_like(order).scatter(1, order, cells)
        segment = torch.where(place < (n - counts)[:, None], self.parent, cells)
        for _ in range(max(1, n - 1).bit_length()):  # each step doubles how far a cell looks
            segment = segment.gather(1, segment)
        return segment


def contract_edges(
    z: Float[Tensor, "b n k"],
    reluctance: Float[Tensor, "b n"],
    grid: Grid,
    neighbours: int,
    counts: Int[Tensor, " b"],
    limit: float = -1.0,
) -> MergeTree:
    """Merge neighbouring regions, cheapest first, as long as a wanted cut needs it.

    The cost of a merge is Ward's, what it adds to the squared error of replacing features by the
    mean of their region, times the larger reluctance of the two:
    `|A| |B| / (|A| + |B|) * |mean_A - mean_B|^2 * max(r_A, r_B)`, `r` of a region being the
    largest of its cells. In each round all pairs that are each other's cheapest neighbour are
    merged (heavy-edge matching); rounds go on until no edge that is left is cheaper than the
    merges that are wanted. So the answer is close to that of a greedy merge, one pair after the
    other, which Ward's cost would make it exactly if every two regions were neighbours.

    Args:
        z: features of the cells.
        reluctance: how little a cell wants to be merged, positive.
        grid: lengths of the grid axes.
        neighbours: 4, or 8 with the corners.
        counts: the fewest segments that will be asked for, per sample.
        limit: all merges up to this cost are wanted too.

    Returns:
        The merges.

    Example:
        >>> z = torch.tensor([[[0.0], [0.1], [5.0], [5.0]]])
        >>> tree = contract_edges(z, torch.ones(1, 4), (1, 4), 4, torch.tensor([2]))
        >>> tree.cut(torch.tensor([2])).tolist()
        [[0, 0, 2, 2]]

    Paper: Ward, Hierarchical grouping to optimize an objective function, 1963.
    """
    return MergeTree(*run_contraction(z, reluctance, list(grid), neighbours, counts, limit))


@torch.library.custom_op(
    "adaptok_graph::contract", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def run_contraction(
    z: Tensor, reluctance: Tensor, grid: list[int], neighbours: int, counts: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `contract_edges` says, in as many rounds as needed, as one node of a graph."""
    b, n, _ = z.shape
    regions = Regions(z, reluctance, pair_cells(tuple(grid), neighbours).to(z.device))
    for turn in range(n):
        cost = regions.measure()
        if regions.is_enough(cost, n - counts, limit):
            break
        regions.merge(cost, turn, turn < MATCHING_ROUNDS)
    starts = torch.arange(b, device=z.device)[:, None] * n
    return regions.parent.view(b, n) - starts, regions.height.view(b, n), regions.turn.view(b, n)


@run_contraction.register_fake
def _(
    z: Tensor, reluctance: Tensor, grid: list[int], neighbours: int, counts: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    index = z.new_empty(z.shape[:2], dtype=torch.long)
    return index, z.new_empty(z.shape[:2], dtype=torch.float32), torch.empty_like(index)


class Regions:
    """The regions of one contraction and the edges between them, all samples in one graph.

    Args:
        z: features of the cells.
        reluctance: how little a cell wants to be merged.
        pairs: edges of the grid, each once.
    """

    def __init__(
        self,
        z: Float[Tensor, "b n k"],
        reluctance: Float[Tensor, "b n"],
        pairs: Int[Tensor, "2 e"],
    ) -> None:
        b, n, _ = z.shape
        device = z.device
        self.scatter = import_geometric("utils").scatter
        self.samples = b
        # of all cells of the batch
        self.parent = torch.arange(b * n, device=device)
        self.height = torch.full((b * n,), math.inf, device=device)
        self.turn = torch.zeros(b * n, dtype=torch.long, device=device)
        # of the regions that are left
        self.cell = torch.arange(b * n, device=device)
        self.mean = z.detach().float().reshape(b * n, -1)
        self.size = torch.ones(b * n, device=device)
        self.reluctance = reluctance.detach().float().flatten()
        self.inner = torch.zeros(b * n, device=device)
        # of the edges between different regions
        starts = torch.arange(b, device=device) * n
        self.ends = (pairs[:, None] + starts[:, None]).reshape(2, -1)
        self.sample = torch.arange(b, device=device).repeat_interleave(pairs.shape[1])

    def measure(self) -> Float[Tensor, " e"]:
        """Return the cost of merging along each edge."""
        u, v = self.ends
        gap = self.mean.index_select(0, u).sub_(self.mean.index_select(0, v))
        size_u, size_v = self.size.index_select(0, u), self.size.index_select(0, v)
        weight = size_u * size_v / (size_u + size_v)
        r = torch.maximum(self.reluctance.index_select(0, u), self.reluctance.index_select(0, v))
        cost = gap.square_().sum(1) * weight * r
        return torch.where(cost > NOISE, cost, 0.0)

    def is_enough(self, cost: Tensor, merges: Int[Tensor, " b"], limit: float) -> bool:
        """Say whether no edge that is left can change the cheapest merges that are wanted."""
        if not cost.numel():
            return True
        least = torch.full((self.samples,), math.inf, device=cost.device)
        least = least.scatter_reduce(0, self.sample, cost, "amin")
        known = (self.height.view(self.samples, -1) <= least[:, None]).sum(1)
        return bool(((known >= merges) & (least > limit)).all())

    def merge(self, cost: Float[Tensor, " e"], turn: int, matching: bool) -> None:
        """Merge pairs of regions, or with `matching=False` each region with its best neighbour."""
        m = self.cell.shape[0]
        here = torch.arange(m, device=cost.device)
        u, v = self.ends
        # costs are not negative, so that their bits rank as they do; ties go to the first edge
        places = torch.arange(len(cost), device=cost.device)
        key = (cost.view(torch.int32).long() << 32) | places
        best = torch.full((m,), NO_EDGE, device=cost.device)
        best = best.scatter_reduce(0, u, key, "amin").scatter_reduce(0, v, key, "amin")
        alone = best == NO_EDGE
        edge = torch.where(alone, 0, best & LOW_BITS)
        there = u.index_select(0, edge) + v.index_select(0, edge) - here
        there = torch.where(alone, here, there)
        mutual = best.index_select(0, there) == best
        child = mutual & (here > there) if matching else ~(mutual & (here < there)) & ~alone
        root = torch.where(child, there, here)
        if not matching:
            for _ in range(max(1, m - 1).bit_length()):
                root = root.index_select(0, root)
        inner = torch.maximum(self.inner, self.inner.index_select(0, there))
        inner = torch.maximum(inner, cost.index_select(0, edge))
        cell, other = self.cell[child], self.cell.index_select(0, there)[child]
        self.parent[cell] = other
        self.height[cell] = inner[child]
        self.turn[cell] = turn
        self.pool(root, child, torch.where(child, inner, self.inner))

    def pool(self, root: Int[Tensor, " m"], child: Tensor, inner: Float[Tensor, " m"]) -> None:
        """Keep only the regions that are roots, with what the others bring to them."""
        stays = ~child
        number = stays.cumsum(0) - 1
        cluster = number.index_select(0, root)
        m = int(number[-1]) + 1
        size = self.scatter(self.size, cluster, dim_size=m)
        share = self.size / size.index_select(0, cluster)
        self.mean = self.scatter(self.mean * share[:, None], cluster, dim_size=m)
        self.size = size
        self.reluctance = self.scatter(self.reluctance, cluster, dim_size=m, reduce="max")
        self.inner = self.scatter(inner, cluster, dim_size=m, reduce="max")
        self.cell = self.cell[stays]
        ends = cluster.index_select(0, self.ends.flatten()).view(2, -1)
        alive = (ends[0] != ends[1]).nonzero().squeeze(1)
        self.ends = ends.index_select(1, alive)
        self.sample = self.sample.index_select(0, alive)
