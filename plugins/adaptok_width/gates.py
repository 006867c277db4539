"""The routers of all blocks of a wrap, and what follows from them for one block."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from adaptok import BlockCall, Budget, Routing
from adaptok.budgets import apply_budget
from adaptok_width.losses import count_ratio
from adaptok_width.masks import (
    BlockWidth,
    StepRouter,
    TokenRouter,
    draw_noise,
    hard_mask,
    put_through,
)
from adaptok_width.running import ChooseTokens, Masks, MaskTokens


@dataclass(frozen=True, slots=True)
class Shape:
    """What blocks are like.

    Args:
        first: number of the first block.
        blocks: how many.
        heads: heads of attention.
        groups: channel groups of the MLP.
        width: features of a token.
        hidden: channels of the MLP.
    """

    first: int
    blocks: int
    heads: int
    groups: int
    width: int
    hidden: int


class BlockGates(nn.Module):
    """The routers of all blocks of a wrap.

    Args:
        shape: of the blocks.
        gate_heads: whether heads are chosen.
        gate_tokens: whether tokens are.
        steps: length of the host's scale of steps.
        start: logit of everything in the beginning.
        temperature: of the sigmoid whose gradient decisions have.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        gate_heads: bool,
        gate_tokens: bool,
        steps: float,
        start: float,
        temperature: float,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.gate_heads = gate_heads
        self.temperature = temperature
        heads = shape.heads if gate_heads else 1
        self.step = StepRouter(shape.blocks, heads, shape.groups, steps, start)
        count = shape.blocks if gate_tokens else 0
        self.tokens = nn.ModuleList(TokenRouter(shape.width, start) for _ in range(count))

    def decide(self, timestep: float, blocks: slice) -> tuple[BlockWidth, ...]:
        """Return what runs in some blocks at a step."""
        widths = self.step.decide(timestep, blocks)
        if self.gate_heads:
            return widths
        every = tuple(range(self.shape.heads))
        return tuple(BlockWidth(every, found.groups) for found in widths)

    def choose_tokens(self, block: int, call: BlockCall, limit: Budget) -> ChooseTokens | None:
        """Return what says which tokens run the MLP of a block; None where all of them do.

        Args:
            block: its place among the blocks of the wrap.
            call: the tokens; only grid tokens are chosen from, the others always run.
            limit: how many run.
        """
        if not self.tokens:
            return None
        limit = limit if call.part is None else limit.choose(call.part.samples)
        others = call.x.shape[1] - call.num_cells

        def choose(y: Float[Tensor, "b s d"]) -> tuple[Bool[Tensor, "b s"], int | None]:
            kept = rank_tokens(self.judge(block, call, y), limit)
            if not limit.is_uniform:
                return surround(kept, call), None
            count = min(limit.count(call.num_cells), call.num_cells)
            return surround(kept, call), y.shape[0] * (count + others)

        return choose

    def judge(self, block: int, call: BlockCall, y: Float[Tensor, "b s d"]) -> Float[Tensor, "b n"]:
        """Return the logit of each grid token."""
        logits: Tensor = self.tokens[block](y[:, call.start : call.start + call.num_cells])
        return logits

    def draw_masks(self, call: BlockCall, blocks: slice, limit: Budget) -> list[Masks]:
        """Draw what multiplies the parts of some blocks in training.

        All random numbers are drawn here, so that a block that is checkpointed gets the same ones
        when it runs again.

        Args:
            call: the tokens, with the step of each sample.
            blocks: places among the blocks of the wrap.
            limit: how many tokens run each MLP.
        """
        assert call.timestep is not None
        heads, groups = self.step(call.timestep, blocks)
        made = []
        for number in range(heads.shape[1]):
            on = [self.draw_part(logits[:, number]) for logits in (heads, groups)]
            tokens = self.mask_tokens(blocks.start + number, call, limit) if self.tokens else None
            made.append(Masks(heads=on[0], groups=on[1], tokens=tokens))
        return made

    def draw_part(self, logits: Float[Tensor, "b rest"]) -> Float[Tensor, "b parts"] | None:
        """Draw which heads or groups of a block run; the first one always does."""
        if not logits.shape[1]:
            return None
        drawn = hard_mask(logits, self.temperature, draw_noise(logits.shape, logits))
        return torch.cat([torch.ones_like(drawn[:, :1]), drawn], dim=1)

    def mask_tokens(self, block: int, call: BlockCall, limit: Budget) -> MaskTokens:
        """Return what draws the tokens of a block; under a limit they are ranked without noise."""
        limit = limit if call.part is None else limit.choose(call.part.samples)
        noise = draw_noise((call.x.shape[0], call.num_cells), call.x) if limit.is_natural else None

        def mask(y: Float[Tensor, "b s d"]) -> Float[Tensor, "b s"]:
            logits = self.judge(block, call, y)
            if noise is not None:
                return surround(hard_mask(logits, self.temperature, noise), call)
            soft = (logits / self.temperature).sigmoid()
            return surround(put_through(rank_tokens(logits, limit), soft), call)

        return mask

    def weigh(
        self,
        call: BlockCall,
        heads: Float[Tensor, " b"] | float,
        groups: Float[Tensor, " b"] | float,
        tokens: Float[Tensor, " b"] | None,
    ) -> Float[Tensor, " b"]:
        """Return the share of operations of one block, per sample (see `count_ratio`)."""
        one = call.x.new_ones(call.x.shape[0], dtype=torch.float32)
        return count_ratio(
            one * heads,
            one * groups,
            one if tokens is None else tokens,
            count=call.x.shape[1],
            width=self.shape.width,
            hidden=self.shape.hidden,
        )


def rank_tokens(logits: Float[Tensor, "b n"], limit: Budget) -> Bool[Tensor, "b n"]:
    """Return which tokens run: those above the threshold, or as many as a limit says."""
    if limit.is_natural:
        return logits > 0
    kept = apply_budget(Routing(logits.detach().sigmoid()), limit).keep_mask
    assert kept is not None
    return kept


def surround(chosen: Tensor, call: BlockCall) -> Tensor:
    """Put tokens that are no grid cells around those that were chosen; they always run."""
    b, s = call.x.shape[:2]
    behind = s - call.start - call.num_cells
    if not call.start and not behind:
        return chosen
    return torch.cat([chosen.new_ones(b, call.start), chosen, chosen.new_ones(b, behind)], dim=1)
