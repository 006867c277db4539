"""timm's VisionTransformer: DeiT, DeiT3, DINOv2, SigLIP, CLIP and many more."""

from typing import Any, Self

from torch import nn

from adaptok.backbones.timm_images import (
    TimmImages,
    check_count,
    describe_model,
    mask_of_pairs,
    refuse_causal,
)
from adaptok.calls import BlockCall, HostNumbers
from adaptok.hosts import bind_arguments, check_blocks, is_instance, require


class TimmViT(TimmImages):
    """Adapter of timm's `VisionTransformer` with any of its block kinds.

    Prefix tokens (class, distillation, registers) stand in front of the cells; positions are added
    before the blocks, so that only a mask of pairs has to be gathered.

    Example:
        >>> from adaptok.testing import make_vit
        >>> host = TimmViT.match(make_vit())
        >>> host.width, host.depth, host.prefix
        (96, 3, 1)
    """

    name = "timm-vit"
    family = "timm VisionTransformer"

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a timm ViT (see `Backbone.match`)."""
        home = "timm.models.vision_transformer"
        require(is_instance(model, home, "VisionTransformer"), "no timm VisionTransformer")
        return cls(**describe_model(model, check_blocks(model, "blocks")))

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        given = bind_arguments(("x", "attn_mask", "is_causal"), args, kwargs)
        refuse_causal(given.get("is_causal"))
        x, mask = given["x"], given.get("attn_mask")
        check_count(x, numbers)
        inputs = {} if mask is None else {"attn_mask": mask_of_pairs(mask, self.prefix)}
        return BlockCall(
            x, numbers.grid, self.prefix, token_inputs=inputs, has_class=self.has_class
        )
