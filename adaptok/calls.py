"""One call of a host's block list: its tokens, and all that the blocks take beside them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptok.errors import HandOverError, ShapeError
from adaptok.host_numbers import HostNumbers as HostNumbers
from adaptok.observers import Observer, PartObserver
from adaptok.routing import Context
from adaptok.standing import Standing
from adaptok.tokens import Grid, Tokens


@dataclass(frozen=True, slots=True, eq=False)
class TokenInput:
    """An argument of the blocks that has one row per token, such as a rotary table.

    Args:
        value: the tensor.
        axes: the axes along the tokens; two for a mask of pairs.
        start: the row of the first grid cell.
        batched: whether axis 0 is the batch, of the length `b` or 1; without a batch axis,
            samples that keep different cells cannot run together.

    Example:
        >>> rope = TokenInput(torch.arange(8.0).view(1, 4, 2), axes=(1,), start=1, batched=True)
        >>> rope.take(torch.tensor([[0, 2], [1, 2]]), 3, None).value[..., 0]
        tensor([[0., 2., 6.],
                [0., 4., 6.]])
    """

    value: Tensor
    axes: tuple[int, ...]
    start: int = 0
    batched: bool = True

    def take(self, places: Int[Tensor, "b m"], n: int, samples: Tensor | None) -> "TokenInput":
        """Return the rows of some grid cells, and all rows that belong to none.

        Args:
            places: which of the `n` grid cells to take, `(b m)`.
            n: how many grid cells there are now.
            samples: which samples of the batch to take, `(b)`; None means all.

        Returns:
            The rows in front of the cells, those of the cells, and those behind them.
        """
        value = self.value
        if self.batched and samples is not None and value.shape[0] != 1:
            value = value.index_select(0, samples)
        for axis in self.axes:
            length = value.shape[axis]
            if length == 1:  # broadcast over tokens
                continue
            rows = surround(places, self.start, n, length)
            value = (
                take_rows(value, rows, axis) if self.batched else value.index_select(axis, rows[0])
            )
        return replace(self, value=value)


@dataclass(frozen=True, slots=True, eq=False)
class TakenInputs(Sequence[TokenInput]):
    """Arguments that differ from block to block, each gathered when its block asks for it.

    All of them at once would fill the memory that checkpointing saves.

    Args:
        values: the arguments, one per block.
        places: which grid cells to take, `(b m)`.
        n: how many grid cells there were.
        samples: which samples to take; None means all.
    """

    values: Sequence[TokenInput]
    places: Int[Tensor, "b m"]
    n: int
    samples: Int[Tensor, " b"] | None

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> TokenInput: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[TokenInput]: ...

    def __getitem__(self, index: int | slice) -> TokenInput | Sequence[TokenInput]:
        if isinstance(index, slice):
            return TakenInputs(self.values[index], self.places, self.n, self.samples)
        return self.values[index].take(self.places, self.n, self.samples)


def surround(places: Int[Tensor, "b m"], start: int, n: int, length: int) -> Int[Tensor, "b s"]:
    """Return the rows of some cells with all rows in front of and behind the `n` cells."""
    b, device = places.shape[0], places.device
    before = torch.arange(start, device=device).expand(b, start)
    after = torch.arange(start + n, length, device=device).expand(b, length - start - n)
    return torch.cat([before, places + start, after], dim=1)


def take_rows(value: Tensor, rows: Int[Tensor, "b m"], axis: int) -> Tensor:
    """Gather other rows of each sample along one axis; axis 0 is the batch or has length 1."""
    b, m = rows.shape
    shape = [1] * value.ndim
    shape[0], shape[axis] = b, m
    target = list(value.shape)
    target[0], target[axis] = b, m
    value = value.expand(b, *value.shape[1:])
    return value.gather(axis, rows.view(shape).expand(target))


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some samples of a batch, which run apart from the others.

    Args:
        samples: which ones, `(b)`.
        batch: how many samples the batch has.
    """

    samples: Int[Tensor, " b"]
    batch: int


