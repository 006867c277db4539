"""The moving average of H-Net's dechunker, over runs of any length at once."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

LEAST = 1e-4  # probabilities are kept this far from 0 and 1


def smooth_runs(
    h: Float[Tensor, "t d"],
    prob: Float[Tensor, " t"],
    place: Int[Tensor, " t"],
    longest: int,
) -> Float[Tensor, "t d"]:
    """Smooth each run of tokens from its first to its last one.

    `z_k = P_k h_k + (1 - P_k) z_(k-1)` with P clamped to [1e-4, 1 - 1e-4]. A run begins with
    `z_0 = h_0`, as it does where the first probability is 1, so that weights sum to one.

    Computed by doubling: after `s` steps each token has taken in the `2 ** s` tokens up to itself.
    Nothing is divided, so that long runs lose nothing: a weight that underflows is too small to
    count. What one run gets does not depend on the others, bit for bit.

    Args:
        h: tokens of all runs, one run behind the other.
        prob: probability of each token.
        place: place of each token in its run, from 0.
        longest: at least the length of the longest run.

    Returns:
        The smoothed tokens.

    Example:
        >>> h = torch.tensor([[8.0], [0.0], [4.0], [1.0]])
        >>> smooth_runs(h, torch.tensor([1.0, 0.5, 0.5, 0.9]), torch.tensor([0, 1, 2, 0]), 3)
        tensor([[8.],
                [4.],
                [4.],
                [1.]])

    Paper: Hwang et al., Dynamic Chunking for End-to-End Hierarchical Sequence Modeling, 2025.
    """
    weight = torch.where(place == 0, 1.0, prob.clamp(LEAST, 1.0 - LEAST))
    keep = (1.0 - weight)[:, None]
    z = weight[:, None] * h
    distance = 1
    while distance < longest:
        inside = (place >= distance)[:, None]
        # selected, not multiplied by zero: what is no number must not cross from run to run
        z = torch.addcmul(z, keep, torch.where(inside, shift_rows(z, distance), 0.0))
        keep = keep * torch.where(inside, shift_rows(keep, distance), 0.0)
        distance *= 2
    return z


def shift_rows(x: Float[Tensor, "t d"], distance: int) -> Float[Tensor, "t d"]:
    """Move each row down by a distance; zeros follow."""
    return F.pad(x, (0, 0, distance, 0))[: x.shape[0]]
