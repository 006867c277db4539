"""timm's VisionTransformerRelPos: relative positions, shared by all blocks or made in each."""

from typing import Any, Self

from jaxtyping import Float
from torch import Tensor, nn

from adaptok.backbones.biased_attention import (
    attend_biased,
    check_form,
    find_rows,
    take_pairs,
)
from adaptok.backbones.block_forms import check_untouched, is_exactly
from adaptok.backbones.timm_images import TimmImages, check_count, describe_model, mask_of_pairs
from adaptok.calls import BlockCall, HostNumbers
from adaptok.hosts import bind_arguments, check_blocks, is_instance, require

HOME = "timm.models.vision_transformer_relpos"
BLOCKS = ("RelPosBlock", "ResPostRelPosBlock")


class TimmRelPos(TimmImages):
    """Adapter of timm's `VisionTransformerRelPos`.

    A shared bias is gathered along both axes. Where each block makes its own, few tokens run a
    form of the block that is made of its own submodules; all tokens run the block itself.

    Example:
        >>> from timm.models.vision_transformer_relpos import VisionTransformerRelPos
        >>> size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
        >>> TimmRelPos.match(VisionTransformerRelPos(**size)).prefix
        0
    """

    name = "timm-relpos"
    family = "timm VisionTransformerRelPos"

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a ViT with relative positions (see `Backbone.match`)."""
        found = is_instance(model, HOME, "VisionTransformerRelPos")
        require(found, "no timm VisionTransformerRelPos")
        blocks = check_blocks(model, "blocks")
        for block in blocks.children():
            if makes_bias(block):
                check_form(block, HOME, BLOCKS, "RelPosAttention")
        return cls(**describe_model(model, blocks))

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        given = bind_arguments(("x", "shared_rel_pos"), args, kwargs)
        x, shared = given["x"], given.get("shared_rel_pos")
        check_count(x, numbers)
        inputs = {}
        if shared is not None:
            inputs["shared_rel_pos"] = mask_of_pairs(shared, self.prefix)
        return BlockCall(
            x, numbers.grid, self.prefix, token_inputs=inputs, has_class=self.has_class
        )

    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block, or the form of it for few tokens (see `Backbone.run`)."""
        if call.cells is None or not makes_bias(block):
            return super().run(block, index, call)
        check_untouched(block)
        own: Tensor = block.attn.rel_pos.get_bias()  # type: ignore[union-attr, operator]
        return call.with_x(run_relpos_block(block, call.x, take_pairs(own, find_rows(call))))


def makes_bias(block: nn.Module) -> bool:
    """Say whether a block makes its own bias; it then takes no shared one."""
    return getattr(block._modules.get("attn"), "rel_pos", None) is not None


def run_relpos_block(
    block: Any,  # noqa: ANN401 - timm need not be installed
    x: Float[Tensor, "b m d"],
    bias: Float[Tensor, "b heads m m"],
) -> Float[Tensor, "b m d"]:
    """Run timm's `RelPosBlock` or `ResPostRelPosBlock` by its own submodules.

    Args:
        block: exactly one of the two.
        x: tokens.
        bias: of relative positions, for the tokens that are left.

    Returns:
        What the block would return for all tokens, at these.
    """
    attn = block.attn
    if is_exactly(block, HOME, "ResPostRelPosBlock"):
        x = x + block.drop_path1(block.norm1(attend_biased(attn.qkv(x), attn, bias)))
        moved = block.norm2(block.mlp(x))
    else:
        x = x + block.drop_path1(block.ls1(attend_biased(attn.qkv(block.norm1(x)), attn, bias)))
        moved = block.ls2(block.mlp(block.norm2(x)))
    out: Tensor = x + block.drop_path2(moved)
    return out
