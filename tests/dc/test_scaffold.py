import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, randomise

from adaptok.dc.scaffold import (
    ConvBlock,
    ConvStack,
    LabelEmbedder,
    TimestepEmbedder,
    count_groups,
    encode_time,
    normalise,
)


@pytest.mark.parametrize(
    ("width", "groups"),
    [(384, 32), (96, 32), (32, 32), (16, 16), (48, 24), (56, 28), (1, 1), (37, 1), (66, 22)],
)
def test_the_largest_number_of_groups_up_to_32_that_divides(width, groups):
    assert count_groups(width) == groups


def block_by_hand(block, x, condition):
    w = {name: value.double() for name, value in block.state_dict().items()}
    inner = min(x.shape[1], w["conv2.weight"].shape[0])
    y = F.group_norm(x, count_groups(x.shape[1]), w["norm1.weight"], w["norm1.bias"], eps=1e-5)
    y = F.conv2d(F.silu(y), w["conv1.weight"], w["conv1.bias"], padding=1)
    added = F.silu(condition) @ w["condition.1.weight"].T + w["condition.1.bias"]
    y = y + added[..., None, None]
    assert y.shape[1] == inner
    y = F.group_norm(y, count_groups(inner), w["norm2.weight"], w["norm2.bias"], eps=1e-5)
    y = F.conv2d(F.silu(y), w["conv2.weight"], w["conv2.bias"], padding=1)
    if "skip.weight" in w:
        x = F.conv2d(x, w["skip.weight"], w["skip.bias"])
    return y + x


@pytest.mark.parametrize(("width_in", "width_out"), [(64, 64), (48, 80), (96, 66), (64, 12)])
def test_a_conv_block_is_its_formula(width_in, width_out):
    block = randomise(ConvBlock(width_in, width_out, 20), scale=0.5)
    assert isinstance(block.skip, torch.nn.Identity) == (width_in == width_out)
    x, condition = torch.randn(2, width_in, 4, 7), torch.randn(2, 20)
    expected = block_by_hand(block, x.double(), condition.double())
    assert torch.allclose(block(x, condition).double(), expected, atol=1e-4)
    changed = (block(x, condition.flip(0)) - block(x, condition)).abs().max()
    if width_out > 32:
        assert changed > 0.1
    else:  # a group of one channel takes out again what the condition adds to it
        assert changed < 1e-4


def test_a_conv_stack_is_its_blocks_and_a_norm_over_channels():
    stack = randomise(ConvStack((40, 40, 48), 20))
    x, condition = torch.randn(2, 40, 3, 5), torch.randn(2, 20)
    y = block_by_hand(stack.blocks[0], x.double(), condition.double())
    y = block_by_hand(stack.blocks[1], y, condition.double())
    y = y.flatten(2).transpose(1, 2)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * stack.norm.weight.double()
    assert torch.allclose(stack(x, condition).double(), y, atol=1e-4)


def test_the_norm_of_a_stack_has_an_epsilon_of_1e_5():
    norm = ConvStack((16, 16), 20).norm
    x = torch.randn(4, 16)
    x = x / x.square().mean(-1, keepdim=True).sqrt() * 1e-5**0.5
    assert norm(x).square().mean().item() == pytest.approx(0.5, rel=1e-3)


def test_normalise_takes_the_precision_of_the_weight():
    x = torch.randn(3, 16).to(torch.bfloat16)
    norm = torch.nn.RMSNorm(16, eps=1e-5)
    assert torch.equal(normalise(norm, x), norm(x.float()))
    assert normalise(norm.to(torch.bfloat16), x.float()).dtype == torch.bfloat16


def test_time_codes_are_cosines_then_sines():
    t = torch.tensor([0.0, 1.0, 37.25, 999.0])
    codes = encode_time(t)
    assert codes.shape == (4, 256)
    for i in (0, 1, 64, 127):
        frequency = 10_000 ** (-i / 128)
        for row, time in enumerate(t.tolist()):
            assert codes[row, i].item() == pytest.approx(math.cos(time * frequency), abs=1e-4)
            assert codes[row, 128 + i].item() == pytest.approx(math.sin(time * frequency), abs=1e-4)
    assert torch.equal(encode_time(torch.tensor([37])), encode_time(torch.tensor([37.0])))


def test_the_time_embedder_is_two_layers_on_the_codes():
    embedder = randomise(TimestepEmbedder(24))
    t = torch.tensor([3.0, 700.5])
    first, second = embedder.mlp[0], embedder.mlp[2]
    y = F.silu(encode_time(t) @ first.weight.T + first.bias) @ second.weight.T + second.bias
    assert torch.allclose(embedder(t), y, atol=1e-5)
    assert embedder.to(torch.bfloat16)(t).dtype == torch.bfloat16


def test_the_null_class_is_the_last_row():
    embedder = LabelEmbedder(10, 6)
    assert embedder.table.weight.shape == (11, 6)
    y = torch.tensor([0, 10, 3])
    assert torch.equal(embedder(y), embedder.table.weight[y])


def test_time_and_label_reach_the_router_and_the_decoder():
    """At widths where a norm group has several channels; see the conv block's test for others."""
    model = make_model(hidden_size=160, depth=1)
    x, t, y = torch.randn(2, 4, 12, 18), torch.tensor([10, 450]), torch.tensor([2, 6])
    seen = {}
    for name in ("encoder", "backbone", "decoder", "final_layer"):
        part = getattr(model, name)
        part.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[1]}))
    with torch.no_grad():
        _, routing = model(x, t, y, return_routing=True)
        condition = model.timestep_embedder(t) + model.label_embedder(y)
        for name in ("encoder", "backbone", "decoder", "final_layer"):
            assert torch.equal(seen[name], condition), name
        for other in ({"t": t + 700}, {"y": y + 3}):
            _, moved = model(**({"x": x, "t": t, "y": y} | other), return_routing=True)
            assert (moved.keep_prob - routing.keep_prob).abs().max() > 1e-3
        cells = torch.randn(2, 160, 12, 18)
        changed = model.decoder(cells, condition) - model.decoder(cells, -condition)
        assert changed.abs().max() > 0.1


def test_what_others_hold_is_not_overwritten():
    """In-place steps save memory only where nobody else has the tensor."""
    torch.manual_seed(0)
    block, condition = ConvBlock(8, 8, 16), torch.randn(2, 16)
    x = torch.randn(2, 8, 5, 4)
    held = {}
    for name in ("norm1", "conv2"):
        getattr(block, name).register_forward_hook(
            lambda module, args, out, name=name: held.update({name: (out, out.clone())})
        )
    with torch.no_grad():
        block(x, condition)
    for name, (kept, copy) in held.items():
        assert torch.equal(kept, copy), name


def test_a_norm_that_was_taken_out():
    torch.manual_seed(0)
    block, condition = ConvBlock(8, 8, 16), torch.randn(2, 16)
    block.norm1 = torch.nn.Identity()
    x = torch.randn(2, 8, 5, 4)
    with torch.no_grad():
        without = block(x, condition)
    torch.testing.assert_close(without, block(x, condition))
