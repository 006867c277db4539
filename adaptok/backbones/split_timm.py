"""Blocks of timm, and of DiT made of timm's parts, in two halves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from adaptok.backbones.biased_attention import find_rows, take_pairs
from adaptok.backbones.split_blocks import (
    BlockLayout,
    ClassName,
    Entry,
    Gate,
    Heads,
    LaidOutForm,
    Mask,
    SplitForm,
    check_known,
)
from adaptok.backbones.timm_beit import project_qkv
from adaptok.calls import BlockCall
from adaptok.errors import HandOverError

VIT = "timm.models.vision_transformer"
EVA = "timm.models.eva"
BEIT = "timm.models.beit"
RELPOS = "timm.models.vision_transformer_relpos"
PLAIN_ATTENTION = (("timm.layers.attention", "Attention"),)
ROTARY_ATTENTION = ((EVA, "EvaAttention"), ("timm.layers.attention", "AttentionRope"))
MLPS = tuple(("timm.layers.mlp", name) for name in ("Mlp", "GluMlp", "SwiGLU"))
PARTS = (("timm.layers", "LayerScale"), ("timm.layers", "DropPath"))
SCALED = (("ls1", "drop_path1"), ("ls2", "drop_path2"))
WEIGHED = (("gamma_1", "drop_path1"), ("gamma_2", "drop_path2"))
NORMED = (("norm1", "drop_path1"), ("norm2", "drop_path2"))


def lay_out(
    name: ClassName,
    attentions: tuple[ClassName, ...],
    after: tuple[tuple[str, ...], tuple[str, ...]],
    *inputs: str,
) -> BlockLayout:
    """Return the layout of a class of timm, whose norms come behind or in front."""
    norms = ("", "") if after == NORMED else ("norm1", "norm2")
    return BlockLayout(name, "attn", attentions, MLPS, norms, after, PARTS, inputs)


RELPOS_ATTENTION = ((RELPOS, "RelPosAttention"),)
LAYOUTS = (
    lay_out((VIT, "Block"), PLAIN_ATTENTION, SCALED, "attn_mask"),
    lay_out((VIT, "ResPostBlock"), PLAIN_ATTENTION, NORMED, "attn_mask"),
    lay_out((EVA, "EvaBlock"), ROTARY_ATTENTION, WEIGHED, "attn_mask", "rope"),
    lay_out((EVA, "EvaBlockPostNorm"), ROTARY_ATTENTION, NORMED, "attn_mask", "rope"),
    lay_out((BEIT, "Block"), ((BEIT, "Attention"),), WEIGHED, "shared_rel_pos_bias"),
    lay_out((RELPOS, "RelPosBlock"), RELPOS_ATTENTION, SCALED, "shared_rel_pos"),
    lay_out((RELPOS, "ResPostRelPosBlock"), RELPOS_ATTENTION, NORMED, "shared_rel_pos"),
)


@dataclass(frozen=True, slots=True)
class SplitTimmBlock(LaidOutForm):
    """A block of timm in two halves.

    Args:
        block: exactly of a class in `LAYOUTS`.
        index: its place in the host.
        layout: how its class is laid out.
        rotate: timm's function that turns queries and keys, where the block takes positions.

    Example:
        >>> from adaptok.backbones.split_forms import split_blocks
        >>> from timm.models.vision_transformer import Block
        >>> import torch
        >>> block = Block(32, num_heads=2, qkv_bias=True, init_values=1.0).eval()
        >>> call = BlockCall(torch.randn(1, 7, 32), grid=(2, 3), start=1)
        >>> (form,) = split_blocks([block])
        >>> attended = form.attend(call, keys=True)
        >>> attended.keys.shape, torch.equal(form.finish(attended.call).x, block(call.x))
        (torch.Size([1, 2, 7, 16]), True)
    """

    rotate: Callable[..., Tensor] | None = None

    def make_heads(self, y: Float[Tensor, "b s d"], call: BlockCall) -> Heads:
        """Return queries, keys and values."""
        heads = project_heads(self.attn, y)
        if "rope" in call.depth_inputs:
            return self.turn(heads, call.depth_inputs["rope"][self.index].value)
        if "rope" in call.token_inputs:
            return self.turn(heads, call.token_inputs["rope"].value)
        return repeat_keys(self.attn, heads)

    def turn(self, heads: Heads, rope: Float[Tensor, "_ _ m two_k"]) -> Heads:
        """Rotate the queries and keys of the tokens behind the prefix."""
        attn, rotate = self.attn, self.rotate
        assert rotate is not None
        prefix, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)

        def turn_rows(x: Float[Tensor, "b heads s e"]) -> Float[Tensor, "b heads s e"]:
            turned = rotate(x[:, :, prefix:], rope, half=half)
            return torch.cat([x[:, :, :prefix], turned], dim=2).type_as(heads.v)

        turned = Heads(turn_rows(heads.q), turn_rows(heads.k), heads.v, heads.keys)
        return repeat_keys(attn, turned)

    def find_mask(self, call: BlockCall) -> Mask:
        """Return the mask, or the bias of relative positions, for the tokens that are left."""
        given = LaidOutForm.find_mask(self, call)
        own = make_own_bias(self.attn)
        if own is None:
            return given
        own = own if call.cells is None else take_pairs(own, find_rows(call))
        return own if given is None else own + given

    def mix(self, heads: Heads, mask: Mask, call: BlockCall) -> Float[Tensor, "b s he"]:
        """Attend; heads side by side."""
        return mix_heads(self.attn, heads, mask)

    def leave(
        self, mixed: Float[Tensor, "b s he"], y: Float[Tensor, "b s d"]
    ) -> Float[Tensor, "b s d"]:
        """Return what attention returns."""
        return leave_heads(self.attn, mixed, y)


@dataclass(frozen=True, slots=True)
class SplitDiTBlock(SplitForm):
    """A block of DiT or SiT (adaLN-zero) in two halves, in the layout of their research code.

    Each half computes the modulation of all six, which has one row per sample.

    Paper: Peebles and Xie, Scalable Diffusion Models with Transformers, 2023.
    """

    def modulate(self, call: BlockCall) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of attention, and those of the MLP."""
        if call.condition is None:
            name = type(self.block).__name__
            raise HandOverError(f"{name} needs a condition (b, c), and none came")
        modulation: Tensor = self.block.adaLN_modulation(call.condition)
        return modulation[:, None].chunk(6, dim=-1)

    def enter(self, call: BlockCall) -> Entry:
        """Return what attention takes of the tokens, and the gate."""
        shift, scale, gate, *_ = self.modulate(call)
        return self.block.norm1(call.x) * (1 + scale) + shift, gate

    def make_heads(self, y: Float[Tensor, "b s d"], call: BlockCall) -> Heads:
        """Return queries, keys and values."""
        return project_heads(self.attn, y, getattr(self.attn, "scale", None))

    def mix(self, heads: Heads, mask: Mask, call: BlockCall) -> Float[Tensor, "b s he"]:
        """Attend; heads side by side."""
        return mix_heads(self.attn, heads, mask)

    def leave(
        self, mixed: Float[Tensor, "b s he"], y: Float[Tensor, "b s d"]
    ) -> Float[Tensor, "b s d"]:
        """Return what attention returns."""
        return leave_heads(self.attn, mixed, y)

    def add(
        self, call: BlockCall, mixed: Float[Tensor, "b s d"], gate: Gate
    ) -> Float[Tensor, "b s d"]:
        """Add what attention returned to the tokens."""
        assert gate is not None
        return call.x + gate * mixed

    def run_mlp(self, call: BlockCall) -> BlockCall:
        """Run the second half."""
        *_, shift, scale, gate = self.modulate(call)
        moved = self.block.norm2(call.x) * (1 + scale) + shift
        return call.with_x(call.x + gate * self.block.mlp(moved))

    def check_inputs(self, call: BlockCall) -> None:
        """Raise a `HandOverError` unless the form knows all that the block takes."""
        check_known(self.block, call, ())


