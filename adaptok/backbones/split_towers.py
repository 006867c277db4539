"""Layers of the vision towers of transformers in two halves."""

import sys
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from adaptok.backbones.split_blocks import BlockLayout, Heads, LaidOutForm, Mask, check_known
from adaptok.backbones.transformers_beit import gather_table
from adaptok.calls import BlockCall

MODELS = "transformers.models"
BIASED = ("sdpa", "eager")  # ways of attention that take a bias of keys


@dataclass(frozen=True, slots=True)
class TowerLayout:
    """A class of layers, and how its attention names its parts.

    Args:
        block: how the layer is laid out.
        out: the projection behind attention.
        scale: the factor of the logits.
        rate: how much of the attention weights training drops.
        forwards: whether what a layer gets beside is handed on to the kernel.
    """

    block: BlockLayout
    out: str = "o_proj"
    scale: str = "scaling"
    rate: str = "attention_dropout"
    forwards: bool = True


def lay_out(
    module: str,
    prefix: str,
    layer: str = "Layer",
    attention: str = "attention",
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after"),
    after: tuple[tuple[str, ...], tuple[str, ...]] = (("dropout",), ("dropout",)),
    *inputs: str,
    more: tuple[str, ...] = (),
) -> BlockLayout:
    """Return the layout of a class of layers, whose parts are named by one prefix."""
    home = f"{MODELS}.{module}"
    return BlockLayout(
        name=(home, prefix + layer),
        attention=attention,
        attentions=((home, f"{prefix}Attention"),),
        mlps=tuple((home, prefix + name) for name in ("MLP", "SwiGLUFFN", "GatedMLP")),
        norms=norms,
        after=after,
        parts=tuple(
            (home, name)
            for name in (
                f"{prefix}LayerScale",
                f"{prefix}DropPath",
                f"{prefix.replace('DINO', 'Dino')}DropPath",  # as DINOv3 spells its own
            )
        ),
        inputs=("attention_mask", *inputs),
        more=more,
    )


NORMS = ("norm1", "norm2")
SCALED = (("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
WEIGHED = (("dropout", "lambda_1", "drop_path"), ("dropout", "lambda_2", "drop_path"))
CLIP = ("EncoderLayer", "self_attn", ("layer_norm1", "layer_norm2"), ((), ()))
CLIP_NAMES: dict[str, Any] = {"out": "out_proj", "scale": "scale", "rate": "dropout"}
DINO = ("Layer", "attention", NORMS, SCALED)
LAYOUTS = (
    TowerLayout(lay_out("vit.modeling_vit", "ViT")),
    TowerLayout(lay_out("deit.modeling_deit", "DeiT")),
    TowerLayout(lay_out("ijepa.modeling_ijepa", "IJepa")),
    TowerLayout(lay_out("vit_mae.modeling_vit_mae", "ViTMAE")),
    TowerLayout(lay_out("dinov2.modeling_dinov2", "Dinov2", *DINO)),
    TowerLayout(
        lay_out(
            "dinov2_with_registers.modeling_dinov2_with_registers", "Dinov2WithRegisters", *DINO
        )
    ),
    TowerLayout(
        lay_out("dinov3_vit.modeling_dinov3_vit", "DINOv3ViT", *DINO, "cos", "sin"), rate="dropout"
    ),
    TowerLayout(
        lay_out("beit.modeling_beit", "Beit", after=WEIGHED, more=("relative_position_bias",))
    ),
    TowerLayout(lay_out("clip.modeling_clip", "CLIP", *CLIP), **CLIP_NAMES),
    TowerLayout(lay_out("siglip.modeling_siglip", "Siglip", *CLIP), **CLIP_NAMES, forwards=False),
    TowerLayout(
        lay_out("siglip2.modeling_siglip2", "Siglip2", *CLIP), **CLIP_NAMES, forwards=False
    ),
)
# arguments that do not come as far as the kernel, or come to it in another way
OF_LAYER = ("attention_mask", "position_embeddings", "interpolate_pos_encoding", "resolution")


@dataclass(frozen=True, slots=True)
class SplitTowerLayer(LaidOutForm):
    """A layer of a vision tower of transformers in two halves.

    Attention runs as the model says (`attn_implementation`); a bias of keys needs `"sdpa"` or
    `"eager"`.

    Args:
        block: exactly of a class in `LAYOUTS`.
        index: its place in the host.
        layout: how its class is laid out.
        tower: the same, and how its attention names its parts.
    """

    tower: TowerLayout

    @property
    def implementation(self) -> str:
        """How the model attends."""
        return str(self.attn.config._attn_implementation)

    def make_heads(self, y: Float[Tensor, "b s d"], call: BlockCall) -> Heads:
        """Return queries, keys and values."""
        attn = self.attn
        q, k, v = (
            rearrange(project(y), "b s (h e) -> b h s e", e=attn.head_dim)
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        keys = k
        if "cos" in call.token_inputs:
            cos, sin = (call.token_inputs[name].value for name in ("cos", "sin"))
            q, k = self.find("apply_rotary_pos_emb")(q, k, cos, sin)
        return Heads(q, k, v, keys, getattr(attn, self.tower.scale))

    def find_mask(self, call: BlockCall) -> Mask:
        """Return the mask, with the bias of relative positions where the layer makes one."""
        given = LaidOutForm.find_mask(self, call)
        make = getattr(self.block, "relative_position_bias", None)
        if make is None:
            return given
        interpolate = bool(call.shared.get("interpolate_pos_encoding"))
        if call.cells is None:
            own = make(call.grid, interpolate, dim_size=call.x.shape[1])
        else:
            own = gather_table(self.block, call, interpolate)
        return own if given is None else own + given  # type: ignore[no-any-return]

    def mix(self, heads: Heads, mask: Mask, call: BlockCall) -> Float[Tensor, "b s he"]:
        """Attend as the model says; heads side by side."""
        attn = self.attn
        attend = self.find("ALL_ATTENTION_FUNCTIONS").get_interface(
            self.implementation, self.find("eager_attention_forward")
        )
        options = {name: value for name, value in call.shared.items() if name not in OF_LAYER}
        mixed, _ = attend(
            attn,
            heads.q,
            heads.k,
            heads.v,
            mask,
            dropout=getattr(attn, self.tower.rate) if attn.training else 0.0,
            scaling=heads.scale,
            **(options if self.tower.forwards else {"is_causal": attn.is_causal}),
        )
        side_by_side: Tensor = rearrange(mixed, "b s h e -> b s (h e)")
        return side_by_side

    def leave(
        self, mixed: Float[Tensor, "b s he"], y: Float[Tensor, "b s d"]
    ) -> Float[Tensor, "b s d"]:
        """Return what attention returns."""
        left: Tensor = getattr(self.attn, self.tower.out)(mixed)
        return left

    def check_inputs(self, call: BlockCall) -> None:
        """Raise a `HandOverError` unless the form knows all that the layer takes."""
        check_known(self.block, call, (*self.layout.inputs, *call.shared))  # the kernel takes those

    def find_obstacle(self) -> str:
        """Return why attention takes no bias of keys; nothing where it does."""
        if self.implementation in BIASED:
            return ""
        return (
            f"attention as {self.implementation!r} takes no bias of keys, and hides what the class "
            'token attends to: set model.set_attn_implementation("sdpa")'
        )

    def find(self, name: str) -> Any:  # noqa: ANN401
        """Return a function of the module that the layer comes from."""
        return getattr(sys.modules[self.layout.name[0]], name)
