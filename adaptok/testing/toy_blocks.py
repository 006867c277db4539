"""Toy blocks without weights: they mix a sample's tokens and use all that a call brings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor

from adaptok.calls import BlockCall
from adaptok.packed_run import PackedBlock
from adaptok.reduce_stage import ReduceStage
from adaptok.split_run import Attended, KeyBias
from adaptok.stages import BlockRange, BlockRunner, Stage
from adaptok.testing.models import DEPTH
from adaptok.testing.report import require


def mix_tokens(call: BlockCall, first: int, last: int) -> BlockCall:
    """Stand for blocks that mix the tokens of a sample and are steered by its inputs."""
    for _ in range(first, last):
        mean = call.x.mean(1, keepdim=True)
        steer = sum_inputs(call)
        text = call.streams["text"]
        call = replace(
            call.with_x(call.x + torch.tanh(0.5 * call.x + mean + steer)),
            streams={"text": None if text is None else text + 0.1 * mean},
        )
    return call


def sum_inputs(call: BlockCall) -> Tensor | float:
    """Return what a sample's own inputs add to each of its tokens, `(b 1 d)`."""
    given = [*call.sample_inputs.values(), call.condition]
    return sum((0.1 * rearrange(x, "b d -> b 1 d") for x in given if x is not None), 0.0)


@dataclass(frozen=True, slots=True)
class ToyHalves:
    """Toy blocks in two halves: what `run` does is all in the second one.

    Args:
        run: runs whole blocks.
    """

    run: BlockRunner

    def attend(
        self,
        block: int,
        call: BlockCall,
        *,
        key_bias: KeyBias = None,
        keys: bool = False,
        class_attention: bool = False,
    ) -> Attended:
        """Give keys and the attention of the first token (see `stages.BlockHalves`)."""
        b, s, d = call.x.shape
        heads = 3 if d % 3 == 0 else 1
        require(
            key_bias is None or tuple(key_bias.shape) in ((b, s), (b, heads, s)),
            f"the bias of keys has the shape {None if key_bias is None else tuple(key_bias.shape)}"
            f", one number for each of {s} keys is ({b}, {s})",
        )
        key = rearrange(call.x, "b s (h e) -> b h s e", h=heads)
        seen = None
        if class_attention:
            logits = (key[:, :, :1].float() * key.float()).sum(-1) / d
            seen = logits.softmax(-1)
        return Attended(call, key if keys else None, seen)

    def finish(self, block: int, call: BlockCall) -> BlockCall:
        """Run the block (see `stages.BlockHalves`)."""
        return self.run(call, block, block + 1)


def make_range(
    stage: object, run: BlockRunner = mix_tokens, forms: Sequence[PackedBlock] | None = None
) -> BlockRange:
    """Return toy blocks as a wrap would give them to a stage.

    Args:
        stage: who runs them; they have halves where `adaptok.wrap` would give it any.
        run: what they do.
        forms: their packed forms.
    """
    asks = isinstance(stage, ReduceStage) or (
        isinstance(stage, Stage) and (stage.effects.needs_keys or stage.effects.needs_attention)
    )
    return BlockRange(
        run,
        0,
        DEPTH,
        forms=None if forms is None else tuple(forms),
        halves=ToyHalves(run) if asks else None,
    )
