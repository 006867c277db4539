"""Vision towers of transformers: ViT, DeiT, I-JEPA, DINOv2, DINOv3, CLIP, SigLIP and their kin."""

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from adaptok.backbones.transformers_towers import (
    Kind,
    TowerClass,
    find_tower,
    make_example,
    size_of,
)
from adaptok.calls import BlockCall, HostNumbers, TokenInput
from adaptok.errors import HandOverError, HostOptionError, UnsupportedModelError
from adaptok.hosts import (
    Backbone,
    HostInputs,
    NoMatch,
    bind_arguments,
    check_blocks,
    first_tensor,
    refuse_option,
    require,
)

COLLECTED = ("output_hidden_states", "output_attentions")
ADVICE = "read the last hidden state, or call adaptok.unwrap(model) before"
# What the probe compares, the most telling one first.
OUTPUTS = ("last_hidden_state", "image_embeds", "logits")


class TransformersViT(Backbone):
    """Adapter of the vision towers of transformers, alone or inside a model of their family.

    Positions are added before the blocks, except for the rotation of DINOv3, which is gathered per
    sample; attention masks are gathered along both axes. Hidden states and attentions of single
    blocks are refused, however they are asked for.

    Example:
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3)
        >>> host = TransformersViT.match(ViTModel(config))
        >>> host.containers, host.width, host.depth, host.prefix
        (('layers',), 48, 2, 1)
    """

    name = "transformers-vit"
    family = "vision tower of transformers"
    versions = "transformers 5.23.0"
    kinds: ClassVar[tuple[Kind, ...]] = ("image", "masked", "padded")

    def __init__(
        self,
        *,
        path: str,
        tower: TowerClass,
        width: int,
        depth: int,
        prefix: int,
        patch: tuple[int, int],
    ) -> None:
        super().__init__(containers=(below(path, tower.blocks),), width=width, depth=depth)
        self.path = path
        self.tower = tower
        self.prefix = prefix
        self.patch = patch

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a model with one vision tower (see `Backbone.match`)."""
        path, tower = find_tower(model)
        require(tower.kind in cls.kinds, f"{tower.name} has an adapter of its own")
        config: Any = model.get_submodule(path).config
        if tower.kind == "masked" and config.mask_ratio != 0:
            raise UnsupportedModelError(
                f"{tower.name} drops {config.mask_ratio:.0%} of the cells at random before its "
                "blocks: set config.mask_ratio = 0"
            )
        try:
            blocks = check_blocks(model, below(path, tower.blocks))
        except NoMatch as reason:
            raise UnsupportedModelError(
                f"{tower.name} of this transformers is laid out in another way ({reason}); known "
                f"is {cls.versions}"
            ) from None
        return cls(
            path=path,
            tower=tower,
            width=int(config.hidden_size),
            depth=len(blocks),  # type: ignore[arg-type]
            prefix=tower.prefix + int(getattr(config, "num_register_tokens", 0)),
            patch=size_of(config.patch_size),
        )

    def entrances(self, model: nn.Module) -> tuple[str, ...]:
        """Listen to the embeddings, and to the submodule that collects hidden states."""
        return (below(self.path, "embeddings"), below(self.path, self.tower.collector))

    def hand_over(
        self, entrance: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostNumbers | None:
        """Return the grid of the images that are embedded (see `Backbone.hand_over`)."""
        if entrance != below(self.path, "embeddings"):
            refuse_collected(
                {name: getattr(module.config, name, False) for name in COLLECTED} | kwargs
            )
            return None
        if self.tower.kind == "padded":
            given = bind_arguments(("pixel_values", "spatial_shapes"), args, kwargs)
            return HostNumbers(read_shapes(given["spatial_shapes"]), start=self.prefix)
        given = bind_arguments(("pixel_values", "noise"), args[:2], kwargs)
        if self.tower.kind == "masked":
            config: Any = module.config
            check_order(given.get("noise"), config.mask_ratio)
        h, w = given["pixel_values"].shape[-2:]
        return HostNumbers((h // self.patch[0], w // self.patch[1]), start=self.prefix)

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        given = bind_arguments(("hidden_states", "attention_mask"), args, kwargs)
        refuse_collected(given)
        if given.get("is_causal"):
            raise HostOptionError(
                "is_causal=True orders tokens by their place, which changes where some are left "
                "out: unwrap the model, or pass attention_mask="
            )
        inputs = {}
        x = given.pop("hidden_states")
        if given.get("attention_mask") is not None:
            inputs["attention_mask"] = read_mask(given.pop("attention_mask"), self.prefix)
        if given.get("position_embeddings") is not None:
            rotation = given.pop("position_embeddings")
            inputs |= read_rotation(rotation, math.prod(numbers.grid))
        unknown = [name for name, value in given.items() if isinstance(value, Tensor)]
        if unknown:
            raise HandOverError(
                f"the blocks got {', '.join(unknown)}, and it is not known whether that belongs to "
                "tokens or to samples: leave it out, or unwrap the model"
            )
        n = math.prod(numbers.grid)
        if x.shape[1] != self.prefix + n and self.tower.kind != "padded":
            raise HandOverError(
                f"the blocks got {x.shape[1]} tokens, and {self.prefix} in front of the grid "
                f"{numbers.grid} make {self.prefix + n}: this version of transformers is not "
                "supported"
            )
        return BlockCall(
            x,
            numbers.grid,
            self.prefix,
            token_inputs=inputs,
            shared=given,
            has_class=self.tower.has_class,
        )

    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block (see `Backbone.run`)."""
        inputs = {name: given.value for name, given in call.token_inputs.items()}
        options: dict[str, Any] = dict(call.shared)
        if "attention_mask" in inputs:
            options["attention_mask"] = inputs["attention_mask"]
        if "cos" in inputs:
            options["position_embeddings"] = (inputs["cos"], inputs["sin"])
        # tokens by place: a layer that checkpoints itself looks for them there
        return call.with_x(block(call.x, **options))

    def write(self, call: BlockCall) -> Any:  # noqa: ANN401
        """Return the tokens (see `Backbone.write`)."""
        return call.x

    def example(self, model: nn.Module) -> HostInputs:
        """Return two small images, and text where it is wanted (see `Backbone.example`)."""
        config: Any = model.get_submodule(self.path).config
        return make_example(model, self.tower, config, self.patch)

    def output(self, output: Any) -> Tensor:  # noqa: ANN401
        """Return the tensor that probes compare (see `Backbone.output`)."""
        found = (getattr(output, name, None) for name in OUTPUTS)
        return first_tensor([value for value in found if value is not None] or output)


