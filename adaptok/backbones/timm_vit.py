"""timm's VisionTransformer: DeiT, DeiT3, DINOv2, SigLIP, CLIP and many more."""

from typing import Any, Self

import torch
from torch import nn

from adaptok.calls import BlockCall, HostNumbers, TokenInput
from adaptok.errors import HostOptionError
from adaptok.hosts import (
    Backbone,
    HostInputs,
    bind_arguments,
    check_blocks,
    device_of,
    dtype_of,
    is_instance,
    require,
)

MODULE = "timm.models.vision_transformer"


class TimmViT(Backbone):
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
    versions = "timm 1.0.31"

    def __init__(self, *, width: int, depth: int, prefix: int) -> None:
        super().__init__(containers=("blocks",), width=width, depth=depth)
        self.prefix = prefix

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a timm ViT (see `Backbone.match`)."""
        require(is_instance(model, MODULE, "VisionTransformer"), "no timm VisionTransformer")
        blocks = check_blocks(model, "blocks")
        return cls(
            width=int(model.embed_dim),  # type: ignore[arg-type]
            depth=len(blocks),  # type: ignore[arg-type]
            prefix=int(model.num_prefix_tokens),  # type: ignore[arg-type]
        )

    def entrances(self, model: nn.Module) -> tuple[str, ...]:
        """Listen to the patch embedding: every way into the model goes through it."""
        return ("patch_embed",)

    def hand_over(
        self, entrance: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostNumbers | None:
        """Return the grid of the image that is embedded (see `Backbone.hand_over`)."""
        image = args[0] if args else kwargs["x"]
        return HostNumbers(grid_of_image(module, image), start=self.prefix)

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        given = bind_arguments(("x", "attn_mask", "is_causal"), args, kwargs)
        if given.get("is_causal"):
            raise HostOptionError(
                "is_causal=True orders tokens by their place, which changes where some are left "
                "out: unwrap the model, or pass attn_mask="
            )
        x, mask = given["x"], given.get("attn_mask")
        inputs = {} if mask is None else {"attn_mask": mask_of_pairs(mask, self.prefix)}
        return BlockCall(x, numbers.grid, self.prefix, token_inputs=inputs)

    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block (see `Backbone.run`)."""
        inputs = {name: given.value for name, given in call.token_inputs.items()}
        return call.with_x(block(call.x, **inputs))

    def write(self, call: BlockCall) -> Any:  # noqa: ANN401
        """Return the tokens (see `Backbone.write`)."""
        return call.x

    def example(self, model: nn.Module) -> HostInputs:
        """Return two small images (see `Backbone.example`)."""
        return example_images(model, model.patch_embed)  # type: ignore[arg-type]


def grid_of_image(patch_embed: nn.Module, image: torch.Tensor) -> tuple[int, int]:
    """Return the grid that a timm patch embedding makes of an image."""
    h, w = patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))  # type: ignore[operator]
    return (int(h), int(w))


def mask_of_pairs(mask: torch.Tensor, prefix: int) -> TokenInput:
    """Return an attention mask as an input with tokens along its last two axes."""
    batched = mask.ndim > 2
    if mask.ndim == 2:
        mask, batched = mask[None, None], True
    elif mask.ndim == 3:
        mask = mask[:, None]
    return TokenInput(mask, axes=(mask.ndim - 2, mask.ndim - 1), start=prefix, batched=batched)


def example_images(model: nn.Module, patch_embed: nn.Module) -> HostInputs:
    """Return two images of the size that a timm model was made for, or smaller where it may be."""
    size = patch_embed.img_size
    if size is None or not getattr(patch_embed, "strict_img_size", True):
        ph, pw = patch_embed.patch_size  # type: ignore[misc]
        size = (4 * int(ph), 6 * int(pw))  # type: ignore[has-type]
    h, w = size  # type: ignore[misc]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, int(h), int(w), generator=generator)  # type: ignore[has-type]
    return HostInputs((images.to(device_of(model), dtype_of(model)),))
