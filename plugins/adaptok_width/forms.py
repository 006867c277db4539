"""Blocks of diffusion transformers as their linear layers: what heads and channels are cut from.

Norms, modulation and activations are called as the block's own modules; the four linear layers of
attention and MLP are read, so that some of their rows and columns can run alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from adaptok import BlockCall
from adaptok.errors import HandOverError, HostOptionError

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Entered:
    """What a modulated block makes of its condition: attention's input, and three numbers.

    Args:
        x: the normed and modulated tokens, which attention takes.
        gate1: factor of what attention returns.
        shift2: added to the normed tokens in front of the MLP.
        scale2: one less than their factor.
        gate2: factor of what the MLP returns.
    """

    x: Float[Tensor, "b s d"]
    gate1: Float[Tensor, "b 1 d"]
    shift2: Float[Tensor, "b 1 d"]
    scale2: Float[Tensor, "b 1 d"]
    gate2: Float[Tensor, "b 1 d"]


@dataclass(frozen=True, slots=True)
class WidthForm(ABC):
    """A block whose heads and channels can run apart.

    Args:
        block: the block; it stays where it is.
        activation: between the two layers of the MLP.
    """

    block: Any  # a module of a class that need not be installed
    activation: Activation

    @property
    @abstractmethod
    def projections(self) -> tuple[nn.Linear, ...]:
        """The layer of queries, keys and values, or one layer for each."""

    @property
    @abstractmethod
    def leave(self) -> nn.Linear:
        """The layer behind the heads."""

    @property
    @abstractmethod
    def grow(self) -> nn.Linear:
        """The first layer of the MLP."""

    @property
    @abstractmethod
    def shrink(self) -> nn.Linear:
        """The second layer of the MLP."""

    @property
    @abstractmethod
    def attention(self) -> Any:  # noqa: ANN401
        """The attention, which may have norms of queries and keys, and dropout."""

    @property
    @abstractmethod
    def dropouts(self) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
        """What drops behind attention, between the layers of the MLP, and behind it."""

    @abstractmethod
    def enter(self, call: BlockCall) -> Entered:
        """Norm and modulate the tokens for attention."""

    @abstractmethod
    def norm_again(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Norm the tokens for the MLP."""

    @property
    def heads(self) -> int:
        """Heads of the attention."""
        attention = self.attention
        return int(getattr(attention, "num_heads", None) or attention.heads)

    @property
    def hidden(self) -> int:
        """Channels between the layers of the MLP."""
        return self.grow.out_features

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.grow.in_features

    @property
    def scale(self) -> float | None:
        """Factor of the logits of attention; None means that of its head's width."""
        scale = getattr(self.attention, "scale", None)
        return scale if isinstance(scale, float) else None

    @property
    def drop_rate(self) -> float:
        """How much attention drops in training."""
        drop = getattr(self.attention, "attn_drop", None) if self.block.training else None
        return float(getattr(drop, "p", drop) or 0.0)

    def norm_heads(
        self, q: Float[Tensor, "b s heads e"], k: Float[Tensor, "b s heads e"]
    ) -> tuple[Float[Tensor, "b s heads e"], Float[Tensor, "b s heads e"]]:
        """Norm queries and keys where attention does."""
        parts = self.attention._modules
        if parts.get("q_norm") is None:
            return q, k
        return self.attention.q_norm(q).to(q.dtype), self.attention.k_norm(k).to(k.dtype)

    def check(self, call: BlockCall) -> None:
        """Raise unless a call holds what the block takes, and its layers can be cut.

        Raises:
            HandOverError: the host gives its blocks something that the form does not know.
            HostOptionError: a layer is no plain `nn.Linear` any more, or a hook listens to it.
        """
        self.check_inputs(call)
        if torch.compiler.is_compiling():
            return
        layers = (*self.projections, self.leave, self.grow, self.shrink)
        changed = [layer for layer in layers if type(layer) is not nn.Linear]
        if changed:
            raise HostOptionError(
                f"a linear layer of {type(self.block).__name__} was replaced by a "
                f"{type(changed[0]).__name__}, and 'width' cuts rows out of nn.Linear only: merge "
                "adapters into the weights before, or unwrap the model"
            )
        for module in (self.block, self.attention, *layers):
            if is_touched(module):
                raise HostOptionError(
                    f"a hook listens to {type(module).__name__} of {type(self.block).__name__} "
                    "(offloading does, too), and 'width' runs only a part of it: remove the hook, "
                    "or unwrap the model"
                )

    def check_inputs(self, call: BlockCall) -> None:
        """Raise a `HandOverError` where the host gives something beside tokens and condition."""
        beside = [*call.token_inputs, *call.depth_inputs, *call.sample_inputs, *call.streams]
        beside += [name for name, value in call.shared.items() if value is not None]
        unknown = [name for name in beside if name not in self.known_inputs]
        if unknown:
            raise HandOverError(
                f"'width' does not know {', '.join(unknown)}, which the host gives to "
                f"{type(self.block).__name__}: leave it out, or unwrap the model"
            )

    @property
    def known_inputs(self) -> tuple[str, ...]:
        """Inputs beside tokens and condition that the block takes."""
        return ()