def project_heads(
    attn: Any,  # noqa: ANN401 - timm need not be installed
    y: Float[Tensor, "b s d"],
    scale: object = None,
) -> Heads:
    """Return queries, keys and values, by the submodules of an attention.

    Args:
        attn: attention with `qkv`, or with `q_proj`, `k_proj` and `v_proj`, and whatever else
            timm's have.
        y: what attention takes.
        scale: factor of the logits, where it is a number.
    """
    if getattr(attn, "qkv", None) is not None:
        qkv = project_qkv(attn, y) if hasattr(attn, "q_bias") else attn.qkv(y)
        q, k, v = rearrange(qkv, "b s (three h e) -> three b h s e", three=3, h=attn.num_heads)
    else:
        key_heads = getattr(attn, "num_kv_heads", attn.num_heads)
        q = rearrange(attn.q_proj(y), "b s (h e) -> b h s e", h=attn.num_heads)
        k = rearrange(attn.k_proj(y), "b s (h e) -> b h s e", h=key_heads)
        v = rearrange(attn.v_proj(y), "b s (h e) -> b h s e", h=key_heads)
    if "q_norm" in attn._modules:
        q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
    return Heads(q, k, v, k, scale if isinstance(scale, float) else None)


def repeat_keys(attn: Any, heads: Heads) -> Heads:  # noqa: ANN401
    """Give each query head its key head, where there are fewer of those."""
    groups = getattr(attn, "num_kv_groups", 1)
    if groups == 1:
        return heads
    k, v = (part.repeat_interleave(groups, dim=1) for part in (heads.k, heads.v))
    return Heads(heads.q, k, v, heads.keys, heads.scale)


def mix_heads(attn: Any, heads: Heads, mask: Mask) -> Float[Tensor, "b s he"]:  # noqa: ANN401
    """Attend by the fused kernel; heads side by side."""
    dropped = getattr(attn, "attn_drop", None)
    rate = float(getattr(dropped, "p", dropped) or 0.0) if attn.training else 0.0
    mixed = F.scaled_dot_product_attention(
        heads.q, heads.k, heads.v, attn_mask=mask, dropout_p=rate, scale=heads.scale
    )
    return rearrange(mixed, "b h s e -> b s (h e)")


def leave_heads(
    attn: Any,  # noqa: ANN401
    mixed: Float[Tensor, "b s he"],
    y: Float[Tensor, "b s d"],
) -> Float[Tensor, "b s d"]:
    """Return what an attention returns, out of its heads and what it took."""
    parts = attn._modules
    mixed = attn.norm(mixed) if "norm" in parts else mixed
    mixed = mixed * attn.gate(y).sigmoid() if parts.get("gate") is not None else mixed
    projected: Tensor = attn.proj(mixed)
    return attn.proj_drop(projected) if "proj_drop" in parts else projected


def make_own_bias(attn: Any) -> Float[Tensor, "1 heads s s"] | None:  # noqa: ANN401
    """Return the bias of relative positions that a block makes for the whole image, if any."""
    if getattr(attn, "relative_position_bias_table", None) is not None:
        bias: Tensor = attn._get_rel_pos_bias()
        return bias
    rel_pos = getattr(attn, "rel_pos", None)
    return None if rel_pos is None else rel_pos.get_bias()
