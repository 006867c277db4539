"""timm's Eva: EVA-02, DINOv3, Perception Encoder and other rotary Vision Transformers."""

from typing import Any, Self

from torch import Tensor, nn

from adaptok.backbones.timm_images import (
    TimmImages,
    check_count,
    describe_model,
    mask_of_pairs,
    refuse_causal,
    rows_of_rope,
)
from adaptok.calls import BlockCall, HostNumbers, TokenInput
from adaptok.errors import HostOptionError
from adaptok.hosts import bind_arguments, check_blocks, is_instance, require
from adaptok.tokens import Grid

ARGUMENTS = ("x", "rope", "attn_mask", "is_causal")


class TimmEva(TimmImages):
    """Adapter of timm's `Eva`, with a rotary table for all blocks, one for each, or none.

    The table has rows for cells only, and a batch axis where samples keep different cells. Where
    each block has its own (`rope_mixed`), the host hands over the first one only: the others are
    read off the model's rotary module.

    Args:
        width: features of a token.
        depth: number of blocks.
        prefix: class and register tokens in front of the cells.
        has_class: whether the first of them is a class token.
        rope: the rotary module that makes a table for each block, in a tuple, so that it is
            registered where the host has it; empty where one table serves all.
        dynamic: whether tables are made for the size of each image.

    Example:
        >>> from timm.models.eva import Eva
        >>> size = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
        >>> TimmEva.match(Eva(**size, use_rot_pos_emb=True, num_reg_tokens=4)).prefix
        5
    """

    name = "timm-eva"
    family = "timm Eva"

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        prefix: int,
        has_class: bool = False,
        rope: tuple[nn.Module, ...] = (),
        dynamic: bool = False,
    ) -> None:
        super().__init__(width=width, depth=depth, prefix=prefix, has_class=has_class)
        self.rope = rope
        self.dynamic = dynamic

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a timm Eva (see `Backbone.match`)."""
        require(is_instance(model, "timm.models.eva", "Eva"), "no timm Eva")
        numbers = describe_model(model, check_blocks(model, "blocks"))
        rope = (model.get_submodule("rope"),) if model.rope_mixed else ()
        return cls(**numbers, rope=rope, dynamic=bool(model.dynamic_img_size))

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        given = bind_arguments(ARGUMENTS, args, kwargs)
        refuse_causal(given.get("is_causal"))
        x, rope, mask = given["x"], given.get("rope"), given.get("attn_mask")
        check_count(x, numbers)
        inputs, by_depth = {}, {}
        if mask is not None:
            inputs["attn_mask"] = mask_of_pairs(mask, self.prefix)
        if rope is not None and self.rope:
            by_depth["rope"] = self.read_tables(numbers.grid)
        elif rope is not None:
            inputs["rope"] = rows_of_rope(rope)
        return BlockCall(
            x,
            numbers.grid,
            self.prefix,
            token_inputs=inputs,
            depth_inputs=by_depth,
            has_class=self.has_class,
        )

    def read_tables(self, grid: Grid) -> list[TokenInput]:
        """Return the rotary table of each block, as the model itself makes them."""
        (rope,) = self.rope
        return split_tables(rope, list(grid) if self.dynamic else None)


def split_tables(rope: nn.Module, grid: list[int] | None) -> list[TokenInput]:
    """Return the rotary tables that a module makes, one for each block.

    Args:
        rope: timm's `RotaryEmbeddingMixed`.
        grid: rows and columns; None takes those that the module was made for.

    Returns:
        Tables `(1 heads n 2k)`.

    Raises:
        HostOptionError: in training, the tables are moved at random in each call.
    """
    if rope.training and rope.aug_active:
        raise HostOptionError(
            "rotary tables of each block that are shifted or scaled at random in training "
            "(rope_shift_coords, rope_jitter_coords, rope_rescale_coords) are not handed over to a "
            "wrapped model: call model.rope.eval() after model.train(), or make the model without"
        )
    tables: Tensor = rope.get_embed(shape=grid)  # type: ignore[operator]
    return [rows_of_rope(table) for table in tables.unbind(0)]