@dataclass(frozen=True, slots=True, eq=False)
class BlockCall:
    """What flows through the blocks of a host, and what stays the same for all of them.

    Args:
        x: the sequence that holds the grid cells, `(b s d)`: first `start` prefix tokens, then
            the cells, then whatever follows.
        grid: lengths of the grid axes.
        start: row of the first grid cell.
        cells: flat grid cell of each grid token that is left, `(b m)`; None means all, in order.
        streams: other sequences that the blocks change, such as the text of a joint model.
        token_inputs: arguments with one row per token of `x`.
        sample_inputs: arguments with one row per sample.
        shared: arguments that are the same for all samples.
        condition: conditioning vector of each sample, `(b c)`.
        numbers: what the host's forward handed over.
        checkpoint: whether each block is to be checkpointed by itself.
        observers: who is told what stages decide.
        depth_inputs: arguments that differ from block to block, one per block.
        timestep: diffusion step of each sample on the host's own scale, `(b)`; None where the host
            has none.
        has_class: whether row 0 is a class token. Prefix tokens alone do not say so: they may be
            registers or text.
        part: which samples of the host's batch these are; None means all.
        timestep_scale: the steps of pure noise and of a clean image, where the family has one.
        standing: where the tokens stand in the image, if the host itself chose them for this step;
            None once a stage has taken some of them.

    Raises:
        HandOverError: the sequence has no room for the cells of the grid.

    Example:
        >>> call = BlockCall(torch.arange(10.0).view(1, 5, 2), grid=(2, 2), start=1)
        >>> short = call.take(torch.tensor([[0, 3]]))
        >>> short.x[0, :, 0], short.num_cells
        (tensor([0., 2., 8.]), 2)
    """

    x: Float[Tensor, "b s d"]
    grid: Grid
    start: int = 0
    cells: Int[Tensor, "b m"] | None = None
    streams: Mapping[str, Tensor | None] = field(default_factory=dict)
    token_inputs: Mapping[str, TokenInput] = field(default_factory=dict)
    sample_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, object] = field(default_factory=dict)
    depth_inputs: Mapping[str, Sequence[TokenInput]] = field(default_factory=dict)
    condition: Float[Tensor, "b c"] | None = None
    numbers: HostNumbers | None = None
    checkpoint: bool = False
    observers: tuple[Observer, ...] = ()
    timestep: Float[Tensor, " b"] | Int[Tensor, " b"] | None = None
    has_class: bool = False
    part: Part | None = None
    timestep_scale: tuple[float, float] | None = None
    standing: Standing | None = None

    def __post_init__(self) -> None:
        if self.start + self.num_cells > self.x.shape[1]:
            raise HandOverError(
                f"the blocks got {self.x.shape[1]} tokens, which cannot hold {self.start} in front "
                f"and {self.num_cells} of the grid {self.grid}: the host dropped, padded or "
                "windowed patches on the way, which is not supported"
            )

    @property
    def num_cells(self) -> int:
        """How many grid tokens there are now."""
        return math.prod(self.grid) if self.cells is None else self.cells.shape[1]

    @property
    def cell_x(self) -> Float[Tensor, "b m d"]:
        """The features of the grid tokens."""
        return self.x[:, self.start : self.start + self.num_cells]

    @property
    def tokens(self) -> Tokens:
        """The grid tokens, as routers and chunkers take them."""
        return Tokens(self.cell_x, self.grid, self.cells)

    @property
    def context(self) -> Context:
        """What a router may know beside the tokens."""
        numbers = self.numbers
        branch = numbers.branches[0] if numbers and len(numbers.branches) == 1 else None
        return Context(
            condition=self.condition,
            timestep=self.timestep,
            branch=branch,
            request=numbers.request if numbers else None,
        )

    def with_x(self, x: Float[Tensor, "b s d"]) -> "BlockCall":
        """Return the call with other features of all its tokens."""
        return replace(self, x=x)

    def take(
        self,
        places: Int[Tensor, "b m"],
        x: Float[Tensor, "b m d"] | None = None,
        samples: Int[Tensor, " b"] | None = None,
    ) -> "BlockCall":
        """Return the call of fewer grid tokens, and perhaps fewer samples.

        Args:
            places: which of the grid tokens stay, `(b m)`.
            x: their features; None takes those that they have.
            samples: which samples of the batch `places` belongs to; None means all.

        Returns:
            The same call with every per-token and per-sample input gathered alike.
        """
        n, stop = self.num_cells, self.start + self.num_cells
        rest = self.x if samples is None else self.x.index_select(0, samples)
        if x is None:
            x = take_rows(rest[:, self.start : stop], places, 1)
        cells = self.cells
        if cells is not None:
            cells = (cells if samples is None else cells.index_select(0, samples)).gather(1, places)
        return replace(
            self,
            x=join_rows(rest[:, : self.start], x.to(rest.dtype), rest[:, stop:]),
            cells=places if cells is None else cells,
            streams={k: choose(v, samples) for k, v in self.streams.items()},
            token_inputs={k: v.take(places, n, samples) for k, v in self.token_inputs.items()},
            depth_inputs={
                k: TakenInputs(v, places, n, samples) for k, v in self.depth_inputs.items()
            },
            sample_inputs={k: choose_sample(v, samples) for k, v in self.sample_inputs.items()},
            condition=choose(self.condition, samples),
            timestep=choose(self.timestep, samples),
            observers=self.observe_part(samples),
            part=self.choose_part(samples),
            standing=None,
        )

    def select(self, samples: Int[Tensor, " b"]) -> "BlockCall":
        """Return the call of some samples, with all their tokens.

        Args:
            samples: which samples of the batch go on, `(b)`.

        Returns:
            The same call with every per-sample input chosen alike.

        Example:
            >>> call = BlockCall(torch.randn(3, 4, 2), grid=(2, 2))
            >>> call.select(torch.tensor([2, 0])).x.shape
            torch.Size([2, 4, 2])
        """
        n = self.num_cells
        places = torch.arange(n, device=self.x.device).expand(len(samples), n)
        return replace(
            self.take(places, None, samples),
            cells=choose(self.cells, samples),
            standing=None if self.standing is None else self.standing.select(samples),
        )

    def choose_part(self, samples: Tensor | None) -> Part | None:
        """Return which samples of the host's batch some of these are."""
        if samples is None:
            return self.part
        if self.part is None:
            return Part(samples, self.x.shape[0])
        return replace(self.part, samples=self.part.samples.index_select(0, samples))

    def observe_part(self, samples: Tensor | None) -> tuple[Observer, ...]:
        """Return the observers of some samples."""
        if samples is None or not self.observers:
            return self.observers
        chosen = samples.tolist()
        return tuple(PartObserver(seen, chosen, self.x.shape[0]) for seen in self.observers)

    @property
    def rest_x(self) -> Float[Tensor, "b r d"]:
        """The features of all tokens that are no grid cells."""
        stop = self.start + self.num_cells
        return torch.cat([self.x[:, : self.start], self.x[:, stop:]], dim=1)

    def put(
        self,
        x: Float[Tensor, "b m d"],
        rest: Float[Tensor, "b r d"],
        streams: Mapping[str, Tensor | None],
    ) -> "BlockCall":
        """Return this call with what came out of the blocks.

        Args:
            x: features of the grid tokens.
            rest: features of all other tokens, those in front of the cells first.
            streams: the other sequences.

        Returns:
            The call after the blocks.

        Raises:
            ShapeError: there is not one row per grid token.
        """
        if x.shape[1] != self.num_cells:
            raise ShapeError(
                f"{self.num_cells} grid tokens are needed again, and {x.shape[1]} came back: a "
                "dechunker returns one token per cell"
            )
        whole = join_rows(rest[:, : self.start], x.to(self.x.dtype), rest[:, self.start :])
        return replace(self, x=whole, streams=streams)


