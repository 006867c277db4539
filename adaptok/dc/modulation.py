"""Modulation by the condition: one vector per sample, spread to its tokens where they are run.

What is spread takes as much memory as the tokens. Of packed tokens only the vector of each sample
is kept for the gradient, and spread again there.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from adaptok.attention import Ragged


def modulate(
    x: Float[Tensor, "... d"],
    shift: Float[Tensor, "b d"],
    scale: Float[Tensor, "b d"],
    ragged: Ragged | None = None,
) -> Float[Tensor, "... d"]:
    """Scale the tokens of each sample around 1, and shift them.

    Args:
        x: dense tokens `(b m d)`, or packed ones `(t d)` with their `ragged`.
        shift: of each sample, `(b d)`.
        scale: of each sample, `(b d)`.
        ragged: where the samples lie, for packed tokens.

    Returns:
        Tokens of the same shape.

    Example:
        >>> modulate(torch.ones(2, 1, 1), torch.tensor([[1.0], [2.0]]), torch.ones(2, 1)).flatten()
        tensor([3., 4.])
    """
    if ragged is None:
        return torch.addcmul(shift[:, None], x, (1 + scale)[:, None])
    out: Tensor = AddProduct.apply(shift, x, 1 + scale, ragged.batch, True)
    return out


def add_gated(
    x: Float[Tensor, "... d"],
    gate: Float[Tensor, "b d"],
    update: Float[Tensor, "... d"],
    ragged: Ragged | None = None,
) -> Float[Tensor, "... d"]:
    """Add an update to the tokens of each sample, weighted by its gate.

    Args:
        x: dense tokens `(b m d)`, or packed ones `(t d)` with their `ragged`.
        gate: of each sample, `(b d)`.
        update: what a branch made of the tokens.
        ragged: where the samples lie, for packed tokens.

    Returns:
        Tokens of the same shape.

    Example:
        >>> ragged = Ragged(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 3]), (1, 2))
        >>> x, gate = torch.zeros(3, 1), torch.tensor([[1.0], [2.0]])
        >>> add_gated(x, gate, torch.ones(3, 1), ragged).flatten()
        tensor([1., 2., 2.])
    """
    if ragged is None:
        return torch.addcmul(x, gate[:, None], update)
    out: Tensor = AddProduct.apply(x, update, gate, ragged.batch, False)
    return out


class AddProduct(torch.autograd.Function):
    """`base + x * factor` over packed tokens; factor and, as asked for, base are per sample."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        base: Float[Tensor, "rows d"],
        x: Float[Tensor, "t d"],
        factor: Float[Tensor, "b d"],
        batch: Int[Tensor, " t"],
        base_per_sample: bool,
    ) -> Tensor:
        """Add the product."""
        ctx.save_for_backward(x, factor, batch)
        ctx.base = base.shape, base.dtype, base_per_sample
        spread = base.index_select(0, batch) if base_per_sample else base
        return torch.addcmul(spread, x, factor.index_select(0, batch))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Return the gradients; those of a sample are sums over its tokens."""
        x, factor, batch = ctx.saved_tensors
        shape, dtype, base_per_sample = ctx.base
        needs_base, needs_x, needs_factor, *_ = ctx.needs_input_grad
        of_base = of_x = of_factor = None
        if needs_base:
            whole = grad.new_zeros(shape).index_add(0, batch, grad) if base_per_sample else grad
            of_base = whole.to(dtype)
        if needs_x:
            of_x = (grad * factor.index_select(0, batch)).to(x.dtype)
        if needs_factor:
            sums = grad.new_zeros(factor.shape).index_add(0, batch, grad * x)
            of_factor = sums.to(factor.dtype)
        return of_base, of_x, of_factor, None, None
