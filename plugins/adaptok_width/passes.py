"""Passes through some blocks: on a part of their width, with masks in training, or whole."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adaptok import BlockCall, Budget
from adaptok_width.forms import WidthForm
from adaptok_width.gates import BlockGates
from adaptok_width.masks import BlockWidth
from adaptok_width.running import run_masked, run_sliced, run_whole
from adaptok_width.table import StepTable

Ratio = Float[Tensor, " b"]


def pass_on_part(
    gates: BlockGates,
    forms: Sequence[WidthForm],
    call: BlockCall,
    widths: Sequence[BlockWidth],
    cut: StepTable | None,
    limit: Budget,
    begin: int,
) -> tuple[Float[Tensor, "b s d"], Ratio]:
    """Run blocks on a part of their width; all samples are of one step.

    Args:
        gates: the routers.
        forms: the blocks.
        call: their tokens.
        widths: what runs in each of them.
        cut: where weights that were cut are kept; None cuts them for this call.
        limit: how many tokens run each MLP.
        begin: place of the first block among the blocks of the wrap.

    Returns:
        The tokens after the blocks, and each sample's share of the operations.
    """
    keeper = cut or StepTable(0)
    keep, shape = cut is not None, gates.shape
    ratios = []
    for place, (form, width) in enumerate(zip(forms, widths, strict=True), begin):
        heads = keeper.find_heads(form, place, width.heads, keep=keep)
        groups = keeper.find_groups(form, place, width.groups, shape.groups, keep=keep)
        choose = gates.choose_tokens(place, call, limit)
        x, tokens = run(call, run_sliced, form, call, heads, groups, choose)
        call = call.with_x(x)
        shares = (len(width.heads) / shape.heads, len(width.groups) / shape.groups)
        ratios.append(gates.weigh(call, *shares, tokens))
    return call.x, torch.stack(ratios).mean(0)


def pass_masked(
    gates: BlockGates,
    forms: Sequence[WidthForm],
    call: BlockCall,
    limit: Budget,
    begin: int,
) -> tuple[Float[Tensor, "b s d"], Ratio]:
    """Run whole blocks, and multiply what is off by zero (see `pass_on_part`)."""
    masks = gates.draw_masks(call, slice(begin, begin + len(forms)), limit)
    ratios = []
    for form, mask in zip(forms, masks, strict=True):
        x, tokens = run(call, run_masked, form, call, mask, gates.shape.groups)
        call = call.with_x(x)
        heads = 1.0 if mask.heads is None else mask.heads.mean(1)
        groups = 1.0 if mask.groups is None else mask.groups.mean(1)
        ratios.append(gates.weigh(call, heads, groups, tokens))
    return call.x, torch.stack(ratios).mean(0)


def pass_whole(forms: Sequence[WidthForm], call: BlockCall) -> Float[Tensor, "b s d"]:
    """Run blocks with all that they have."""
    for form in forms:
        call = call.with_x(run(call, run_whole, form, call))
    return call.x


def run(call: BlockCall, function: Callable[..., Any], *given: object) -> Any:  # noqa: ANN401
    """Run a block, checkpointed where the host checkpoints its blocks."""
    if call.checkpoint and torch.is_grad_enabled():
        return checkpoint(function, *given, use_reentrant=False)
    return function(*given)
