"""Blocks that add their own bias of relative positions to attention: forms for few tokens.

Such a block makes a bias for every pair of tokens of the whole image, and cannot take fewer. A form
of the block runs its own submodules on the pairs that are left.
"""

import math

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from adaptok.backbones.block_forms import is_exactly
from adaptok.calls import BlockCall, surround
from adaptok.errors import UnsupportedModelError


def check_form(block: nn.Module, home: str, names: tuple[str, ...], attention: str) -> None:
    """Raise an `UnsupportedModelError` unless a form of a block is known.

    Args:
        block: a block with its own bias of relative positions.
        home: the module of the known classes.
        names: the known classes of blocks.
        attention: the known class of their attention.
    """
    known = any(is_exactly(block, home, name) for name in names)
    if not known or not is_exactly(block.attn, home, attention):
        raise UnsupportedModelError(
            f"{type(block).__name__} with {type(block.attn).__name__} adds its own bias of "
            "relative positions, which has a row for every token: fewer tokens are known for "
            f"exactly {' and '.join(names)} with {attention} of {home}"
        )


def find_rows(call: BlockCall) -> Int[Tensor, "b s"]:
    """Return the row that each token of a short sequence had in the whole one."""
    assert call.cells is not None
    behind = call.x.shape[1] - call.start - call.num_cells
    n = math.prod(call.grid)
    return surround(call.cells, call.start, n, call.start + n + behind)


def take_pairs(
    bias: Float[Tensor, "1 heads s s"], rows: Int[Tensor, "b m"]
) -> Float[Tensor, "b heads m m"]:
    """Return the bias between the tokens that are left of each sample.

    Args:
        bias: of all pairs of tokens, `(1 heads s s)`.
        rows: rows that are left, `(b m)`.

    Returns:
        Bias of each sample.

    Example:
        >>> import torch
        >>> bias = torch.arange(9.0).view(1, 1, 3, 3)
        >>> take_pairs(bias, torch.tensor([[0, 2]]))[0, 0]
        tensor([[0., 2.],
                [6., 8.]])
    """
    pairs = rows[:, :, None] * bias.shape[-1] + rows[:, None, :]
    flat = rearrange(bias, "1 heads q k -> heads (q k)")
    taken = flat.index_select(1, pairs.flatten())
    b, m = rows.shape
    return rearrange(taken, "heads (b q k) -> b heads q k", b=b, q=m)


def attend_biased(
    qkv: Float[Tensor, "b m three_d"], attn: nn.Module, bias: Float[Tensor, "b heads m m"]
) -> Float[Tensor, "b m d"]:
    """Attend with a bias, as the attention module itself would.

    Args:
        qkv: queries, keys and values side by side.
        attn: attention of the host, with `num_heads`, `scale`, dropout and projection.
        bias: added to the logits.

    Returns:
        What the attention module returns.
    """
    q, k, v = rearrange(qkv, "b m (three h e) -> three b h m e", three=3, h=attn.num_heads)
    if "q_norm" in attn._modules:
        q, k = attn.q_norm(q), attn.k_norm(k)  # type: ignore[operator]
    rate = attn.attn_drop.p if attn.training else 0.0  # type: ignore[union-attr]
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=bias,
        dropout_p=rate,  # type: ignore[arg-type]
        scale=attn.scale,  # type: ignore[arg-type]
    )
    projected = attn.proj(rearrange(out, "b h m e -> b m (h e)"))  # type: ignore[operator]
    dropped: Tensor = attn.proj_drop(projected)  # type: ignore[operator]
    return dropped
