"""BEiT of transformers: each block adds a table of relative positions, which is gathered too."""

from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from adaptok.backbones.biased_attention import find_rows
from adaptok.backbones.block_forms import is_exactly
from adaptok.backbones.transformers_towers import MODELS, Kind
from adaptok.backbones.transformers_vit import TransformersViT
from adaptok.calls import BlockCall
from adaptok.errors import HostOptionError, UnsupportedModelError


class TransformersBeit(TransformersViT):
    """Adapter of BEiT, alone or inside a model of its family.

    A block makes its table for all cells and adds it to attention, which fails where some are left
    out. On few tokens its own submodules are called with the rows and columns that are left; a
    hook on the block itself, which would not be called, is refused then.

    Example:
        >>> from transformers import BeitConfig, BeitModel
        >>> config = BeitConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3)
        >>> TransformersBeit.match(BeitModel(config)).name
        'transformers-beit'
    """

    name = "transformers-beit"
    family = "BEiT of transformers"
    kinds: ClassVar[tuple[Kind, ...]] = ("relative",)

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a BEiT (see `Backbone.match`)."""
        host = super().match(model)
        for block in model.get_submodule(host.containers[0]).children():
            if not is_exactly(block, f"{MODELS}.beit.modeling_beit", "BeitLayer"):
                raise UnsupportedModelError(
                    f"a block is a {type(block).__name__}, and the form of a block with gathered "
                    "positions is known of BeitLayer only"
                )
        return host

    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block, or its parts if some cells are left out (see `Backbone.run`)."""
        if call.cells is None or getattr(block, "relative_position_bias", None) is None:
            return super().run(block, index, call)
        check_untouched(block)
        layer: Any = block
        run = partial(run_layer, block, call=call)
        if layer.gradient_checkpointing and layer.training:
            return call.with_x(layer._gradient_checkpointing_func(run, call.x))
        return call.with_x(run(call.x))


def gather_table(block: nn.Module, call: BlockCall, interpolate: bool) -> Tensor:
    """Return a block's table of relative positions for the tokens that are left, `(b h s s)`."""
    h, w = call.grid
    make: Any = block.relative_position_bias
    table: Tensor = make((h, w), interpolate, dim_size=call.start + h * w)
    rows = find_rows(call)
    return table[0][:, rows[:, :, None], rows[:, None, :]].transpose(0, 1)


def check_untouched(block: nn.Module) -> None:
    """Raise if somebody listens to a block; hooks that collect hidden states may sleep there."""
    if torch.compiler.is_compiling():
        return
    names = {getattr(hook, "__name__", "") for hook in block._forward_hooks.values()}
    if names - {"output_capturing_hook"} or block._forward_pre_hooks or "forward" in vars(block):
        raise HostOptionError(
            f"a hook listens to {type(block).__name__} (offloading does, too), and fewer tokens "
            "run its submodules one by one: remove the hook, or unwrap the model"
        )


def run_layer(layer: Any, x: Tensor, call: BlockCall) -> Tensor:  # noqa: ANN401
    """Run the submodules of a `BeitLayer` on some tokens.

    Args:
        layer: exactly `BeitLayer` of transformers.
        x: tokens, `(b m d)`.
        call: what the layer takes beside them.

    Returns:
        What the layer would return for all tokens, at these.
    """
    options = dict(call.shared)
    options.pop("resolution")
    mask = gather_table(layer, call, bool(options.pop("interpolate_pos_encoding")))
    if "attention_mask" in call.token_inputs:
        mask = mask + call.token_inputs["attention_mask"].value
    options["attention_mask"] = mask
    mixed, _ = layer.attention(layer.layernorm_before(x), **options)
    x = x + layer.drop_path(layer.lambda_1 * layer.dropout(mixed))
    thought = layer.dropout(layer.mlp(layer.layernorm_after(x)))
    out: Tensor = x + layer.drop_path(layer.lambda_2 * thought)
    return out
