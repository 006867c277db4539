"""Blocks of other people in two halves: attention with its residual, and the MLP with its own.

A form runs the submodules of a block; `split_forms` says which blocks have one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptok.calls import BlockCall
from adaptok.errors import HandOverError, HostOptionError, UnsupportedModelError
from adaptok.split_run import Attended, attend_class, join_bias

KeyBias = Float[Tensor, "b s"] | Float[Tensor, "b heads s"] | None
Mask = Float[Tensor, "..."] | Bool[Tensor, "..."] | None
Gate = Float[Tensor, "b 1 d"] | None
Entry = tuple[Float[Tensor, "b s d"], Gate]
ClassName = tuple[str, str]  # module and name of a class that need not be installed
SLEEPING = {"output_capturing_hook"}  # stays for ever where hidden states were once asked for


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Queries, keys and values of all tokens, as attention takes them.

    Args:
        q: queries.
        k: keys; where they have fewer heads than the queries, those are repeated in the end.
        v: values, likewise.
        keys: keys before they were rotated or repeated.
        scale: factor of the logits; None means `e ** -0.5`.
    """

    q: Float[Tensor, "b heads s e"]
    k: Float[Tensor, "b _ s e"]
    v: Float[Tensor, "b _ s e"]
    keys: Float[Tensor, "b key_heads s e"]
    scale: float | None = None


@dataclass(frozen=True, slots=True)
class SplitForm(ABC):
    """A block as two functions, made of the block's own submodules.

    In training, dropout and the dropping of whole samples are the block's own modules, which draw
    in its order: the same seed gives the same tokens.

    Args:
        block: the block; it stays where it is.
        index: its place in the host, for inputs that differ from block to block.
    """

    attention: ClassVar[str] = "attn"  # name of the child
    block: Any  # a module; timm need not be installed
    index: int

    @property
    def attn(self) -> Any:  # noqa: ANN401
        """The attention of the block."""
        return self.block._modules[self.attention]

    def at(self, index: int) -> "SplitForm":
        """Return the same block at another place of the list."""
        return replace(self, index=index)

    def attend(
        self,
        call: BlockCall,
        *,
        key_bias: KeyBias = None,
        keys: bool = False,
        class_attention: bool = False,
    ) -> Attended:
        """Run attention with its norm, scale and residual.

        Where the host checkpoints its blocks, each half is checkpointed by itself.

        Args:
            call: the tokens, and what the block takes beside them.
            key_bias: number added to the logits of each key; None is the block's own way.
            keys: whether keys are wanted.
            class_attention: whether the attention of the first token is wanted.

        Returns:
            The tokens after the attention residual, and what was wanted.

        Raises:
            HandOverError: the block takes something that its form does not know.
            HostOptionError: a hook listens to the block, which its form would pass by; or its
                attention runs in a way that takes no bias.
            ShapeError: there is not one bias for each key.
            UnsupportedModelError: class attention is wanted of a model without prefix tokens.
        """
        check_unheard(self.block, self.attn)
        self.check_inputs(call)
        if class_attention and call.start == 0:
            raise UnsupportedModelError(
                "class attention is that of the first token in front of the cells, and this model "
                "has no token there: take a measure that needs none, such as the keys"
            )
        run = self.run_attention
        attended: Attended = run_half(self.block, call, run, key_bias, keys, class_attention)
        return attended

    def finish(self, call: BlockCall) -> BlockCall:
        """Run the MLP with its norm, scale and residual.

        Args:
            call: tokens after the attention residual, as many as are left.

        Returns:
            The call after the block.
        """
        finished: BlockCall = run_half(self.block, call, self.run_mlp)
        return finished

    def run_attention(
        self, call: BlockCall, key_bias: KeyBias, keys: bool, class_attention: bool
    ) -> Attended:
        """Run the first half, as `attend` says."""
        y, gate = self.enter(call)
        heads = self.make_heads(y, call)
        obstacle = self.find_obstacle()
        if obstacle and (class_attention or key_bias is not None):
            raise HostOptionError(obstacle)
        mask = join_bias(self.find_mask(call), key_bias, heads.q)
        mixed = self.leave(self.mix(heads, mask, call), y)
        return Attended(
            call.with_x(self.add(call, mixed, gate)),
            keys=heads.keys if keys else None,
            class_attention=(
                attend_class(heads.q, heads.k, mask, heads.scale) if class_attention else None
            ),
        )

    @abstractmethod
    def run_mlp(self, call: BlockCall) -> BlockCall:
        """Run the second half, as `finish` says."""

    @abstractmethod
    def enter(self, call: BlockCall) -> Entry:
        """Return what attention takes of the tokens, and what gates what it returns, if any."""

    @abstractmethod
    def make_heads(self, y: Float[Tensor, "b s d"], call: BlockCall) -> Heads:
        """Return queries, keys and values."""

    @abstractmethod
    def mix(self, heads: Heads, mask: Mask, call: BlockCall) -> Float[Tensor, "b s he"]:
        """Attend, as the block itself does; heads side by side."""

    @abstractmethod
    def leave(
        self, mixed: Float[Tensor, "b s he"], y: Float[Tensor, "b s d"]
    ) -> Float[Tensor, "b s d"]:
        """Return what attention returns, out of its heads and what it took."""

    @abstractmethod
    def add(
        self, call: BlockCall, mixed: Float[Tensor, "b s d"], gate: Gate
    ) -> Float[Tensor, "b s d"]:
        """Add what attention returned to the tokens."""

    def find_mask(self, call: BlockCall) -> Mask:
        """Return the mask, or the bias of pairs, that attention takes."""
        return None

    def find_obstacle(self) -> str:
        """Return why attention takes no bias of keys; nothing where it does."""
        return ""

    @abstractmethod
    def check_inputs(self, call: BlockCall) -> None:
        """Raise a `HandOverError` unless the form knows all that the block takes."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A class of blocks: attention, then an MLP, each with norms, scales and a residual.

    Args:
        name: module and name of the class.
        attention: name of the child that attends.
        attentions: its known classes.
        mlps: known classes of the child `mlp`.
        norms: children in front of attention and MLP; empty names mean that there is none.
        after: what comes behind attention, and behind the MLP: children, or weights that
            multiply.
        parts: known classes among those, beside norms, dropout and the identity.
        more: further children, which `find_mask` reads.
        inputs: inputs per token that the block takes, the mask first.
    """

    name: ClassName
    attention: str
    attentions: tuple[ClassName, ...]
    mlps: tuple[ClassName, ...]
    norms: tuple[str, str]
    after: tuple[tuple[str, ...], tuple[str, ...]]
    parts: tuple[ClassName, ...]
    inputs: tuple[str, ...]
    more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LaidOutForm(SplitForm):
    """The form of a block whose class has a `BlockLayout`.

    Args:
        block: the block.
        index: its place in the host.
        layout: how its class is laid out.
    """

    layout: BlockLayout

    @property
    def attn(self) -> Any:  # noqa: ANN401
        """The attention of the block."""
        return self.block._modules[self.layout.attention]

    def enter(self, call: BlockCall) -> Entry:
        """Return what attention takes of the tokens; nothing gates it."""
        return run_norm(self.block, self.layout.norms[0], call.x), None

    def add(
        self, call: BlockCall, mixed: Float[Tensor, "b s d"], gate: Gate
    ) -> Float[Tensor, "b s d"]:
        """Add what attention returned to the tokens."""
        return call.x + run_parts(self.block, self.layout.after[0], mixed)

    def run_mlp(self, call: BlockCall) -> BlockCall:
        """Run the second half."""
        moved = self.block.mlp(run_norm(self.block, self.layout.norms[1], call.x))
        return call.with_x(call.x + run_parts(self.block, self.layout.after[1], moved))

    def find_mask(self, call: BlockCall) -> Mask:
        """Return the mask, or the bias of pairs, that attention takes."""
        given = call.token_inputs.get(self.layout.inputs[0])
        return None if given is None else given.value

    def check_inputs(self, call: BlockCall) -> None:
        """Raise a `HandOverError` unless the form knows all that the block takes."""
        check_known(self.block, call, self.layout.inputs)


