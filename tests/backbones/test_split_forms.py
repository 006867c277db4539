"""Split forms of single blocks: options, training, gradients, copies, and what has none."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from backbones.dit_blocks import (
    HEADS,
    WIDTH,
    CausalDiTBlock,
    DiTBlock,
    MaskedDiTBlock,
    MixingDiTBlock,
    SwappedDiTBlock,
)
from backbones.split_checks import check_whole, find_case, split_model, visit_blocks
from timm.layers import Attention, AttentionRope, DiffAttention, Mlp, RmsNorm, SwiGLU
from timm.models import beit, eva
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import nn
from transformers import Dinov2Config, ViTConfig
from transformers.models.dinov2.modeling_dinov2 import Dinov2Layer
from transformers.models.vit.modeling_vit import ViTLayer

from adaptok.backbones.split_forms import can_split, split_blocks
from adaptok.calls import BlockCall, TokenInput
from adaptok.errors import HandOverError, HostOptionError, ShapeError, UnsupportedModelError
from benchmarks.architectures.case import randomise

NORM = partial(nn.LayerNorm, eps=1e-6)
DROPS = {"drop_path": 0.4, "attn_drop": 0.2, "proj_drop": 0.1}


def make_unfused(block):
    block.attn.fused_attn = False
    return block


def tower(kind, config, **options):
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": WIDTH}
    settings = config(**sizes, **options)
    settings._attn_implementation = "sdpa"
    return kind(settings)


def partial_attention(**options):
    class Maker(Attention):
        def __new__(cls, *args, **kwargs):
            return Attention(*args, **(kwargs | options))

    return Maker


BLOCKS = {
    "plain": lambda: Block(WIDTH, HEADS),
    "scaled": lambda: Block(WIDTH, HEADS, init_values=0.5, qkv_bias=True),
    "query and key norms": lambda: Block(WIDTH, HEADS, qk_norm=True, norm_layer=NORM),
    "RMS norms": lambda: Block(WIDTH, HEADS, norm_layer=RmsNorm, qk_norm=True),
    "norms inside": lambda: Block(WIDTH, HEADS, scale_attn_norm=True, scale_mlp_norm=True),
    "SwiGLU": lambda: Block(WIDTH, HEADS, mlp_layer=SwiGLU),
    "gated": lambda: Block(WIDTH, HEADS, attn_layer=partial_attention(gated=True)),
    "wide heads": lambda: Block(WIDTH, HEADS, attn_layer=partial_attention(attn_head_dim=20)),
    "norms behind": lambda: ResPostBlock(WIDTH, HEADS, init_values=0.5),
    "eva": lambda: eva.EvaBlock(WIDTH, HEADS, init_values=0.5, swiglu_mlp=True, qk_norm=True),
    "eva, apart": lambda: eva.EvaBlock(
        WIDTH, HEADS, qkv_fused=False, scale_mlp=True, swiglu_mlp=True, scale_attn_inner=True
    ),
    "eva, attention scaled only": lambda: eva.EvaBlock(
        WIDTH, HEADS, init_values=0.5, attn_only_layer_scale=True, gated_attn=True
    ),
    "eva, fewer key heads": lambda: eva.EvaBlock(
        WIDTH, 4, num_kv_heads=2, attn_type="rope", qkv_fused=False
    ),
    "eva, norms behind": lambda: eva.EvaBlockPostNorm(WIDTH, HEADS, swiglu_mlp=True),
    "beit": lambda: beit.Block(WIDTH, HEADS, init_values=0.5, qkv_bias=True, window_size=(2, 3)),
    "beit, unscaled": lambda: beit.Block(WIDTH, HEADS, swiglu_mlp=True, scale_mlp=True),
    "ViTLayer": lambda: tower(ViTLayer, ViTConfig),
    "Dinov2Layer": lambda: tower(Dinov2Layer, Dinov2Config, use_swiglu_ffn=True),
    "DiT": DiTBlock,
    "DiT, query and key norms": lambda: DiTBlock(qk_norm=True, norm_layer=NORM),
}
TRAINED = {
    "drops": lambda: Block(WIDTH, HEADS, init_values=0.5, **DROPS),
    "eva drops": lambda: eva.EvaBlock(WIDTH, HEADS, init_values=0.5, **DROPS),
    "beit drops": lambda: beit.Block(WIDTH, HEADS, init_values=0.5, qkv_bias=True, **DROPS),
    "norms behind": lambda: ResPostBlock(WIDTH, HEADS, **DROPS),
    "ViTLayer": lambda: tower(
        ViTLayer, ViTConfig, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1
    ),
    "Dinov2Layer": lambda: tower(
        Dinov2Layer, Dinov2Config, drop_path_rate=0.4, attention_probs_dropout_prob=0.1
    ),
    "DiT": lambda: DiTBlock(attn_drop=0.2, proj_drop=0.1),
}


def make_call(block, b=3):
    condition = torch.randn(b, WIDTH) if hasattr(block, "adaLN_modulation") else None
    return BlockCall(torch.randn(b, 7, WIDTH), (2, 3), 1, condition=condition)


def run_block(block, call):
    out = block(call.x) if call.condition is None else block(call.x, call.condition)
    return call.with_x(out)


def run_form(block, call):
    (form,) = split_blocks([block])
    return form.finish(form.attend(call, keys=True, class_attention=True).call)


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())
def test_outputs_and_gradients_are_those_of_the_block(make):
    block = randomise(make())
    call = make_call(block)
    x = call.x.requires_grad_()
    inputs = [x, *block.parameters()]
    if call.condition is not None:
        inputs.append(call.condition.requires_grad_())
    expected, found = run_block(block, call).x, run_form(block, call).x
    assert torch.equal(found, expected)
    direction = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((out * direction).sum(), inputs, allow_unused=True)
        for out in (expected, found)
    ]
    moved = [other is not None and bool(other.abs().max() > 0) for other in gradients[0]]
    assert sum(moved) > 0.8 * len(moved)
    for mine, other in zip(*gradients, strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "query and key norms", "eva", "beit"])
def test_a_block_without_the_fused_kernel(name):
    block = make_unfused(randomise(BLOCKS[name]()))
    call = make_call(block)
    expected, found = run_block(block, call).x, run_form(block, call).x
    assert (expected - found).abs().max() <= 1e-6 * expected.abs().max()


def test_a_tower_without_the_fused_kernel():
    case = find_case("transformers/dinov2")
    model = case.build()
    model.set_attn_implementation("eager")
    visit_blocks(model, case.inputs(model), check_whole(split_model(model, case)), few=True)


@pytest.mark.parametrize("make", TRAINED.values(), ids=TRAINED.keys())
def test_training_draws_as_the_block_does(make):
    block = randomise(make()).train()
    call = make_call(block, b=8)
    outs = []
    for run in (run_block, run_form, run_block):
        torch.manual_seed(len(outs) // 2)
        outs.append(run(block, call).x)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("name", ["drops", "ViTLayer", "DiT"])
def test_checkpointed_halves(name):
    block = randomise(TRAINED[name]()).train()
    call = make_call(block)
    call.x.requires_grad_()
    (form,) = split_blocks([block])
    runs = []
    block.mlp.register_forward_hook(lambda *_: runs.append("mlp"))
    gradients = []
    for checkpointed in (False, True):
        block.zero_grad()
        call.x.grad = None
        if isinstance(block, ViTLayer):
            block.gradient_checkpointing = checkpointed  # such a layer is told by itself
        else:
            call = replace(call, checkpoint=checkpointed)
        torch.manual_seed(0)
        form.finish(form.attend(call, keys=True).call).x.square().mean().backward()
        gradients.append([call.x.grad, *(p.grad.clone() for p in block.parameters())])
    assert len(runs) == 1 + 2
    for mine, other in zip(*gradients, strict=True):
        assert torch.equal(mine, other)


def test_without_gradients_nothing_is_checkpointed():
    block = randomise(Block(WIDTH, HEADS))
    call = replace(make_call(block), checkpoint=True)
    with torch.no_grad():
        assert torch.equal(run_form(block, call).x, run_block(block, call).x)


@pytest.mark.parametrize("name", ["scaled", "ViTLayer", "DiT"])
def test_compiled_halves_are_one_graph(name):
    torch._dynamo.reset()
    block = randomise(BLOCKS[name]())
    (form,) = split_blocks([block])
    call = make_call(block)

    def run(x, bias):
        attended = form.attend(call.with_x(x), key_bias=bias, keys=True, class_attention=True)
        return form.finish(attended.call).x, attended.keys, attended.class_attention

    bias = torch.rand(3, 7)
    with torch.no_grad():
        found = torch.compile(run, fullgraph=True, backend="eager")(call.x, bias)
        for mine, other in zip(found, run(call.x, bias), strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("name", ["eva", "Dinov2Layer", "DiT"])
def test_copies_belong_to_the_copied_block(name, copied):
    block = randomise(BLOCKS[name]())
    other, (form,) = copied((block, split_blocks([block], first=2)))
    assert form.block is other
    assert form.index == 2
    call = make_call(block)
    assert torch.equal(form.finish(form.attend(call).call).x, run_block(block, call).x)


def test_the_mlp_takes_as_many_tokens_as_are_left():
    block = randomise(Block(WIDTH, HEADS, init_values=0.5))
    (form,) = split_blocks([block])
    attended = form.attend(make_call(block))
    whole = form.finish(attended.call)
    few = form.finish(attended.call.take(torch.tensor([[0, 4], [5, 1], [2, 3]])))
    rows = torch.tensor([[0, 1, 5], [0, 6, 2], [0, 3, 4]])
    expected = whole.x.gather(1, rows[..., None].expand(-1, -1, WIDTH))
    torch.testing.assert_close(few.x, expected, rtol=0, atol=1e-6)
    assert few.cells.tolist() == [[0, 4], [5, 1], [2, 3]]


# What has no split form


class MyBlock(Block):
    pass


class MyAttention(Attention):
    pass


class MyMlp(Mlp):
    pass


class MyEva(eva.EvaBlock):
    pass


class MyLayer(ViTLayer):
    pass


class MyNorm(nn.Module):
    def forward(self, x):
        return x - x.mean(1, keepdim=True)


def change(block, name, part):
    setattr(block, name, part)
    return block


def listen(block, name="attn"):
    block.get_submodule(name).register_forward_hook(lambda *_: None)
    return block


OTHERS = {
    "a subclass": lambda: MyBlock(WIDTH, HEADS),
    "a subclass of attention": lambda: Block(WIDTH, HEADS, attn_layer=MyAttention),
    "differential attention": lambda: Block(WIDTH, HEADS, attn_layer=DiffAttention),
    "side by side": lambda: ParallelScalingBlock(WIDTH, HEADS),
    "side by side, differential": lambda: DiffParallelScalingBlock(WIDTH, 2),
    "several side by side": lambda: ParallelThingsBlock(WIDTH, HEADS),
    "another MLP": lambda: Block(WIDTH, HEADS, mlp_layer=MyMlp),
    "a convolutional MLP": lambda: change(Block(WIDTH, HEADS), "mlp", Mlp(WIDTH, use_conv=True)),
    "a norm over tokens": lambda: change(Block(WIDTH, HEADS), "norm2", MyNorm()),
    "a norm over tokens behind": lambda: change(ResPostBlock(WIDTH, HEADS), "norm2", MyNorm()),
    "a scale of its own": lambda: change(Block(WIDTH, HEADS), "ls1", nn.Linear(WIDTH, WIDTH)),
    "one part more": lambda: change(Block(WIDTH, HEADS), "adapter", nn.Linear(WIDTH, WIDTH)),
    "another eva": lambda: MyEva(WIDTH, HEADS),
    "eva with other attention": lambda: change(
        eva.EvaBlock(WIDTH, HEADS), "attn", Attention(WIDTH, HEADS)
    ),
    "rotary attention in a Block": lambda: change(
        Block(WIDTH, HEADS), "attn", AttentionRope(WIDTH, HEADS)
    ),
    "another layer": lambda: tower(MyLayer, ViTConfig),
    "another layer's norm": lambda: change(tower(ViTLayer, ViTConfig), "layernorm_after", MyNorm()),
    "a hook": lambda: listen(Block(WIDTH, HEADS)),
    "a hook on a layer": lambda: listen(tower(ViTLayer, ViTConfig), ""),
    "another forward": lambda: change(Block(WIDTH, HEADS), "forward", lambda x: x),
    "DiT, swapped": SwappedDiTBlock,
    "DiT, causal": CausalDiTBlock,
    "DiT, masked": MaskedDiTBlock,
    "DiT, mixing": MixingDiTBlock,
    "torch's own": lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, norm_first=True),
    "no block": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_other_blocks_have_none(make):
    block = make()
    assert not can_split(block)
    name = type(block).__name__
    with pytest.raises(UnsupportedModelError, match=rf"block 4 is a {name}.*EvaBlock.*DiT and SiT"):
        split_blocks([Block(WIDTH, HEADS), block], first=3)


def test_a_refusal_names_attention_too():
    with pytest.raises(UnsupportedModelError, match="a Block with DiffAttention, and"):
        split_blocks([Block(WIDTH, HEADS, attn_layer=DiffAttention)])


def test_a_hook_that_sleeps_for_hidden_states_is_none():
    def output_capturing_hook(*_):
        raise AssertionError

    layer = tower(ViTLayer, ViTConfig)
    layer.register_forward_hook(output_capturing_hook)
    layer.attention.register_forward_hook(output_capturing_hook)
    call = make_call(layer)
    assert run_form(layer, call).x.shape == call.x.shape


def test_a_hook_that_comes_later_is_refused():
    block = Block(WIDTH, HEADS).eval()
    (form,) = split_blocks([block])
    call = make_call(block)
    for part in (block, block.attn):
        handle = part.register_forward_pre_hook(lambda *_: None)
        with pytest.raises(HostOptionError, match=f"hook listens to {type(part).__name__}"):
            form.attend(call)
        handle.remove()
    form.attend(call)


def test_class_attention_needs_a_token_in_front():
    block = Block(WIDTH, HEADS)
    (form,) = split_blocks([block])
    call = BlockCall(torch.randn(2, 6, WIDTH), (2, 3))
    with pytest.raises(UnsupportedModelError, match=r"no token there.*such as the keys"):
        form.attend(call, class_attention=True)


def test_unknown_inputs_are_refused():
    block = Block(WIDTH, HEADS)
    (form,) = split_blocks([block])
    call = make_call(block)
    rope = {"rope": TokenInput(torch.randn(1, 1, 6, 32), axes=(2,))}
    unknown = {
        "rope": replace(call, token_inputs=rope),
        "size": replace(call, sample_inputs={"size": torch.ones(3)}),
        "is_causal": replace(call, shared={"is_causal": True}),
        "text": replace(call, streams={"text": torch.ones(3, 2, 4)}),
    }
    for name, other in unknown.items():
        with pytest.raises(HandOverError, match=f"split form of Block does not know {name}, "):
            form.attend(other)
    form.attend(replace(call, shared={"is_causal": False, "attn_mask": None}))


def test_a_bias_of_a_wrong_shape_is_refused():
    block = Block(WIDTH, HEADS)
    (form,) = split_blocks([block])
    with pytest.raises(ShapeError, match=r"7 keys, \(3, 7\) or \(3, 3, 7\), got \(3, 6\)"):
        form.attend(make_call(block), key_bias=torch.zeros(3, 6))


def test_a_condition_is_needed():
    (form,) = split_blocks([DiTBlock()])
    with pytest.raises(HandOverError, match=r"DiTBlock needs a condition \(b, c\)"):
        form.attend(BlockCall(torch.randn(2, 6, WIDTH), (2, 3)))


def test_attention_that_hides_its_weights_takes_no_bias():
    layer = tower(ViTLayer, ViTConfig)
    layer.attention.config._attn_implementation = "flash_attention_2"
    (form,) = split_blocks([layer])
    call = make_call(layer)
    for wanted in ({"key_bias": torch.zeros(3, 7)}, {"class_attention": True}):
        with pytest.raises(HostOptionError, match=r"'flash_attention_2' takes no bias.*sdpa"):
            form.attend(call, **wanted)
