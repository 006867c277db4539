"""Blocks of other people on packed tokens: all samples in one run, each as long as it is.

A form runs the submodules of a block; `packed_forms` says which blocks have one.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.attention import Ragged, attend_packed
from adaptok.backbones.block_forms import check_untouched
from adaptok.errors import HandOverError, HostOptionError


@dataclass(frozen=True, slots=True)
class PackedForm(ABC):
    """A block as a function of packed tokens, made of the block's own submodules.

    Args:
        block: the block; it stays where it is.
    """

    kind: ClassVar[str]
    block: Any  # a module; timm need not be installed

    @abstractmethod
    def __call__(
        self, x: Float[Tensor, "t d"], ragged: Ragged, condition: Float[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "t d"]:
        """Run the block on the tokens of all samples.

        Args:
            x: tokens of all samples in one run.
            ragged: where the samples lie.
            condition: conditioning vector of each sample, where the block takes one.

        Returns:
            What the block returns for each sample alone.

        Raises:
            HandOverError: a condition is missing.
            HostOptionError: in training, whole samples or attention weights are dropped at random;
                or a hook listens to the block, which its form would pass by.
        """


@dataclass(frozen=True, slots=True)
class PackedViTBlock(PackedForm):
    """Packed form of exactly `timm.models.vision_transformer.Block` with `timm.layers.Attention`.

    Example:
        >>> from timm.models.vision_transformer import Block
        >>> block = Block(32, num_heads=2, qkv_bias=True, init_values=1.0).eval()
        >>> form, ragged = PackedViTBlock(block), one_run((2, 3))
        >>> x = torch.randn(5, 32)
        >>> torch.allclose(form(x, ragged)[2:], block(x[None, 2:])[0], atol=1e-5)
        True
    """

    kind: ClassVar[str] = "timm Block"

    def __call__(
        self, x: Float[Tensor, "t d"], ragged: Ragged, condition: Float[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "t d"]:
        """Run the block on the tokens of all samples (see `PackedForm.__call__`)."""
        block = self.block
        check_untouched(block)
        check_nothing_dropped(block)
        x = x + block.ls1(attend_tokens(block.attn, block.norm1(x), ragged))
        out: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
        return out


@dataclass(frozen=True, slots=True)
class PackedDiTBlock(PackedForm):
    """Packed form of a block of DiT or SiT (adaLN-zero), in the layout of their research code.

    The modulation is computed for each sample and spread to its tokens by index.

    Paper: Peebles and Xie, Scalable Diffusion Models with Transformers, 2023.
    """

    kind: ClassVar[str] = "DiT block"

    def __call__(
        self, x: Float[Tensor, "t d"], ragged: Ragged, condition: Float[Tensor, "b c"] | None = None
    ) -> Float[Tensor, "t d"]:
        """Run the block on the tokens of all samples (see `PackedForm.__call__`)."""
        block = self.block
        if condition is None:
            raise HandOverError(f"{type(block).__name__} needs a condition (b, c), and none came")
        check_untouched(block)
        check_nothing_dropped(block)
        modulation = block.adaLN_modulation(condition).index_select(0, ragged.batch)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * attend_tokens(block.attn, block.norm1(x) * (1 + scale1) + shift1, ragged)
        out: Tensor = x + gate2 * block.mlp(block.norm2(x) * (1 + scale2) + shift2)
        return out


def attend_tokens(
    attn: Any,  # noqa: ANN401 - timm need not be installed
    x: Float[Tensor, "t d"],
    ragged: Ragged,
) -> Float[Tensor, "t d"]:
    """Let the tokens of each sample attend to each other, by the submodules of an attention.

    Args:
        attn: attention with `qkv`, `proj`, `num_heads` and whatever else timm's has.
        x: tokens.
        ragged: where the samples lie.

    Returns:
        What the attention returns for each sample alone.
    """
    parts = attn._modules
    q, k, v = rearrange(attn.qkv(x), "t (three h e) -> three t h e", three=3, h=attn.num_heads)
    if "q_norm" in parts:
        q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
    scale = getattr(attn, "scale", None)
    mixed = attend_packed(q, k, v, ragged, scale=scale if isinstance(scale, float) else None)
    out = rearrange(mixed, "t h e -> t (h e)")
    if "norm" in parts:
        out = attn.norm(out)
    if parts.get("gate") is not None:
        out = out * attn.gate(x).sigmoid()
    projected: Tensor = attn.proj(out)
    return attn.proj_drop(projected) if "proj_drop" in parts else projected


def check_nothing_dropped(block: nn.Module) -> None:
    """Raise a `HostOptionError` where training drops samples or attention weights at random."""
    if not block.training:
        return
    paths = [getattr(block, name, None) for name in ("drop_path1", "drop_path2")]
    rates = [getattr(path, "drop_prob", 0.0) or 0.0 for path in paths]
    attn_drop = getattr(getattr(block, "attn", None), "attn_drop", None)
    rates.append(float(getattr(attn_drop, "p", attn_drop) or 0.0))
    if any(rate > 0 for rate in rates):
        raise HostOptionError(
            f"{type(block).__name__} drops whole samples (drop_path) or attention weights "
            'at random in training, which layout "packed" has no form of: set these rates to 0, '
            'call model.eval(), or use layout "bucketed"'
        )


def one_run(lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Ragged:
    """Return where samples of some lengths lie in a run.

    Args:
        lengths: tokens of each sample.
        device: where the run lies.

    Example:
        >>> one_run((2, 3)).batch
        tensor([0, 0, 1, 1, 1])
    """
    counts = torch.tensor(lengths, device=device)
    batch = torch.arange(len(lengths), device=device).repeat_interleave(counts)
    ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Ragged(batch, ptr, lengths)
