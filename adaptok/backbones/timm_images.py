"""What timm's Vision Transformers have in common: images, and prefix tokens before the cells."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from adaptok.calls import BlockCall, HostNumbers, TokenInput
from adaptok.errors import HostOptionError
from adaptok.hosts import Backbone, HostInputs, device_of, dtype_of

VERSIONS = "timm 1.0.31"


class TimmImages(Backbone):
    """Adapter of a timm model that embeds images by `patch_embed` and has its blocks in `blocks`.

    Args:
        width: features of a token.
        depth: number of blocks.
        prefix: class, distillation and register tokens in front of the cells.
        has_class: whether the first of them is a class token.
    """

    versions = VERSIONS

    def __init__(self, *, width: int, depth: int, prefix: int, has_class: bool = False) -> None:
        super().__init__(containers=("blocks",), width=width, depth=depth)
        self.prefix = prefix
        self.has_class = has_class

    def entrances(self, model: nn.Module) -> tuple[str, ...]:
        """Listen to the patch embedding: every way into the model goes through it."""
        return ("patch_embed",)

    def hand_over(
        self, entrance: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostNumbers | None:
        """Return the grid of the image that is embedded (see `Backbone.hand_over`)."""
        image = args[0] if args else kwargs["x"]
        return HostNumbers(grid_of_image(module, image), start=self.prefix)

    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block (see `Backbone.run`)."""
        inputs = {name: given.value for name, given in call.token_inputs.items()}
        inputs |= {name: given[index].value for name, given in call.depth_inputs.items()}
        return call.with_x(block(call.x, **inputs))

    def write(self, call: BlockCall) -> Any:  # noqa: ANN401
        """Return the tokens (see `Backbone.write`)."""
        return call.x

    def example(self, model: nn.Module) -> HostInputs:
        """Return two small images (see `Backbone.example`)."""
        embed: Any = model.get_submodule("patch_embed")
        fixed = embed.img_size is not None and getattr(embed, "strict_img_size", True)
        return example_images(model, embed.img_size if fixed else small_size(embed))


def describe_model(model: nn.Module, blocks: nn.Module) -> dict[str, Any]:
    """Return width, depth, prefix and whether it begins with a class token, as timm names them."""
    owner = model if hasattr(model, "cls_token") else getattr(model, "embeds", None)  # NaFlex
    return {
        "width": int(model.embed_dim),  # type: ignore[arg-type]
        "depth": len(blocks),  # type: ignore[arg-type]
        "prefix": int(model.num_prefix_tokens),  # type: ignore[arg-type]
        # every family puts it first, before registers
        "has_class": getattr(owner, "cls_token", None) is not None,
    }


def grid_of_image(patch_embed: nn.Module, image: Tensor) -> tuple[int, int]:
    """Return the grid that a timm patch embedding makes of an image."""
    h, w = patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))  # type: ignore[operator]
    return (int(h), int(w))


def small_size(patch_embed: nn.Module) -> tuple[int, int]:
    """Return the size of an image of 4 times 6 cells."""
    ratio = patch_embed.feat_ratio(as_scalar=False)  # type: ignore[operator]
    return (4 * int(ratio[0]), 6 * int(ratio[1]))


def example_images(model: nn.Module, size: tuple[int, int]) -> HostInputs:
    """Return two images of a size, with as many channels as the model takes."""
    generator = torch.Generator().manual_seed(0)
    channels = int(model.in_chans)  # type: ignore[arg-type]
    images = torch.randn(2, channels, int(size[0]), int(size[1]), generator=generator)
    return HostInputs((images.to(device_of(model), dtype_of(model)),))


def check_count(x: Tensor, numbers: HostNumbers, padding: int = 0) -> None:
    """Raise a `HostOptionError` unless every cell of the grid has its token.

    Args:
        x: the tokens, `(b s d)`.
        numbers: grid, and prefix tokens in front of it.
        padding: tokens behind the cells.

    Raises:
        HostOptionError: patches were dropped, or the grid is another one.
    """
    start, n = numbers.start or 0, math.prod(numbers.grid)
    if x.shape[1] != start + n + padding:
        raise HostOptionError(
            f"the blocks got {x.shape[1]} tokens, and {start} in front of the grid {numbers.grid} "
            f"make {start + n + padding}. In training, timm's patch_drop_rate drops patches and "
            "hides their places from a wrapped model: make the model with patch_drop_rate=0, or "
            "call model.eval(). Otherwise this model embeds images in a way that is not known"
        )


def refuse_causal(is_causal: bool | None) -> None:
    """Raise a `HostOptionError` where a causal order of the tokens is asked for."""
    if is_causal:
        raise HostOptionError(
            "is_causal=True orders tokens by their place, which changes where some are left out: "
            "give the order as a mask, attn_mask=torch.ones(n, n).tril().bool(), or unwrap"
        )


def mask_of_pairs(mask: Tensor, prefix: int) -> TokenInput:
    """Return an attention mask as an input with tokens along its last two axes.

    Args:
        mask: what `scaled_dot_product_attention` takes: `(s s)`, `(heads s s)` or `(b heads s s)`,
            where heads and the rows may have the length 1.
        prefix: tokens in front of the cells.
    """
    mask = mask[(None,) * (4 - mask.ndim)]  # as broadcasting does: new axes in front
    return TokenInput(mask, axes=(2, 3), start=prefix)


def rows_of_rope(rope: Tensor) -> TokenInput:
    """Return a rotary table, which has rows for cells only, as a per-token input.

    Args:
        rope: `(n 2k)`, `(heads n 2k)` or `(b heads n 2k)`; samples that keep different cells are
            told apart by the batch axis that timm's attention allows.
    """
    return TokenInput(rope[(None,) * (4 - rope.ndim)], axes=(2,))
