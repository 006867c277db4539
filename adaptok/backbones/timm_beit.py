"""timm's Beit: BEiT and BEiT v2, whose blocks have a table of relative positions each."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.backbones.biased_attention import (
    attend_biased,
    check_form,
    find_rows,
    take_pairs,
)
from adaptok.backbones.block_forms import check_untouched
from adaptok.backbones.timm_images import TimmImages, check_count, describe_model, mask_of_pairs
from adaptok.calls import BlockCall, HostNumbers
from adaptok.hosts import bind_arguments, check_blocks, is_instance, require

HOME = "timm.models.beit"


class TimmBeit(TimmImages):
    """Adapter of timm's `Beit`.

    Where a block has its own table, few tokens run a form of the block that is made of its own
    submodules; all tokens run the block itself.

    Example:
        >>> from timm.models.beit import Beit
        >>> size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
        >>> TimmBeit.match(Beit(**size, use_rel_pos_bias=True)).prefix
        1
    """

    name = "timm-beit"
    family = "timm Beit"

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a BEiT (see `Backbone.match`)."""
        require(is_instance(model, HOME, "Beit"), "no timm Beit")
        blocks = check_blocks(model, "blocks")
        for block in blocks.children():
            if has_own_table(block):
                check_form(block, HOME, ("Block",), "Attention")
        return cls(**describe_model(model, blocks))

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        given = bind_arguments(("x", "shared_rel_pos_bias"), args, kwargs)
        x, shared = given["x"], given.get("shared_rel_pos_bias")
        check_count(x, numbers)
        inputs = {}
        if shared is not None:
            inputs["shared_rel_pos_bias"] = mask_of_pairs(shared, self.prefix)
        return BlockCall(
            x, numbers.grid, self.prefix, token_inputs=inputs, has_class=self.has_class
        )

    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block, or the form of it for few tokens (see `Backbone.run`)."""
        if call.cells is None or not has_own_table(block):
            return super().run(block, index, call)
        check_untouched(block)
        own: Tensor = block.attn._get_rel_pos_bias()  # type: ignore[union-attr, operator]
        bias = take_pairs(own, find_rows(call))
        if "shared_rel_pos_bias" in call.token_inputs:
            bias = bias + call.token_inputs["shared_rel_pos_bias"].value
        return call.with_x(run_beit_block(block, call.x, bias))


def has_own_table(block: nn.Module) -> bool:
    """Say whether a block adds a bias of its own."""
    attn = block._modules.get("attn")
    return getattr(attn, "relative_position_bias_table", None) is not None


def run_beit_block(
    block: Any,  # noqa: ANN401 - timm need not be installed
    x: Float[Tensor, "b m d"],
    bias: Float[Tensor, "b heads m m"],
) -> Float[Tensor, "b m d"]:
    """Run timm's `Block` of BEiT by its own submodules, with a bias for the tokens that are left.

    Args:
        block: exactly `timm.models.beit.Block`.
        x: tokens.
        bias: of relative positions, and shared ones.

    Returns:
        What the block would return for all tokens, at these.
    """
    mixed = attend_biased(project_qkv(block.attn, block.norm1(x)), block.attn, bias)
    x = x + block.drop_path1(mixed if block.gamma_1 is None else block.gamma_1 * mixed)
    moved = block.mlp(block.norm2(x))
    out: Tensor = x + block.drop_path2(moved if block.gamma_1 is None else block.gamma_2 * moved)
    return out


def project_qkv(
    attn: Any,  # noqa: ANN401 - timm need not be installed
    x: Float[Tensor, "b m d"],
) -> Float[Tensor, "b m three_d"]:
    """Return queries, keys and values side by side; keys have a bias that is no weight."""
    added = None
    if attn.q_bias is not None:
        added = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        if not attn.qkv_bias_separate:
            return F.linear(x, attn.qkv.weight, added)
    out: Tensor = attn.qkv(x)
    return out if added is None else out + added
