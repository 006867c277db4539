import pytest
import torch
import torch.nn.functional as F
from conftest import randomise

from adaptok import Tokens
from adaptok.attention import Ragged
from adaptok.dc.blocks import (
    MLP,
    Attention,
    Backbone,
    DiTBlock,
    FinalLayer,
    initialise_linear,
    zero_linear,
)

LENGTHS = (3, 70, 1, 12)


def make_packed(width=32, lengths=LENGTHS):
    counts = torch.tensor(lengths)
    batch = torch.arange(len(lengths)).repeat_interleave(counts)
    ptr = F.pad(counts.cumsum(0), (1, 0))
    cells = torch.cat([torch.arange(length) for length in lengths])
    return Tokens(torch.randn(sum(lengths), width), cells=cells, batch=batch, ptr=ptr)


def ragged_of(tokens, rung):
    return Ragged(tokens.batch, tokens.ptr, tuple(tokens.counts.tolist()), rung)


def block_by_hand(block, x, condition):
    """One block on dense tokens `(b m d)` by explicit formulas, in float64."""
    w = {name: value.double() for name, value in block.state_dict().items()}
    d, heads = x.shape[-1], block.attn.num_heads
    modulation = F.silu(condition) @ w["modulation.1.weight"].T + w["modulation.1.bias"]
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        modulation[:, None, i * d : (i + 1) * d] for i in range(6)
    )

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    y = norm(x) * (1 + scale1) + shift1
    qkv = y @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]
    outs = []
    for head in range(heads):
        e = d // heads
        q, k, v = (qkv[..., i * d + head * e : i * d + (head + 1) * e] for i in range(3))
        outs.append((q @ k.transpose(1, 2) / e**0.5).softmax(-1) @ v)
    attended = torch.cat(outs, dim=-1) @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    x = x + gate1 * attended
    y = norm(x) * (1 + scale2) + shift2
    y = y @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    y = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    return x + gate2 * (y @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])


def test_a_block_is_its_formula():
    block = randomise(DiTBlock(32, 4), scale=0.5)
    x, condition = torch.randn(2, 9, 32), torch.randn(2, 32)
    expected = block_by_hand(block, x.double(), condition.double())
    assert torch.allclose(block(x, condition).double(), expected, atol=1e-4)
    assert (expected - x).abs().mean() > 0.1


@pytest.mark.parametrize("rung", ["padded", "loop"])
def test_packed_tokens_are_the_dense_ones_of_each_sample(rung):
    backbone = randomise(Backbone(32, depth=2, num_heads=4))
    tokens, condition = make_packed(), torch.randn(len(LENGTHS), 32)
    packed = backbone(tokens.x, condition, ragged_of(tokens, rung))
    for sample in range(len(LENGTHS)):
        piece = slice(tokens.ptr[sample], tokens.ptr[sample + 1])
        alone = backbone(tokens.x[piece][None], condition[sample : sample + 1])
        assert torch.allclose(packed[piece], alone[0], atol=1e-5)
        # a sample has its own condition
        other = backbone(tokens.x[piece][None], condition[[sample - 1]])
        assert not torch.allclose(packed[piece], other[0], atol=1e-2)


def test_recomputing_gives_the_same_values_and_gradients():
    backbone = randomise(Backbone(32, depth=2, num_heads=4))
    tokens, condition = make_packed(), torch.randn(len(LENGTHS), 32)
    results = []
    for recompute in (False, True):
        out = backbone(tokens.x, condition, ragged_of(tokens, "loop"), recompute=recompute)
        grads = torch.autograd.grad(out.square().sum(), backbone.parameters())
        results.append([out, *grads])
    for plain, again in zip(*results, strict=True):
        assert torch.allclose(plain, again, atol=1e-5)


@pytest.mark.parametrize("place", ["norm1", "norm2", "final"])
def test_layer_norms_have_an_epsilon_of_1e_6(place):
    """A variance of 1e-6 comes out as 1/2 of one; with 1e-5 it would be 1/11."""
    x = torch.randn(1, 6, 64, dtype=torch.float64)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False) * 1e-3
    norm = FinalLayer(64, 64, 8).norm if place == "final" else getattr(DiTBlock(64, 4), place)
    assert norm(x).square().mean().item() == pytest.approx(0.5, rel=1e-3)
    assert norm.weight is None
    assert norm.bias is None


def test_the_norm_behind_the_blocks_has_an_epsilon_of_1e_5_and_a_weight():
    backbone = Backbone(64, depth=1, num_heads=4)
    for name, parameter in backbone.named_parameters():
        if name.startswith("blocks"):
            parameter.data.zero_()  # blocks that pass on what comes
    x = torch.randn(1, 6, 64)
    x = x / x.square().mean(-1, keepdim=True).sqrt() * 1e-5**0.5
    out = backbone(x, torch.zeros(1, 64))
    assert out.square().mean().item() == pytest.approx(0.5, rel=1e-3)
    backbone.norm.weight.data.fill_(3.0)
    assert torch.allclose(backbone(x, torch.zeros(1, 64)), 3 * out)


def test_the_gelu_is_that_with_tanh():
    mlp = MLP(1)
    for parameter in mlp.parameters():
        parameter.data.zero_()
    mlp.fc1.weight.data[0, 0] = 1.0
    mlp.fc2.weight.data[0, 0] = 1.0
    x = torch.tensor([[2.3], [-2.3]])  # where both forms differ most
    exact, tanh = (F.gelu(x, approximate=form) for form in ("none", "tanh"))
    assert (exact - tanh).abs().min() > 1e-4
    assert torch.allclose(mlp(x), tanh, atol=1e-6)
    assert mlp.fc1.out_features == 4


def test_the_final_layer_is_its_formula():
    layer = randomise(FinalLayer(16, 32, 6))
    x, condition = torch.randn(3, 5, 16), torch.randn(3, 32)
    modulation = F.linear(F.silu(condition), *layer.modulation[1].parameters())
    shift, scale = modulation[:, None, :16], modulation[:, None, 16:]
    y = F.layer_norm(x, (16,), eps=1e-6) * (1 + scale) + shift
    expected = F.linear(y, *layer.linear.parameters())
    assert torch.allclose(layer(x, condition), expected, atol=1e-5)


def test_the_heads_share_the_width():
    attention = Attention(32, 4)
    assert attention.qkv.bias is not None
    one = Attention(32, 1)
    one.load_state_dict(attention.state_dict())
    x = torch.randn(1, 5, 32)
    assert not torch.allclose(attention(x, None), one(x, None), atol=1e-3)


def test_starts():
    block = DiTBlock(32, 4)
    initialise_linear(block)
    bound = (6 / (32 + 96)) ** 0.5
    weight = block.attn.qkv.weight
    assert 0.9 * bound < weight.abs().max() <= bound
    assert all((p == 0).all() for name, p in block.named_parameters() if name.endswith("bias"))
    x = torch.randn(2, 5, 32)
    assert not torch.equal(block(x, torch.randn(2, 32)), x)
    zero_linear(block.modulation)
    assert torch.equal(block(x, torch.randn(2, 32)), x)
