"""What a host's forward hands to its block list: grid, guidance branches, the diffusion step."""

import threading
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptok.routing import Routing
from adaptok.tokens import Grid


@dataclass(frozen=True, slots=True)
class HostNumbers:
    """What one forward pass hands over that the block list itself cannot see.

    Args:
        grid: lengths of the grid axes of the image part; `()` from an entrance that sees the
            diffusion step only.
        start: row of the first grid cell in the sequence, where the host's arguments tell.
        branches: the guidance branches of the batch in order, such as `("uncond", "cond")` for
            two halves, or one name for a whole call.
        request: whose step this is.
        notes: further numbers of a family.
        timestep: the diffusion step as the host's forward got it, one number per sample `(b)` or
            one for all; its scale is the host's own (`Backbone.timestep_scale`).
        cells: the flat cell of each token, where the host chooses its tokens itself: `(b m)`, or of
            all samples in one run `(t)`.
        cell_grid: the grid of those cells.
        routing: what the host's own router said of all cells, where it has one.
        came: the order in which parts of this came, `g` the grid and `s` the step alone; set by
            `join_numbers`.

    Example:
        >>> HostNumbers((14, 14), start=1, branches=("uncond", "cond")).request is None
        True
    """

    grid: Grid
    start: int | None = None
    branches: tuple[str, ...] = ()
    request: str | None = None
    notes: tuple[int, ...] = ()
    timestep: Tensor | None = field(default=None, compare=False)
    came: str = field(default="", compare=False)
    cells: Tensor | None = field(default=None, compare=False)
    cell_grid: Grid = field(default=(), compare=False)
    routing: Routing | None = field(default=None, compare=False)

    def __getstate__(self) -> list[object]:
        """Leave step, routing and cells out of copies and pickles: they belong to one call."""
        kept = {item.name: getattr(self, item.name) for item in fields(self)}
        own = {"timestep": None, "cells": None, "cell_grid": (), "routing": None}
        return list((kept | own).values())

    def spread_timestep(
        self, x: Float[Tensor, "b s d"]
    ) -> Float[Tensor, " b"] | Int[Tensor, " b"] | None:
        """Return the diffusion step of each sample.

        Args:
            x: the sequence, which tells how many samples there are and where they lie.

        Returns:
            One number per sample `(b)`; None if the host has no step, or not one per sample.

        Example:
            >>> import torch
            >>> HostNumbers((1, 3), timestep=torch.tensor(7)).spread_timestep(torch.zeros(2, 3, 4))
            tensor([7, 7])
        """
        value, b = self.timestep, x.shape[0]
        if value is None:
            return None
        if value.ndim == 0 or value.numel() == 1:
            return value.reshape(1).expand(b).to(x.device)
        if value.shape[0] != b or value.numel() != b:
            return None
        return value.reshape(b).to(x.device)


def join_numbers(before: HostNumbers | None, part: HostNumbers) -> HostNumbers:
    """Return what two entrances of one forward pass handed over.

    A pass that failed between its entrances and its blocks may have left something behind: what
    comes a second time begins a new pass, and a step of the former one is forgotten. Where a host
    embeds two times by one module, the first counts.

    Args:
        before: what was handed over since the block list ran last.
        part: what an entrance hands over now; without a grid, it is the step alone, or what the
            host's router said and the cells that it chose, behind both.

    Returns:
        Both.

    Example:
        >>> import torch
        >>> step, grid = HostNumbers((), timestep=torch.tensor([3])), HostNumbers((4, 4))
        >>> both = join_numbers(join_numbers(None, grid), step)
        >>> both.grid, both.timestep
        ((4, 4), tensor([3]))
        >>> join_numbers(both, grid).timestep is None
        True
    """
    came = "" if before is None else before.came
    if part.cells is not None or part.routing is not None:
        known = HostNumbers(()) if before is None else before
        if part.cells is None:
            return replace(known, routing=part.routing)
        return replace(known, cells=part.cells, cell_grid=part.cell_grid)
    if part.grid:
        if part.timestep is not None or before is None or came not in ("s", "sgs"):
            return replace(part, came="g")
        return replace(part, timestep=before.timestep, came="sg")
    if before is None:
        return replace(part, came="s")
    if came == "gs":
        return before
    came = came if came.endswith("s") else came + "s"
    return replace(before, timestep=part.timestep, came=came)


class HandedNumbers:
    """The numbers between the entrances of a host and its block list, each thread's own.

    A compiled graph has one place for them, which it reads and clears itself.

    Example:
        >>> handed = HandedNumbers()
        >>> handed.put(HostNumbers((4, 4)))
        >>> handed.take().grid, handed.take()
        ((4, 4), None)
    """

    def __init__(self) -> None:
        self.by_thread: dict[int, HostNumbers] = {}
        self.of_graph: HostNumbers | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave them out of copies and pickles: they belong to one call."""
        return {"by_thread": {}, "of_graph": None}

    @property
    def is_empty(self) -> bool:
        """Whether no call has left any."""
        return not self.by_thread and self.of_graph is None

    def put(self, numbers: HostNumbers) -> None:
        """Keep numbers until the block list takes them."""
        if torch.compiler.is_compiling():
            self.of_graph = numbers
        else:
            self.by_thread[threading.get_ident()] = numbers

    def take(self) -> HostNumbers | None:
        """Return the numbers of this thread, once."""
        own = self.of_graph
        self.of_graph = None
        if torch.compiler.is_compiling():
            return own
        return self.by_thread.pop(threading.get_ident(), None) or own

    def clear(self) -> None:
        """Forget what calls that failed have left."""
        self.by_thread.clear()
        self.of_graph = None
