"""Chunking: from all cells to few tokens and back; the plan that both directions share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from adaptok.attention import Ragged, Rung
from adaptok.budgets import Budget
from adaptok.errors import ShapeError
from adaptok.routing import Routing
from adaptok.tokens import Grid, Tokens, starts_of

Layout = Literal["packed", "bucketed", "fixed"]
LAYOUTS: tuple[Layout, ...] = ("packed", "bucketed", "fixed")


@dataclass(frozen=True, slots=True, eq=False)
class Provenance:
    """For each original cell, the token that now stands for it.

    Args:
        token: index of the token within its sample, `(b n)`; -1 where no token stands for the
            cell (pruned without a representative).
        weight: how much of the cell its token carries, `(b n)`; None means 1 everywhere.

    Raises:
        ShapeError: the weights do not fit the tokens.

    Example:
        >>> first = Provenance(torch.tensor([[0, 0, 1, 2, -1]]))
        >>> second = Provenance(torch.tensor([[1, 0, -1]]))
        >>> first.then(second).token
        tensor([[ 1,  1,  0, -1, -1]])
    """

    token: Int[Tensor, "b n"]
    weight: Float[Tensor, "b n"] | None = None

    def __post_init__(self) -> None:
        if self.token.ndim != 2:
            raise ShapeError(f"token needs the shape (b, n), got {tuple(self.token.shape)}")
        if self.weight is not None and self.weight.shape != self.token.shape:
            raise ShapeError(
                f"weight needs the shape {tuple(self.token.shape)}, got {tuple(self.weight.shape)}"
            )

    @classmethod
    def identity(cls, b: int, n: int, device: torch.device | str = "cpu") -> "Provenance":
        """Return the map in which each cell is its own token.

        Args:
            b: number of samples.
            n: number of cells.
            device: where the map lies.

        Returns:
            The identity.
        """
        return cls(torch.arange(n, device=device).expand(b, n))

    def then(self, later: "Provenance") -> "Provenance":
        """Compose with the map of a later method, whose cells are the tokens of this one.

        Args:
            later: the map that was made after this one; it may be padded to more tokens than
                a sample has.

        Returns:
            From the original cells to the tokens of the later method; -1 stays -1, weights
            multiply.

        Raises:
            ShapeError: the maps are of different batches, or the later one has too few cells.
        """
        if later.token.shape[0] != self.token.shape[0]:
            raise ShapeError(
                f"the later map is of {later.token.shape[0]} samples, this one of "
                f"{self.token.shape[0]}: compose maps of the same batch"
            )
        if not torch.compiler.is_compiling() and int(self.token.max()) >= later.token.shape[1]:
            raise ShapeError(
                f"this map points at token {int(self.token.max())}, but the later map has only "
                f"{later.token.shape[1]} cells: compose maps in the order in which they were made"
            )
        alive = self.token >= 0
        index = self.token.clamp(min=0)
        token = torch.where(alive, later.token.gather(1, index), self.token)
        if self.weight is None and later.weight is None:
            return Provenance(token)
        weight = torch.ones_like(token, dtype=torch.float32) if self.weight is None else self.weight
        if later.weight is not None:
            weight = torch.where(alive, weight * later.weight.gather(1, index), weight)
        return Provenance(token, weight)


@dataclass(frozen=True, slots=True, eq=False)
class ChunkPlan:
    """What `chunk` decided, and all that `dechunk` needs to undo it.

    Args:
        grid: lengths of the grid axes.
        layout: how the kept tokens are run.
        routing: the router's answer with the mask that the budget asked for.
        keep_mask: the cells that are computed, `(b n)`; more than asked for in the bucketed
            layout.
        cells: flat grid cell of each kept token, `(t)` packed or `(b m)` fixed.
        provenance: which token stands for each cell.
        batch: sample of each packed token, `(t)`; None in the fixed layout.
        ptr: where each sample starts, `(b + 1)`; None in the fixed layout.
        lengths: the tokens of each sample, known to the host; None in the fixed layout.

    Example:
        >>> from adaptok.dc import DCChunker
        >>> tokens = Tokens(torch.randn(1, 4, 8), grid=(2, 2))
        >>> routing = Routing(torch.tensor([[0.9, 0.1, 0.2, 0.8]]))
        >>> kept, plan = DCChunker()(tokens, routing, Budget())
        >>> kept.x.shape, plan.requested, plan.computed
        (torch.Size([2, 8]), tensor([2]), tensor([2]))
    """

    grid: Grid
    layout: Layout
    routing: Routing
    keep_mask: Bool[Tensor, "b n"]
    cells: Int[Tensor, " t"] | Int[Tensor, "b m"]
    provenance: Provenance
    batch: Int[Tensor, " t"] | None = None
    ptr: Int[Tensor, " b_plus_1"] | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def requested(self) -> Int[Tensor, " b"]:
        """How many cells the budget asked for, per sample."""
        return self.routing.kept

    @property
    def computed(self) -> Int[Tensor, " b"]:
        """How many tokens are really computed, per sample."""
        return self.keep_mask.sum(1)

    def ragged(self, rung: Rung | None = None) -> Ragged:
        """Return where the samples lie in the packed run.

        Args:
            rung: how attention is computed; None takes the best way that fits.

        Returns:
            What packed blocks need beside the tokens.

        Raises:
            ShapeError: the tokens of the fixed layout are dense.
        """
        if self.batch is None or self.ptr is None or self.lengths is None:
            raise ShapeError('the tokens of layout "fixed" are dense: no ragged run exists')
        return Ragged(self.batch, self.ptr, self.lengths, rung)

    @property
    def rows(self) -> Int[Tensor, " t"]:
        """The place of each kept token among all cells of the batch, `(b n)` flattened."""
        n = self.keep_mask.shape[1]
        if self.batch is not None:
            return self.batch * n + self.cells
        starts = torch.arange(self.cells.shape[0], device=self.cells.device) * n
        return (self.cells + starts[:, None]).flatten()

    @property
    def sources(self) -> Int[Tensor, " bn"]:
        """For each cell of the batch, the row of the token that stands for it (-1: none)."""
        token = self.provenance.token
        if self.ptr is not None:
            starts = self.ptr[:-1]
        else:
            starts = torch.arange(token.shape[0], device=token.device) * self.cells.shape[1]
        return torch.where(token < 0, token, token + starts[:, None]).flatten()


class Chunker(nn.Module, ABC):
    """Turns dense tokens into fewer ones, and says how."""

    @abstractmethod
    def forward(self, tokens: Tokens, routing: Routing, budget: Budget) -> tuple[Tokens, ChunkPlan]:
        """Choose tokens.

        Args:
            tokens: dense tokens, one per grid cell.
            routing: what the router said of them.
            budget: how many to keep.

        Returns:
            The short tokens, and the plan that the dechunker needs.
        """

    def waits_for_device(self, budget: Budget) -> bool:
        """Say whether counts depend on the image, so that one graph cannot hold this chunker.

        Args:
            budget: how many cells to keep.

        Returns:
            Whether the forward pass must be cut here; by default with every budget but one exact
            count for all samples.
        """
        return not budget.is_uniform

    def losses(self, routing: Routing) -> dict[str, Tensor]:
        """Return auxiliary losses of one decision by name, for `adaptok.collect_losses`.

        Args:
            routing: what the router said, with the mask of the budget.

        Returns:
            Scalars by name; none unless a chunker has some.
        """
        return {}


class Dechunker(nn.Module, ABC):
    """Turns few tokens into one per cell again."""

    @abstractmethod
    def forward(self, chunks: Tokens, plan: ChunkPlan, before: Tokens) -> Tokens:
        """Spread tokens over the grid.

        Args:
            chunks: the short tokens after the blocks.
            plan: what the chunker returned.
            before: the dense tokens that the chunker took.

        Returns:
            Dense tokens, one per grid cell.
        """


def gather_kept(tokens: Tokens, keep_mask: Bool[Tensor, "b n"], lengths: tuple[int, ...]) -> Tokens:
    """Gather the kept cells of all samples into one run, in the order of the cells.

    Args:
        tokens: dense tokens, one per grid cell.
        keep_mask: the cells to keep, `(b n)`.
        lengths: how many those are per sample, known to the host, so that nothing waits for
            the device.

    Returns:
        Packed tokens with their cells.

    Example:
        >>> tokens = Tokens(torch.arange(4.0).view(1, 4, 1), grid=(2, 2))
        >>> gather_kept(tokens, torch.tensor([[True, False, False, True]]), (2,)).cells
        tensor([0, 3])
    """
    n = keep_mask.shape[1]
    rows = find_rows(keep_mask, sum(lengths))
    x = rearrange(tokens.x, "b n d -> (b n) d").index_select(0, rows)
    return Tokens(x, tokens.grid, rows % n, batch=rows // n, ptr=starts_of(keep_mask.sum(1)))


def find_rows(keep_mask: Bool[Tensor, "b n"], total: int) -> Int[Tensor, " t"]:
    """Return the places of the kept cells among all cells of the batch, in order.

    Args:
        keep_mask: the kept cells, `(b n)`.
        total: how many those are, known to the host, so that nothing waits for the device.

    Returns:
        Places, `(t)`.

    Example:
        >>> find_rows(torch.tensor([[True, False], [False, True]]), 2)
        tensor([0, 3])
    """
    flat = keep_mask.flatten()
    # dropped cells all write to one row behind the end, which is cut off
    place = torch.where(flat, flat.cumsum(0) - 1, total)
    places = torch.arange(flat.shape[0], device=flat.device)
    return places.new_empty(total + 1).scatter(0, place, places)[:total]


def gather_cells(tokens: Tokens, cells: Int[Tensor, "b m"]) -> Tokens:
    """Gather the same number of cells of each sample.

    Args:
        tokens: dense tokens, one per grid cell.
        cells: flat index of each cell to keep, `(b m)`.

    Returns:
        Dense tokens `(b m d)` with their cells.
    """
    index = cells[..., None].expand(-1, -1, tokens.width)
    return Tokens(tokens.x.gather(1, index), tokens.grid, cells)


def spread_tokens(x: Float[Tensor, "t d"], plan: ChunkPlan) -> Float[Tensor, "b n d"]:
    """Give each cell the features of the token that stands for it.

    Args:
        x: features of the kept tokens of all samples, `(t d)`.
        plan: what the chunker returned.

    Returns:
        Features of all cells; zeros where no token stands for a cell.

    Example:
        >>> plan = ChunkPlan(
        ...     (1, 3), "packed", Routing(torch.ones(1, 3)), torch.tensor([[True, False, True]]),
        ...     torch.tensor([0, 2]), Provenance(torch.tensor([[0, 0, 1]])),
        ...     torch.tensor([0, 0]), torch.tensor([0, 2]), (2,))
        >>> spread_tokens(torch.tensor([[5.0], [7.0]]), plan).flatten()
        tensor([5., 5., 7.])
    """
    sources = plan.sources
    b, n = plan.provenance.token.shape
    # one row of zeros behind the tokens is cheaper than a mask over all cells
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    cells = padded.index_select(0, torch.where(sources < 0, x.shape[0], sources))
    return rearrange(cells, "(b n) d -> b n d", b=b, n=n)
