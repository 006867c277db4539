"""timm's NaFlexVit: images of any size, or patches of images of one size with padding."""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from adaptok.backbones.timm_eva import split_tables
from adaptok.backbones.timm_images import (
    TimmImages,
    check_count,
    describe_model,
    example_images,
    grid_of_image,
    mask_of_pairs,
    rows_of_rope,
    small_size,
)
from adaptok.calls import BlockCall, HostNumbers
from adaptok.errors import HostOptionError
from adaptok.hosts import HostInputs, bind_arguments, check_blocks, is_instance, require


class TimmNaFlex(TimmImages):
    """Adapter of timm's `NaFlexVit`.

    Patches that are given in NaFlex's own way must come from images of one grid per call, in the
    order of rows; padding behind them stays where it is, masked by the host.

    Args:
        width: features of a token.
        depth: number of blocks.
        prefix: class and register tokens in front of the cells.
        has_class: whether the first of them is a class token.
        rope: the rotary module that makes a table for each block, in a tuple, so that it is
            registered where the host has it; empty where one table serves all.

    Example:
        >>> from timm.models.naflexvit import NaFlexVit
        >>> model = NaFlexVit(patch_size=8, embed_dim=64, depth=2, num_heads=2, reg_tokens=4)
        >>> TimmNaFlex.match(model).prefix
        4
    """

    name = "timm-naflex"
    family = "timm NaFlexVit"

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        prefix: int,
        has_class: bool = False,
        rope: tuple[nn.Module, ...] = (),
    ) -> None:
        super().__init__(width=width, depth=depth, prefix=prefix, has_class=has_class)
        self.rope = rope

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a NaFlexVit (see `Backbone.match`)."""
        require(is_instance(model, "timm.models.naflexvit", "NaFlexVit"), "no timm NaFlexVit")
        numbers = describe_model(model, check_blocks(model, "blocks"))
        rope = (model.get_submodule("rope"),) if model.rope_is_mixed else ()
        return cls(**numbers, rope=rope)

    def entrances(self, model: nn.Module) -> tuple[str, ...]:
        """Listen to the embedding: every way into the model goes through it."""
        return ("embeds",)

    def hand_over(
        self, entrance: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostNumbers | None:
        """Return the grid of the images, or that of the patches (see `Backbone.hand_over`)."""
        given = bind_arguments(("x", "patch_coord", "patch_valid"), args, kwargs)
        places = given.get("patch_coord")
        if places is None:
            return HostNumbers(grid_of_image(module, given["x"]), start=self.prefix, notes=(0,))
        grid = grid_of_patches(places, given.get("patch_valid"))
        padding = places.shape[1] - math.prod(grid)
        return HostNumbers(grid, start=self.prefix, notes=(padding,))

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        given = bind_arguments(("x", "rope", "attn_mask"), args, kwargs)
        x, rope, mask = given["x"], given.get("rope"), given.get("attn_mask")
        (padding,) = numbers.notes
        check_count(x, numbers, padding)
        inputs, by_depth = {}, {}
        if mask is not None:
            inputs["attn_mask"] = mask_of_pairs(mask, self.prefix)
        if rope is not None and self.rope:
            tables = split_tables(self.rope[0], list(numbers.grid))
            rows = [F.pad(table.value.to(rope.dtype), (0, 0, 0, padding)) for table in tables]
            by_depth["rope"] = [rows_of_rope(table) for table in rows]
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

    def example(self, model: nn.Module) -> HostInputs:
        """Return two small images (see `Backbone.example`)."""
        return example_images(model, small_size(model.get_submodule("embeds")))


def grid_of_patches(
    places: Int[Tensor, "b n 2"], valid: Bool[Tensor, "b n"] | None
) -> tuple[int, int]:
    """Return the one grid that the patches of all samples lie on.

    Args:
        places: row and column of each patch, `(b n 2)`.
        valid: False for padding, `(b n)`; None means that there is none.

    Returns:
        Rows and columns.

    Raises:
        HostOptionError: samples have different grids, or patches lie in another order than row by
            row with the padding behind them.

    Example:
        >>> places = torch.cartesian_prod(torch.arange(2), torch.arange(3))[None]
        >>> grid_of_patches(places, None)
        (2, 3)
    """
    valid = places.new_ones(places.shape[:2], dtype=torch.bool) if valid is None else valid.bool()
    largest = places.masked_fill(~valid[..., None], -1).amax(1) + 1
    grids = sorted({(h, w) for h, w in largest.tolist()})
    if len(grids) != 1:
        raise HostOptionError(
            f"the images of one call lie on the grids {', '.join(map(str, grids))}, and a wrapped "
            "NaFlexVit takes one grid per call: put images of equal size together, or give them "
            "one by one"
        )
    ((h, w),) = grids
    length = places.shape[1]
    counted = torch.arange(length, device=places.device)
    inside = counted < h * w
    expected = torch.stack([counted // max(w, 1), counted % max(w, 1)], dim=1)
    in_order = (places == expected).all(-1) | ~inside
    if not 0 < h * w <= length or not bool(((valid == inside) & in_order).all()):
        raise HostOptionError(
            f"the patches of a wrapped NaFlexVit lie on the whole grid ({h}, {w}), row by row, "
            "with the padding behind them; these are dropped or shuffled: give patches as timm's "
            "NaFlex loaders make them"
        )
    return (h, w)
