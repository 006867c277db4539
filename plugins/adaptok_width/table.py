"""Masks of steps that were named before, and the weights that were cut for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptok_width.forms import WidthForm
from adaptok_width.masks import BlockWidth
from adaptok_width.slicing import GroupSlice, HeadSlice, slice_groups, slice_heads

Mark = tuple[tuple[int, int], ...]  # where weights lie, and how often they were written


def round_step(timestep: float) -> float:
    """Return a timestep as a tensor of float32 holds it."""
    return float(torch.tensor(timestep, dtype=torch.float32))


def mark_weights(weights: Sequence[Tensor | None]) -> Mark:
    """Return what changes when weights are moved, replaced or written to.

    A write through `.data` is not seen: `tabulate` again after one.
    """
    present = [weight for weight in weights if weight is not None]
    return tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in present)


def mark_form(form: WidthForm) -> Mark:
    """Return the mark of all layers of a block."""
    layers = (*form.projections, form.leave, form.grow, form.shrink)
    return mark_weights([tensor for layer in layers for tensor in (layer.weight, layer.bias)])


@dataclass(slots=True, eq=False)
class StepTable:
    """What runs at the steps that were named, and weights cut for that.

    Args:
        limit: bytes of weights that are kept at most; others are cut in each call.
        widths: what runs in each block, by step.
        mark: of the routers that said so.
        heads: layers of attention by block and heads, with the mark of the block.
        groups: layers of the MLP by block and groups.
        memory_bytes: bytes of weights that are kept.
    """

    limit: int
    widths: dict[float, tuple[BlockWidth, ...]] = field(default_factory=dict)
    mark: Mark = ()
    heads: dict[tuple[int, tuple[int, ...]], tuple[Mark, HeadSlice]] = field(default_factory=dict)
    groups: dict[tuple[int, tuple[int, ...]], tuple[Mark, GroupSlice]] = field(default_factory=dict)
    memory_bytes: int = 0

    def forget_weights(self) -> None:
        """Forget the weights that were cut."""
        self.heads.clear()
        self.groups.clear()
        self.memory_bytes = 0

    def find_heads(
        self, form: WidthForm, block: int, heads: tuple[int, ...], *, keep: bool
    ) -> HeadSlice:
        """Return the layers of attention with some heads, cut before or now.

        Args:
            form: the block.
            block: its number.
            heads: which heads.
            keep: whether what is cut now may be kept.
        """
        if not keep or len(heads) == form.heads:
            return slice_heads(form, heads)
        mark, known = mark_form(form), self.heads.get((block, heads))
        if known is not None and known[0] == mark:
            return known[1]
        cut = slice_heads(form, heads)
        size = sum(layer.memory_bytes for layer in (*cut.enter, cut.leave))
        if self.has_room(size, known is not None):
            self.heads[block, heads] = (mark, cut)
        return cut

    def find_groups(
        self, form: WidthForm, block: int, groups: tuple[int, ...], count: int, *, keep: bool
    ) -> GroupSlice:
        """Return the layers of an MLP with some groups (see `find_heads`)."""
        if not keep or len(groups) == count:
            return slice_groups(form, groups, count)
        mark, known = mark_form(form), self.groups.get((block, groups))
        if known is not None and known[0] == mark:
            return known[1]
        cut = slice_groups(form, groups, count)
        if self.has_room(cut.grow.memory_bytes + cut.shrink.memory_bytes, known is not None):
            self.groups[block, groups] = (mark, cut)
        return cut

    def has_room(self, size: int, stale: bool) -> bool:
        """Say whether something more can be kept; what is out of date goes first."""
        if stale:  # the weights changed: nothing that was cut from them holds
            self.forget_weights()
        if self.memory_bytes + size > self.limit:
            return False
        self.memory_bytes += size
        return True
