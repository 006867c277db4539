"""Forms of blocks with relative positions of their own, held against the blocks themselves."""

import copy

import pytest
import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.models import beit, vision_transformer_relpos

from adaptok.backbones.biased_attention import take_pairs
from adaptok.backbones.timm_beit import run_beit_block
from adaptok.backbones.timm_relpos import run_relpos_block
from benchmarks.architectures.case import randomise


def make_beit_block(**options):
    return beit.Block(48, 3, window_size=(3, 5), **options)


def make_relpos_block(kind, bias, **options):
    def make_bias(num_heads, **_):
        return bias((3, 5), num_heads)

    return getattr(vision_transformer_relpos, kind)(48, 3, rel_pos_cls=make_bias, **options)


def own_bias(block):
    attn = block.attn
    return attn.rel_pos.get_bias() if hasattr(attn, "rel_pos") else attn._get_rel_pos_bias()


SEPARATE = make_beit_block(qkv_bias=True)
SEPARATE.attn.qkv_bias_separate = True
BLOCKS = {
    "beit": make_beit_block(),
    "beit, scaled": make_beit_block(init_values=1.0, qkv_bias=True),
    "beit, norm in the MLP": make_beit_block(scale_mlp=True, swiglu_mlp=True, qkv_bias=True),
    "beit, bias apart": SEPARATE,
    "relpos, table": make_relpos_block("RelPosBlock", RelPosBias, init_values=1.0),
    "relpos, MLP": make_relpos_block("RelPosBlock", RelPosMlp, qk_norm=True, qkv_bias=True),
    "norms behind": make_relpos_block("ResPostRelPosBlock", RelPosMlp, init_values=1.0),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_a_form_is_its_block_at_full_length(block, fused):
    block = randomise(copy.deepcopy(block))
    block.attn.fused_attn = fused
    bias = own_bias(block)
    assert bias.std() > 0.05
    form = run_beit_block if type(block) is beit.Block else run_relpos_block
    x = torch.randn(2, bias.shape[-1], 48, requires_grad=True)
    expected = block(x)
    found = form(block, x, bias.expand(2, -1, -1, -1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    weights = [p for p in block.parameters() if p.requires_grad]
    direction = torch.randn_like(expected)
    inputs = [x, *weights]
    expected = torch.autograd.grad((expected * direction).sum(), inputs)
    for gradient, other in zip(
        torch.autograd.grad((found * direction).sum(), inputs), expected, strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


def test_pairs_are_taken_per_sample_with_their_gradient():
    bias = torch.randn(1, 3, 6, 6, requires_grad=True)
    rows = torch.tensor([[0, 2, 5], [1, 2, 4]])
    taken = take_pairs(bias, rows)
    for sample, mine in enumerate(rows):
        assert torch.equal(taken[sample], bias[0][:, mine][:, :, mine])
    taken.sum().backward()
    counts = torch.zeros(6, 6)
    for mine in rows:
        for i in mine:
            counts[i, mine] += 1
    assert torch.equal(bias.grad[0, 1], counts)
