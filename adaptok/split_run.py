"""Blocks in two halves: attention with its residual, then the MLP, and a place between them.

What runs between the halves may merge or drop tokens by the keys, or by the attention of the class
token; what it merged counts by its size in the attention of the next block.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from adaptok.calls import BlockCall
from adaptok.errors import ShapeError

KeyBias = Float[Tensor, "b s"] | Float[Tensor, "b heads s"] | None


@dataclass(frozen=True, slots=True, eq=False)
class Attended:
    """What a block has done when it has attended, and has not run its MLP.

    Args:
        call: the call with the tokens after the attention residual.
        keys: keys of all tokens, `(b key_heads s e)`: behind the key norm where there is one, and
            before rotation, so that they tell what a token is and not where. Heads are those of
            the keys, which may be fewer than those of the queries.
        class_attention: how much the first token attends to each token, `(b heads s)`; float32
            where the model has half precision, so that a ranking has no ties.
    """

    call: BlockCall
    keys: Float[Tensor, "b key_heads s e"] | None = None
    class_attention: Float[Tensor, "b heads s"] | None = None


class SplitBlock(Protocol):
    """A block in two halves; `finish(attend(call).call)` is the block.

    Each half draws its own random numbers in training (dropout, whole samples dropped), as the
    block does.
    """

    def attend(
        self,
        call: BlockCall,
        *,
        key_bias: KeyBias = None,
        keys: bool = False,
        class_attention: bool = False,
    ) -> Attended:
        """Run attention with its norm, scale and residual.

        Args:
            call: the tokens, and what the block takes beside them.
            key_bias: number added to the logits of each key, such as the logarithm of how many
                tokens it stands for; None is the block's own way.
            keys: whether keys are wanted.
            class_attention: whether the attention of the first token is wanted.

        Returns:
            The tokens after the attention residual, and what was wanted.
        """

    def at(self, index: int) -> "SplitBlock":
        """Return the same block at another place of the list."""

    def finish(self, call: BlockCall) -> BlockCall:
        """Run the MLP with its norm, scale and residual, on as many tokens as there are left."""


def join_bias(
    mask: Float[Tensor, "..."] | Bool[Tensor, "..."] | None,
    key_bias: KeyBias,
    q: Float[Tensor, "b heads s e"],
) -> Float[Tensor, "..."] | Bool[Tensor, "..."] | None:
    """Return one mask for attention out of the host's mask and a bias of each key.

    Args:
        mask: what the host gives to attention: added to the logits, or False where nothing may be
            attended to; its last axis is the keys.
        key_bias: number added to the logits of each key.
        q: the queries.

    Returns:
        The mask as it is if there is no bias; otherwise what is added to the logits, with a row of
        length 1 where all queries add the same.

    Raises:
        ShapeError: there is not one bias for each key.

    Example:
        >>> q, sizes = torch.zeros(2, 4, 3, 8), torch.tensor([[1.0, 2.0, 4.0]])
        >>> join_bias(None, sizes.log().expand(2, 3), q).shape
        torch.Size([2, 1, 1, 3])
    """
    if key_bias is None:
        return mask
    b, heads, s, _ = q.shape
    if key_bias.shape not in ((b, s), (b, heads, s)):
        raise ShapeError(
            f"key_bias has one number for each of {s} keys, ({b}, {s}) or ({b}, {heads}, {s}), got "
            f"{tuple(key_bias.shape)}"
        )
    bias = key_bias.to(q.dtype)
    bias = bias[:, None, None] if bias.ndim == 2 else bias[:, :, None]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, bias.new_full((), -torch.inf))
    return mask + bias


def attend_class(
    q: Float[Tensor, "b heads s e"],
    k: Float[Tensor, "b heads s e"],
    mask: Float[Tensor, "..."] | Bool[Tensor, "..."] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b heads s"]:
    """Return how much the first token attends to each token, at the cost of one row.

    Args:
        q: queries, of which only the first is read.
        k: keys.
        mask: as attention takes it, with a row for each query or one for all.
        scale: factor of the logits; None means `e ** -0.5`.

    Returns:
        Weights that sum to one over the tokens.

    Example:
        >>> attend_class(torch.zeros(1, 2, 4, 8), torch.randn(1, 2, 4, 8))[0, 0]
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (q[:, :, :1] * scale) @ rearrange(k, "b h s e -> b h e s")
    logits = logits.to(torch.promote_types(q.dtype, torch.float32))
    if mask is not None:
        row = mask[..., :1, :]
        is_bool = row.dtype == torch.bool
        logits = logits.masked_fill(~row, -torch.inf) if is_bool else logits + row
    return logits.softmax(-1)[:, :, 0]
