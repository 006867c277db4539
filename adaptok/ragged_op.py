"""Ragged attention as one operator, so that a compiled graph does not look at the lengths.

A loop over samples, traced, would make a graph per batch. As an operator it is one node of a graph
whose token count may change; its gradient computes the weights again.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.errors import ConfigError, ShapeError

Attend = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], Tensor | None, float], Tensor]
RUNGS: dict[str, Attend] = {}  # filled by adaptok.attention, whose rungs these are


@torch.library.custom_op("adaptok::attend_ragged", mutates_args=())
def attend_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor,
    key_bias: Tensor | None,
    scale: float,
    rung: str,
) -> Tensor:
    """Let the tokens of each sample attend to each other (see `adaptok.attention.attend_packed`).

    Args:
        q: queries, `(t heads e)`.
        k: keys, `(t heads e)`.
        v: values, `(t heads e)`.
        sizes: tokens of each sample, on the host, `(b)`.
        key_bias: number added to every logit of a key, `(t heads)`.
        scale: factor of the logits.
        rung: `"padded"` or `"loop"`.

    Returns:
        The attended values, `(t heads e)`.
    """
    lengths = tuple(sizes.tolist())
    if sum(lengths) != q.shape[0]:
        raise ShapeError(f"lengths of {sum(lengths)} tokens came for {q.shape[0]} tokens")
    return find_rung(rung)(q, k, v, lengths, key_bias, scale).contiguous()


@attend_ragged.register_fake
def shape_attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor,
    key_bias: Tensor | None,
    scale: float,
    rung: str,
) -> Tensor:
    """Return a tensor of the shape of the answer."""
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op("adaptok::attend_ragged_backward", mutates_args=())
def attend_ragged_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys, values and key bias (empty if there is none)."""
    parts = (grad, q, k, v) if key_bias is None else (grad, q, k, v, key_bias)
    samples = zip(*(x.split(sizes.tolist()) for x in parts), strict=True)
    grads = [differentiate(*(widen(x) for x in sample), scale=scale) for sample in samples]
    of_q, of_k, of_v, of_bias = (torch.cat(pieces) for pieces in zip(*grads, strict=True))
    bias = q.new_empty(0) if key_bias is None else of_bias.to(key_bias.dtype)
    return of_q.to(q.dtype), of_k.to(q.dtype), of_v.to(q.dtype), bias


def widen(x: Tensor) -> Tensor:
    """Return a tensor in at least single precision."""
    return x if x.dtype == torch.float64 else x.float()


def differentiate(
    grad: Float[Tensor, "m heads e"],
    q: Float[Tensor, "m heads e"],
    k: Float[Tensor, "m heads e"],
    v: Float[Tensor, "m heads e"],
    key_bias: Float[Tensor, "m heads"] | None = None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of one sample's queries, keys, values and key bias.

    An operator runs below autograd, so that the formulas stand here: with `p = softmax(s)`, the
    gradient of the logits is `p (g_p - sum_j p g_p)`.
    """
    logits = scale * torch.einsum("ihe,jhe->hij", q, k)
    if key_bias is not None:
        logits = logits + key_bias.T[:, None]
    p = logits.softmax(-1)
    of_p = torch.einsum("ihe,jhe->hij", grad, v)
    of_logits = p * (of_p - (p * of_p).sum(-1, keepdim=True))
    return (
        scale * torch.einsum("hij,jhe->ihe", of_logits, k),
        scale * torch.einsum("hij,ihe->jhe", of_logits, q),
        torch.einsum("hij,ihe->jhe", p, grad),
        of_logits.sum(1).T,
    )


@attend_ragged_backward.register_fake
def shape_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Tensor,
    key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tensors of the shapes of the gradients."""
    of_bias = q.new_empty(0) if key_bias is None else torch.empty_like(key_bias)
    shape = q.shape
    return q.new_empty(shape), k.new_empty(shape), v.new_empty(shape), of_bias


def keep_for_backward(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor
) -> None:
    """Keep what the gradient needs."""
    q, k, v, sizes, key_bias, scale, _ = inputs
    ctx.save_for_backward(q, k, v, sizes, key_bias)  # type: ignore[arg-type]
    ctx.scale = scale  # type: ignore[attr-defined]


def run_backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradient of each argument."""
    q, k, v, sizes, key_bias = ctx.saved_tensors  # type: ignore[attr-defined]
    grads = torch.ops.adaptok.attend_ragged_backward(grad, q, k, v, sizes, key_bias, ctx.scale)  # type: ignore[attr-defined]
    of_bias = None if key_bias is None else grads[3]
    return grads[0], grads[1], grads[2], None, of_bias, None, None


attend_ragged.register_autograd(run_backward, setup_context=keep_for_backward)


def find_rung(rung: str) -> Attend:
    """Return a way to attend by its name."""
    if rung not in RUNGS:
        raise ConfigError(f"rung is one of {', '.join(RUNGS)}, got {rung!r}")
    return RUNGS[rung]
