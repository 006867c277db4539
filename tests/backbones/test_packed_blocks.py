"""Packed forms, held against their blocks sample by sample."""

from functools import partial

import pytest
import torch
from backbones.dit_blocks import HEADS, WIDTH, DiTBlock
from timm.layers import Attention, RmsNorm, SwiGLU
from timm.models.vision_transformer import Block
from torch import nn

from adaptok.backbones.packed_blocks import PackedDiTBlock, PackedViTBlock, one_run
from adaptok.backbones.packed_forms import find_packed_form
from adaptok.errors import HandOverError, HostOptionError
from benchmarks.architectures import facebook_models
from benchmarks.architectures.case import randomise

LENGTHS = (5, 1, 11)
NORM = partial(nn.LayerNorm, eps=1e-6)


def make_unfused(**options):
    block = Block(WIDTH, HEADS, **options)
    block.attn.fused_attn = False
    return block


VIT_BLOCKS = {
    "plain": lambda: Block(WIDTH, HEADS, qkv_bias=True),
    "scaled": lambda: Block(WIDTH, HEADS, init_values=0.5),
    "query and key norms": lambda: Block(WIDTH, HEADS, qk_norm=True, norm_layer=NORM),
    "not fused": lambda: make_unfused(qkv_bias=True, qk_norm=True),
    "RMS norms": lambda: Block(WIDTH, HEADS, norm_layer=RmsNorm, qk_norm=True),
    "norms inside": lambda: Block(WIDTH, HEADS, scale_attn_norm=True, scale_mlp_norm=True),
    "SwiGLU": lambda: Block(WIDTH, HEADS, mlp_layer=SwiGLU),
    "gated": lambda: Block(WIDTH, HEADS, attn_layer=partial_attention(gated=True)),
    "wide heads": lambda: Block(WIDTH, HEADS, attn_layer=partial_attention(attn_head_dim=20)),
    "paths dropped in training": lambda: Block(WIDTH, HEADS, drop_path=0.3, attn_drop=0.2),
}
DIT_BLOCKS = {
    "of timm's parts": DiTBlock,
    "with query and key norms": lambda: DiTBlock(qk_norm=True, norm_layer=NORM),
    "of its own parts": lambda: facebook_models.DiTBlock(WIDTH, HEADS),
}


def partial_attention(**options):
    """A constructor of timm's attention that `Block` can ask for its base class."""

    class Maker(Attention):
        def __new__(cls, *args, **kwargs):
            return Attention(*args, **(kwargs | options))

    return Maker


def run_each(block, x, condition=None):
    """The block on each sample alone."""
    outs = []
    for sample, piece in enumerate(x.split(LENGTHS)):
        beside = () if condition is None else (condition[sample : sample + 1],)
        outs.append(block(piece[None], *beside)[0])
    return torch.cat(outs)


def check_form(block, form, condition=None):
    x = torch.randn(sum(LENGTHS), WIDTH, requires_grad=True)
    inputs = [x, *block.parameters()]
    if condition is not None:
        inputs.append(condition.requires_grad_())
    expected = run_each(block, x, condition)
    found = form(x, one_run(LENGTHS), condition)
    assert (expected - x).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    direction = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * direction).sum(), inputs)
    packed = torch.autograd.grad((found * direction).sum(), inputs)
    for mine, other in zip(packed, gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", VIT_BLOCKS.values(), ids=VIT_BLOCKS.keys())
def test_vit_blocks(make):
    block = randomise(make())
    form = find_packed_form(block)
    assert isinstance(form, PackedViTBlock)
    check_form(block, form)


@pytest.mark.parametrize("make", DIT_BLOCKS.values(), ids=DIT_BLOCKS.keys())
def test_dit_blocks(make):
    block = randomise(make())
    form = find_packed_form(block)
    assert isinstance(form, PackedDiTBlock)
    check_form(block, form, torch.randn(3, WIDTH))


def test_half_precision():
    block = randomise(DiTBlock()).bfloat16()
    x, c = torch.randn(17, WIDTH).bfloat16(), torch.randn(3, WIDTH).bfloat16()
    with torch.no_grad():
        found = find_packed_form(block)(x, one_run(LENGTHS), c)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, run_each(block, x, c), rtol=0.05, atol=0.1)


def test_a_sample_sees_no_other():
    block = randomise(Block(WIDTH, HEADS))
    form = find_packed_form(block)
    x = torch.randn(17, WIDTH)
    with torch.no_grad():
        before = form(x, one_run(LENGTHS))
        x[5] += 1  # the one token of the second sample
        after = form(x, one_run(LENGTHS))
    changed = (before != after).any(-1).nonzero().flatten()
    assert changed.tolist() == [5]


@pytest.mark.parametrize("rates", [{"drop_path": 0.1}, {"attn_drop": 0.1}])
def test_training_that_drops_at_random_is_refused(rates):
    form = find_packed_form(Block(WIDTH, HEADS, **rates).train())
    with pytest.raises(HostOptionError, match=r'drop_path.*"bucketed"'):
        form(torch.randn(17, WIDTH), one_run(LENGTHS))


def test_training_without_such_rates_works():
    block = randomise(Block(WIDTH, HEADS, proj_drop=0.0)).train()
    check_form(block, find_packed_form(block))


def test_a_condition_is_needed():
    form = find_packed_form(randomise(DiTBlock()))
    with pytest.raises(HandOverError, match=r"DiTBlock needs a condition \(b, c\)"):
        form(torch.randn(17, WIDTH), one_run(LENGTHS))


def test_a_hook_that_comes_later_is_refused():
    block = randomise(Block(WIDTH, HEADS))
    form = find_packed_form(block)
    handle = block.register_forward_hook(lambda *_: None)
    with pytest.raises(HostOptionError, match="hook listens to Block"):
        form(torch.randn(17, WIDTH), one_run(LENGTHS))
    handle.remove()
    assert form(torch.randn(17, WIDTH), one_run(LENGTHS)).shape == (17, WIDTH)