def below(path: str, name: str) -> str:
    """Return the attribute path of a submodule of a submodule; each may be empty."""
    return ".".join(part for part in (path, name) if part)


def refuse_collected(given: dict[str, Any]) -> None:
    """Raise if hidden states or attentions of single blocks are asked for."""
    for name in COLLECTED:
        if given.get(name):
            refuse_option(f"{name}={given[name]}", ADVICE)


def read_mask(mask: object, prefix: int) -> TokenInput:
    """Return an attention mask as an input per token.

    Args:
        mask: `(b 1 s s)` of pairs, or `(b s)` of keys, as flash attention takes it.
        prefix: tokens in front of the cells.
    """
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return TokenInput(mask, axes=(2, 3), start=prefix)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return TokenInput(mask, axes=(1,), start=prefix)
    raise HandOverError(
        f"an attention mask is a tensor (b, 1, s, s) or (b, s), and a {type(mask).__name__} came: "
        'block masks cannot be shortened, set model.set_attn_implementation("sdpa")'
    )


def read_rotation(positions: tuple[Tensor, Tensor], n: int) -> dict[str, TokenInput]:
    """Return cosines and sines `(n k)` of the cells as inputs per token, with a batch axis."""
    cos, sin = positions
    if cos.ndim != 2 or cos.shape[0] != n:
        raise HandOverError(
            f"a rotation of {n} cells has the shape ({n}, k), and {tuple(cos.shape)} came: this "
            "version of transformers is not supported"
        )
    return {
        name: TokenInput(table[None, None], axes=(2,))
        for name, table in (("cos", cos), ("sin", sin))
    }


def read_shapes(shapes: Tensor) -> tuple[int, int]:
    """Return the one grid of a batch of padded images."""
    grids = {(int(h), int(w)) for h, w in shapes.tolist()}
    if len(grids) > 1:
        raise HostOptionError(
            f"spatial_shapes names several grids ({', '.join(map(str, sorted(grids)))}), and a "
            "wrapped model takes one grid per call: call it once per grid"
        )
    return grids.pop()


def check_order(noise: Tensor | None, mask_ratio: float) -> None:
    """Raise unless a masked autoencoder keeps all cells in their order."""
    advice = (
        "a masked autoencoder shuffles its cells and drops some before its blocks: set "
        "config.mask_ratio = 0, and pass noise=torch.arange(cells).float().repeat(batch, 1), which "
        "keeps their order"
    )
    if mask_ratio != 0 or noise is None:
        raise HostOptionError(advice)
    ordered = (noise.diff(dim=1) > 0).all()
    if torch.compiler.is_compiling():
        torch._assert_async(ordered, advice)
    elif not bool(ordered):
        raise HostOptionError(advice)
