"""DynamicViT's distillation: the whole model teaches the pruned one."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from adaptok.errors import ShapeError


def distillation_loss(
    logits: Float[Tensor, "b k"],
    teacher_logits: Float[Tensor, "b k"],
    tokens: Float[Tensor, "b n d"] | None = None,
    teacher_tokens: Float[Tensor, "b n d"] | None = None,
    mask: Float[Tensor, "b _"] | None = None,
    *,
    logit_weight: float = 0.5,
    token_weight: float = 0.5,
) -> Float[Tensor, ""]:
    """Return how far a pruned model is from its teacher.

    Args:
        logits: of the pruned model.
        teacher_logits: of the whole one.
        tokens: features of the cells behind the last block; None leaves this part out.
        teacher_tokens: those of the whole model.
        mask: 1 for cells that are left, 0 for others; the last of `DynamicViT.collect_masks`.
        logit_weight: weight of the Kullback-Leibler divergence of the classes.
        token_weight: weight of the mean squared distance of the tokens that are left.

    Returns:
        The weighted sum. Neither the teacher nor the mask gets a gradient.

    Raises:
        ShapeError: tokens come without the teacher's or without a mask, or do not fit.

    Example:
        >>> distillation_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
        tensor(0.)

    Paper: Rao et al., DynamicViT, 2021.
    """
    loss = logit_weight * F.kl_div(
        F.log_softmax(logits.float(), dim=-1),
        F.log_softmax(teacher_logits.detach().float(), dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    if tokens is None:
        return loss
    if teacher_tokens is None or mask is None:
        raise ShapeError("tokens are compared with teacher_tokens= where mask= is 1: give both")
    if tokens.shape != teacher_tokens.shape or mask.shape != tokens.shape[:2]:
        raise ShapeError(
            f"tokens are {tuple(tokens.shape)}, those of the teacher {tuple(teacher_tokens.shape)} "
            f"and the mask {tuple(mask.shape)}: one row per cell is needed, so leave class and "
            "register tokens out"
        )
    distance = ((tokens.float() - teacher_tokens.detach().float()) ** 2).mean(-1)
    left = mask.detach()
    return loss + token_weight * (distance * left).sum() / torch.clamp(left.sum(), min=1.0)
