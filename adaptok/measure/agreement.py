"""How far one output is from another."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well outputs agree with those of a baseline.

    Args:
        cosine: mean over the samples, outputs centred over the batch where there is one; None
            where they do not vary.
        relative_error: length of the difference by the length of the baseline's outputs; None
            where those are zero.
    """

    cosine: float | None
    relative_error: float | None


def compare_outputs(
    found: Float[Tensor, "b ..."], expected: Float[Tensor, "b ..."]
) -> Agreement | None:
    """Say how well outputs agree with those of a baseline.

    Centring takes away what all samples have in common, such as the mean of all classes, which
    would hide that single samples disagree.

    Args:
        found: outputs, samples first.
        expected: outputs of the baseline.

    Returns:
        The agreement; None if the outputs have no common shape.

    Example:
        >>> import torch
        >>> plain = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> compare_outputs(plain, plain)
        Agreement(cosine=1.0, relative_error=0.0)
        >>> compare_outputs(plain.flip(0), plain).cosine
        -1.0
    """
    if found.shape != expected.shape or found.ndim == 0 or not found.numel():
        return None
    ours, theirs = (
        x.detach().double().flatten(1) if x.ndim > 1 else x.detach().double()[:, None]
        for x in (found, expected)
    )
    length = float(theirs.norm())
    error = float((ours - theirs).norm()) / length if length > 0 else None
    if len(ours) > 1:
        ours, theirs = ours - ours.mean(0), theirs - theirs.mean(0)
    lengths = ours.norm(dim=1) * theirs.norm(dim=1)
    if not bool((lengths > 0).all()):
        return Agreement(None, error)
    cosine = float(((ours * theirs).sum(1) / lengths).clamp(-1, 1).mean())
    return Agreement(cosine, error)