def run_norm(block: nn.Module, name: str, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
    """Run a norm of a block, or none if the name is empty."""
    return getattr(block, name)(x) if name else x


def run_parts(
    block: nn.Module, names: tuple[str, ...], x: Float[Tensor, "b s d"]
) -> Float[Tensor, "b s d"]:
    """Run children of a block one after the other, or multiply by its weights."""
    for name in names:
        part = getattr(block, name)
        if part is not None:
            x = part(x) if isinstance(part, nn.Module) else part * x
    return x


def run_half(block: nn.Module, call: BlockCall, run: Callable[..., Any], *wanted: Any) -> Any:  # noqa: ANN401
    """Run half of a block, checkpointed where the host checkpoints its blocks."""
    itself = getattr(block, "gradient_checkpointing", False) and block.training
    if torch.is_grad_enabled() and (call.checkpoint or itself):
        return checkpoint(run, call, *wanted, use_reentrant=False)
    return run(call, *wanted)


def check_known(block: nn.Module, call: BlockCall, known: tuple[str, ...]) -> None:
    """Raise a `HandOverError` where a block takes something that its form would leave out."""
    beside = [
        *call.token_inputs,
        *call.depth_inputs,
        *call.sample_inputs,
        *(name for name, stream in call.streams.items() if stream is not None),
        *(name for name, value in call.shared.items() if value is not None and value is not False),
    ]
    unknown = [name for name in beside if name not in known]
    if unknown:
        raise HandOverError(
            f"the split form of {type(block).__name__} does not know {', '.join(unknown)}, which "
            "the host gives to its blocks: this version of the host is not supported"
        )


def is_heard(module: nn.Module) -> bool:
    """Say whether somebody listens to a module's calls or has replaced its forward."""
    names = {getattr(hook, "__name__", "") for hook in module._forward_hooks.values()}
    return bool(names - SLEEPING or module._forward_pre_hooks or "forward" in vars(module))


def check_unheard(*modules: nn.Module) -> None:
    """Raise a `HostOptionError` where hooks of a block or its attention would be passed by."""
    if torch.compiler.is_compiling():
        return
    for module in modules:
        if is_heard(module):
            raise HostOptionError(
                f"a hook listens to {type(module).__name__} (offloading does, too), and a split "
                "block runs its submodules one by one: remove the hook, or unwrap the model"
            )