@dataclass(frozen=True, slots=True)
class ResearchForm(WidthForm):
    """A block in the layout of DiT's and SiT's research code.

    Args:
        block: the block.
        activation: between the two layers of the MLP.
        modulation: name of the child that turns a condition into six vectors.
        layers: names of the two layers of `mlp`.
        drops: names of what drops between and behind them.

    Paper: Peebles and Xie, Scalable Diffusion Models with Transformers, 2023.
    """

    modulation: str
    layers: tuple[str, str]
    drops: tuple[str, str]

    @property
    def known_inputs(self) -> tuple[str, ...]:
        """Where the tokens of `adaptok.DCDiT` stand, which its blocks do not take."""
        return ("rows",)

    @property
    def attention(self) -> Any:  # noqa: ANN401
        """The child `attn`."""
        return self.block.attn

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """One layer for all three."""
        return (self.block.attn.qkv,)

    @property
    def leave(self) -> nn.Linear:
        """The child `proj` of attention."""
        layer: nn.Linear = self.block.attn.proj
        return layer

    @property
    def grow(self) -> nn.Linear:
        """The first layer."""
        layer: nn.Linear = self.block.mlp._modules[self.layers[0]]
        return layer

    @property
    def shrink(self) -> nn.Linear:
        """The second layer."""
        layer: nn.Linear = self.block.mlp._modules[self.layers[1]]
        return layer

    @property
    def dropouts(self) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
        """Those of timm's attention and MLP, where they are there."""
        mlp = self.block.mlp._modules
        after = self.block.attn._modules.get("proj_drop")
        return after, mlp.get(self.drops[0]), mlp.get(self.drops[1])

    def enter(self, call: BlockCall) -> Entered:
        """Norm and modulate the tokens (see `WidthForm.enter`)."""
        parts = self.block._modules[self.modulation](call.condition)[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = torch.addcmul(shift1, self.block.norm1(call.x), 1 + scale1)
        return Entered(x, gate1, shift2, scale2, gate2)

    def norm_again(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Run `norm2`."""
        normed: Tensor = self.block.norm2(x)
        return normed

    def check_inputs(self, call: BlockCall) -> None:
        """Ask for a condition, too."""
        # not super(): dataclass with slots makes another class of this one
        WidthForm.check_inputs(self, call)
        if call.condition is None:
            name = type(self.block).__name__
            raise HandOverError(f"{name} needs a condition (b, c), and none came")


@dataclass(frozen=True, slots=True)
class DiffusersForm(WidthForm):
    """`BasicTransformerBlock` of diffusers as its DiT uses it, with `norm_type="ada_norm_zero"`."""

    @property
    def attention(self) -> Any:  # noqa: ANN401
        """The child `attn1`."""
        return self.block.attn1

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """Three layers."""
        attn = self.block.attn1
        return (attn.to_q, attn.to_k, attn.to_v)

    @property
    def leave(self) -> nn.Linear:
        """The layer behind the heads."""
        layer: nn.Linear = self.block.attn1.to_out[0]
        return layer

    @property
    def grow(self) -> nn.Linear:
        """The first layer, which its activation holds."""
        layer: nn.Linear = self.block.ff.net[0].proj
        return layer

    @property
    def shrink(self) -> nn.Linear:
        """The second layer."""
        layer: nn.Linear = self.block.ff.net[2]
        return layer

    @property
    def dropouts(self) -> tuple[nn.Module | None, nn.Module | None, nn.Module | None]:
        """Those of the attention and the MLP."""
        net = self.block.ff.net
        return self.block.attn1.to_out[1], net[1], net[3] if len(net) > 3 else None

    @property
    def known_inputs(self) -> tuple[str, ...]:
        """What its adaptive norm takes."""
        return ("timestep", "class_labels")

    def enter(self, call: BlockCall) -> Entered:
        """Run `norm1`, which embeds time and class by itself (see `WidthForm.enter`)."""
        given = call.sample_inputs
        x, gate1, shift2, scale2, gate2 = self.block.norm1(
            call.x, given.get("timestep"), given.get("class_labels"), hidden_dtype=call.x.dtype
        )
        return Entered(x, gate1[:, None], shift2[:, None], scale2[:, None], gate2[:, None])

    def norm_again(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Run `norm3`."""
        normed: Tensor = self.block.norm3(x)
        return normed


def is_touched(module: nn.Module) -> bool:
    """Say whether somebody listens to a module's calls or has replaced its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU in its tanh form."""
    return F.gelu(x, approximate="tanh")