def join_rows(*parts: Float[Tensor, "b _ d"]) -> Float[Tensor, "b s d"]:
    """Concatenate along the tokens; nothing is copied if only one part has any."""
    filled = [part for part in parts if part.shape[1] > 0]
    return filled[0] if len(filled) == 1 else torch.cat(filled, dim=1)


def choose(value: Tensor | None, samples: Tensor | None) -> Tensor | None:
    """Return some samples of a tensor; None of either stays what it is."""
    return value if value is None or samples is None else value.index_select(0, samples)


def choose_sample(value: Tensor, samples: Tensor | None) -> Tensor:
    """Return some samples of an argument; one that is the same for all stays whole."""
    if samples is None or value.ndim == 0 or value.shape[0] == 1:
        return value
    return value.index_select(0, samples)


def merge_samples(
    parts: Sequence[BlockCall], samples: Sequence[Sequence[int]]
) -> tuple[Float[Tensor, "b r d"], dict[str, Tensor | None]]:
    """Put what is no grid cell of groups of samples into one batch again.

    Args:
        parts: the groups after the blocks.
        samples: which samples each group has.

    Returns:
        The tokens that are no cells, `(b r d)`, and the streams.
    """
    if len(parts) == 1:
        return parts[0].rest_x, dict(parts[0].streams)
    order = [sample for group in samples for sample in group]
    back = torch.tensor(order, device=parts[0].x.device).argsort()
    rest = torch.cat([part.rest_x for part in parts]).index_select(0, back)
    streams: dict[str, Tensor | None] = {}
    for name in parts[0].streams:
        tensors = []
        for part in parts:  # no comprehension: a graph cannot read `name` inside one
            value = part.streams[name]
            if value is not None:
                tensors.append(value)
        streams[name] = torch.cat(tensors).index_select(0, back) if tensors else None
    return rest, streams
