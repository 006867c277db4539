"""Runs a block on some of its heads, channels and tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from adaptok import BlockCall
from adaptok_width.forms import WidthForm
from adaptok_width.slicing import GroupSlice, HeadSlice, slice_groups, slice_heads

# Takes what the MLP would take, and says which tokens run it.
ChooseTokens = Callable[[Float[Tensor, "b s d"]], tuple[Bool[Tensor, "b s"], int | None]]
# The same in training: one number per token, 1 or 0, with a gradient.
MaskTokens = Callable[[Float[Tensor, "b s d"]], Float[Tensor, "b s"]]


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """What multiplies the parts of a block in training.

    Args:
        heads: of each head; None means all of them.
        groups: of each channel group.
        tokens: gives one number per token.
    """

    heads: Float[Tensor, "b heads"] | None = None
    groups: Float[Tensor, "b groups"] | None = None
    tokens: MaskTokens | None = None


def run_whole(form: WidthForm, call: BlockCall) -> Float[Tensor, "b s d"]:
    """Run a block with all that it has, through its form."""
    heads = slice_heads(form, range(form.heads))
    return run_sliced(form, call, heads, slice_groups(form, (0,), 1), None)[0]


def run_sliced(
    form: WidthForm,
    call: BlockCall,
    heads: HeadSlice,
    groups: GroupSlice,
    choose: ChooseTokens | None,
) -> tuple[Float[Tensor, "b s d"], Float[Tensor, " b"] | None]:
    """Run a block on some heads, some channels, and its MLP on some tokens.

    Args:
        form: the block.
        call: its tokens, all of which attend.
        heads: the layers of attention, with the heads that run.
        groups: the layers of the MLP, with the channels that run.
        choose: says which tokens run the MLP, and how many if that is known; None means all.

    Returns:
        The tokens after the block, and the share of each sample's tokens that ran the MLP.
    """
    form.check(call)
    x, gate, y = attend(form, call, heads, None)
    if choose is None:
        return torch.addcmul(x, gate, run_mlp(form, y, groups, None)), None
    kept, count = choose(y)
    b, s, d = y.shape
    flat = kept.flatten()
    # where the count is known, the device need not be waited for
    found = flat.nonzero() if count is None else flat.nonzero_static(size=count)
    rows = found[:, 0]
    out = run_mlp(form, y.reshape(b * s, d).index_select(0, rows), groups, None)
    moved = gate[:, 0].index_select(0, rows // s) * out
    x = x.reshape(b * s, d).index_add(0, rows, moved.to(x.dtype)).view(b, s, d)
    return x, kept.float().mean(1)


def run_masked(
    form: WidthForm, call: BlockCall, masks: Masks, group_count: int
) -> tuple[Float[Tensor, "b s d"], Float[Tensor, " b"] | None]:
    """Run a whole block, and multiply its heads, channels and tokens by masks.

    Args:
        form: the block.
        call: its tokens.
        masks: what multiplies them.
        group_count: how many channel groups there are.

    Returns:
        The tokens after the block, and the share of each sample's tokens that count.
    """
    form.check(call)
    whole = slice_heads(form, range(form.heads))
    x, gate, y = attend(form, call, whole, masks.heads)
    spread = None
    if masks.groups is not None:
        spread = masks.groups.repeat_interleave(form.hidden // group_count, dim=1)[:, None]
    out = gate * run_mlp(form, y, slice_groups(form, (0,), 1), spread)
    if masks.tokens is None:
        return x + out, None
    kept = masks.tokens(y)
    return x + kept[..., None].to(out.dtype) * out, kept.float().mean(1)


def attend(
    form: WidthForm, call: BlockCall, part: HeadSlice, mask: Float[Tensor, "b heads"] | None
) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b 1 d"], Float[Tensor, "b s d"]]:
    """Run the first half of a block.

    Returns:
        The tokens after attention, the gate of the MLP, and what the MLP takes.
    """
    entered = form.enter(call)
    split = (-1, part.heads, form.leave.in_features // form.heads)
    made = [layer(entered.x).unflatten(-1, split) for layer in part.enter]
    q, k, v = made[0].unbind(-3) if len(made) == 1 else (out[..., 0, :, :] for out in made)
    q, k = form.norm_heads(q, k)
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        dropout_p=form.drop_rate, scale=form.scale,
    )  # fmt: skip
    if mask is not None:
        mixed = mixed * mask[:, :, None, None].to(mixed.dtype)
    out = drop(form.dropouts[0], part.leave(mixed.transpose(1, 2).flatten(2)))
    x = torch.addcmul(call.x, entered.gate1, out)  # in one pass over the tokens
    y = torch.addcmul(entered.shift2, form.norm_again(x), 1 + entered.scale2)
    return x, entered.gate2, y


def run_mlp(
    form: WidthForm,
    y: Float[Tensor, "... d"],
    part: GroupSlice,
    mask: Float[Tensor, "b 1 hidden"] | None,
) -> Float[Tensor, "... d"]:
    """Run an MLP with some of its channels, or with a mask over them."""
    _, between, behind = form.dropouts
    hidden = drop(between, form.activation(part.grow(y)))
    if mask is not None:
        hidden = hidden * mask.to(hidden.dtype)
    return drop(behind, part.shrink(hidden))


def drop(module: nn.Module | None, x: Tensor) -> Tensor:
    """Run a dropout where there is one."""
    if module is None:
        return x
    dropped: Tensor = module(x)
    return dropped
