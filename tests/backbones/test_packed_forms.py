"""Which blocks have a packed form, and which only look as if they had one."""

import copy

import pytest
import torch
from backbones.dit_blocks import (
    HEADS,
    WIDTH,
    CausalDiTBlock,
    DiTBlock,
    MaskedDiTBlock,
    MixingDiTBlock,
    ShiftedDiTBlock,
    SwappedDiTBlock,
)
from timm.layers import Attention, DiffAttention, Mlp
from timm.models.vision_transformer import Block, ResPostBlock
from torch import nn

from adaptok.backbones.packed_forms import find_packed_form, pack_blocks
from adaptok.errors import StackError
from benchmarks.architectures.case import randomise


class MyBlock(Block):
    pass


class MyAttention(Attention):
    pass


class MyMlp(Mlp):
    pass


class MyNorm(nn.Module):
    def forward(self, x):
        return x - x.mean(1, keepdim=True)


def with_part(name, part):
    block = Block(WIDTH, HEADS)
    setattr(block, name, part)
    return block


def with_hook():
    block = Block(WIDTH, HEADS)
    block.attn.register_forward_hook(lambda *_: None)
    return block


def with_another_forward():
    block = Block(WIDTH, HEADS)
    block.forward = lambda x: x
    return block


OTHERS = {
    "a subclass": lambda: MyBlock(WIDTH, HEADS),
    "a subclass of attention": lambda: Block(WIDTH, HEADS, attn_layer=MyAttention),
    "another attention": lambda: Block(WIDTH, HEADS, attn_layer=DiffAttention),
    "another block": lambda: ResPostBlock(WIDTH, HEADS),
    "another MLP": lambda: Block(WIDTH, HEADS, mlp_layer=MyMlp),
    "a norm over tokens": lambda: with_part("norm1", MyNorm()),
    "a scale of its own": lambda: with_part("ls1", nn.Linear(WIDTH, WIDTH)),
    "a convolutional MLP": lambda: with_part("mlp", Mlp(WIDTH, use_conv=True)),
    "a hook": with_hook,
    "another forward": with_another_forward,
    "no block": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_other_blocks_have_none(make):
    assert find_packed_form(make()) is None


TWINS = (SwappedDiTBlock, CausalDiTBlock, MaskedDiTBlock, MixingDiTBlock, ShiftedDiTBlock)


@pytest.mark.parametrize("kind", TWINS)
@pytest.mark.parametrize("fresh", [False, True])
def test_twins_of_dit_blocks_have_none(kind, fresh):
    block = randomise(kind())
    if fresh:  # gates of zero: the block is the identity, and would agree with anything
        nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(block.adaLN_modulation[1].bias)
    assert find_packed_form(block) is None


def test_a_trial_leaves_block_and_random_numbers_alone():
    block = DiTBlock().train()
    nn.init.zeros_(block.adaLN_modulation[1].weight)
    block.mlp.eval()
    weights = copy.deepcopy(block.state_dict())
    modes = [module.training for module in block.modules()]
    state = torch.random.get_rng_state()
    assert find_packed_form(block) is not None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in block.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in block.state_dict().items())
    assert all(parameter.grad is None for parameter in block.parameters())


def test_blocks_without_weights_yet_have_none():
    with torch.device("meta"):
        assert find_packed_form(DiTBlock()) is None


def test_all_blocks_of_a_host_need_one():
    blocks = [DiTBlock() for _ in range(3)]
    assert [form.block for form in pack_blocks(blocks)] == blocks
    with pytest.raises(StackError, match=r"block 1, a MyBlock with Attention, has none.*bucketed"):
        pack_blocks([Block(WIDTH, HEADS), MyBlock(WIDTH, HEADS)])
    with pytest.raises(StackError, match="block 0, a SwappedDiTBlock"):
        pack_blocks([SwappedDiTBlock()])
