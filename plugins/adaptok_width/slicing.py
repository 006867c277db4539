"""Weights of heads and channel groups that run: cut out of a block's linear layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptok_width.forms import WidthForm

Runs = tuple[tuple[int, int], ...]


def find_runs(numbers: Sequence[int]) -> Runs:
    """Return increasing numbers as runs `(first, last)`, the last excluded.

    Example:
        >>> find_runs((0, 1, 2, 5, 7, 8))
        ((0, 3), (5, 6), (7, 9))
    """
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return tuple(runs)


def take_runs(value: Tensor, axis: int, runs: Runs) -> Tensor:
    """Return runs of rows along one axis; nothing is copied if there is one.

    Runs, not indices: no tensor of indices has to reach the device.

    Example:
        >>> take_runs(torch.arange(6), 0, ((0, 1), (4, 6)))
        tensor([0, 4, 5])
    """
    pieces = [value.narrow(axis, first, last - first) for first, last in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """Weight and bias of a linear layer, or of a part of it."""

    weight: Float[Tensor, "rows columns"]
    bias: Float[Tensor, " rows"] | None

    def __call__(self, x: Float[Tensor, "... columns"]) -> Float[Tensor, "... rows"]:
        """Run the layer."""
        return nn.functional.linear(x, self.weight, self.bias)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that belong to this part alone."""
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        return sum(x.numel() * x.element_size() for x in tensors if x._base is None)


@dataclass(frozen=True, slots=True, eq=False)
class HeadSlice:
    """The layers of attention with some of its heads.

    Args:
        heads: how many.
        enter: the layer of queries, keys and values, or one for each.
        leave: the layer behind the heads.
    """

    heads: int
    enter: tuple[Layer, ...]
    leave: Layer


@dataclass(frozen=True, slots=True, eq=False)
class GroupSlice:
    """The layers of an MLP with some of its channels."""

    grow: Layer
    shrink: Layer


def slice_heads(form: WidthForm, heads: Sequence[int]) -> HeadSlice:
    """Cut the layers of attention.

    Args:
        form: the block.
        heads: numbers of the heads that run, increasing, at least one.

    Returns:
        The layers; all heads are the block's own weights.
    """
    runs, count = find_runs(heads), form.heads
    leave = form.leave
    if len(heads) == count:
        enter = tuple(Layer(layer.weight, layer.bias) for layer in form.projections)
        return HeadSlice(count, enter, Layer(leave.weight, leave.bias))
    width = leave.in_features // count
    layers = []
    for layer in form.projections:
        parts = layer.out_features // (count * width)  # 3 in a layer of queries, keys and values
        rows = tuple(
            ((part * count + first) * width, (part * count + last) * width)
            for part in range(parts)
            for first, last in runs
        )
        layers.append(Layer(take_runs(layer.weight, 0, rows), cut_bias(layer.bias, rows)))
    columns = scale_runs(runs, width)
    return HeadSlice(
        len(heads), tuple(layers), Layer(take_runs(leave.weight, 1, columns), leave.bias)
    )


def slice_groups(form: WidthForm, groups: Sequence[int], count: int) -> GroupSlice:
    """Cut the layers of an MLP.

    Args:
        form: the block.
        groups: numbers of the channel groups that run, increasing, at least one.
        count: how many groups there are.

    Returns:
        The layers; all groups are the block's own weights.
    """
    grow, shrink = form.grow, form.shrink
    if len(groups) == count:
        return GroupSlice(Layer(grow.weight, grow.bias), Layer(shrink.weight, shrink.bias))
    rows = scale_runs(find_runs(groups), form.hidden // count)
    return GroupSlice(
        Layer(take_runs(grow.weight, 0, rows), cut_bias(grow.bias, rows)),
        Layer(take_runs(shrink.weight, 1, rows), shrink.bias),
    )


def cut_bias(bias: Float[Tensor, " rows"] | None, rows: Runs) -> Float[Tensor, " kept"] | None:
    """Return runs of a bias, where there is one."""
    return None if bias is None else take_runs(bias, 0, rows)


def scale_runs(runs: Runs, size: int) -> Runs:
    """Return runs of groups as runs of their members."""
    return tuple((first * size, last * size) for first, last in runs)
