"""Losses of routers."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from adaptok.errors import ConfigError, ShapeError
from adaptok.routing import Routing


def ratio_loss(
    routing: Routing, target: float = 4.0, group_size: int | None = 16
) -> Float[Tensor, ""]:
    """Pull the share of kept cells towards one in `target`, a group of samples at a time.

    `N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G))` with N the target, F the kept share of the
    natural mask and G the mean keep probability of a group; the gradient flows through G. A
    group, not a sample, is pulled, so that images may differ within it.

    Args:
        routing: what the router said; only its natural mask and its probabilities are read, so
            that a budget does not change the loss.
        target: compression N, above 1.
        group_size: samples per group; None means the whole batch. A last group may be smaller.

    Returns:
        The mean over the groups.

    Raises:
        ConfigError: the target is not above 1, or the group is empty.
        ShapeError: the router has no natural mask.

    Example:
        >>> ratio_loss(Routing(torch.tensor([[0.9, 0.9, 0.1, 0.1]])), target=4.0)
        tensor(1.3333)

    Paper: Hwang et al., Dynamic Chunking for End-to-End Hierarchical Sequence Modeling, 2025.
    """
    if not target > 1.0:
        raise ConfigError(f"target is a compression above 1, got {target:g}")
    if group_size is not None and group_size < 1:
        raise ConfigError(f"group_size is at least 1 sample, got {group_size}")
    if routing.natural_mask is None:
        raise ShapeError(
            "the ratio loss needs a natural mask, and this router only ranks cells: give the "
            "routing a threshold"
        )
    kept = routing.natural_mask.float().mean(1)
    prob = routing.keep_prob.float().mean(1)
    size = kept.shape[0] if group_size is None else min(group_size, kept.shape[0])
    whole = kept.shape[0] // size * size
    kept_share = rearrange(kept[:whole], "(g s) -> g s", s=size).mean(1)
    prob_share = rearrange(prob[:whole], "(g s) -> g s", s=size).mean(1)
    if whole < kept.shape[0]:
        kept_share = torch.cat([kept_share, kept[whole:].mean()[None]])
        prob_share = torch.cat([prob_share, prob[whole:].mean()[None]])
    both = (target - 1.0) * kept_share * prob_share + (1.0 - kept_share) * (1.0 - prob_share)
    return (target / (target - 1.0) * both).mean()
