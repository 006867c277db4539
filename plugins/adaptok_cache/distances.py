"""Distances between steps, sample by sample."""

import torch
from jaxtyping import Float
from torch import Tensor


def relative_change(now: Float[Tensor, "b ..."], before: Float[Tensor, "b ..."]) -> list[float]:
    """Return how far each sample moved: the mean absolute change over the mean absolute value.

    Args:
        now: values of this step.
        before: values of an earlier one.

    Returns:
        One number per sample; 0 where nothing moved, infinite where something came from nothing.

    Example:
        >>> relative_change(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.0]] * 2))
        [1.0, 1.0]
    """
    new, old = now.flatten(1).float(), before.flatten(1).float()
    change, size = (new - old).abs().mean(1), old.abs().mean(1)
    ratio: list[float] = torch.where(change == 0, change, change / size).tolist()
    return ratio
