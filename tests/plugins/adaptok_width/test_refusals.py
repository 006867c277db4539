"""Bad input by its message; the model is as it was."""

import pytest
import timm
import torch
from adaptok_width import DynamicWidth
from adaptok_width.matching import find_form
from torch import nn
from width_oracles import fill, make_dc, make_diffusers, make_inputs, make_research, wrap_width

import adaptok
from adaptok.dc.blocks import DiTBlock
from adaptok.errors import BudgetError, ConfigError, HostOptionError, StackError
from adaptok.testing import make_vit
from benchmarks.architectures.facebook_models import DiT as ResearchDiT
from benchmarks.architectures.facebook_models import DiTBlock as ResearchBlock


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0}, "target of 'width' is a share in .0, 1., got 0.0"),
        ({"target": 1.5}, "target of 'width' is a share"),
        ({"groups": 0}, "groups of 'width' is a whole number of at least 1, got 0"),
        ({"steps": 0.0}, "steps of 'width' is a finite number above 0, got 0.0"),
        ({"start": float("inf")}, "start of 'width' is a finite number above 0, got inf"),
        ({"temperature": -1.0}, "temperature of 'width' is a finite number above 0"),
        ({"cache_mb": -1.0}, "cache_mb of 'width' is a finite number from 0 on"),
        ({"gate_heads": False, "groups": 1, "gate_tokens": False}, "has nothing to choose"),
        ({"head": 3}, "head"),
    ],
)
def test_options(options, message):
    with pytest.raises(ConfigError, match=message):
        adaptok.wrap(make_dc(), stack=[{"name": "width"} | options])


def test_a_vit_has_no_step():
    with pytest.raises(
        StackError, match=r"'width' needs the diffusion step, and .* hands none over"
    ):
        adaptok.wrap(make_vit(), stack=["width"])


def test_one_head():
    model = ResearchDiT((8, 12), hidden_size=32, depth=2, num_heads=1)
    inputs = make_inputs(fill(model).eval())
    expected = model(*inputs)
    with pytest.raises(StackError, match=r"attention of DiTBlock has one head.*gate_heads=False"):
        adaptok.wrap(model, stack=["width"])
    assert torch.equal(model(*inputs), expected)
    adaptok.wrap(model, stack=[{"name": "width", "gate_heads": False, "groups": 4}])
    assert torch.allclose(model(*inputs), expected, atol=1e-4)


def test_groups_divide_the_channels():
    with pytest.raises(
        StackError, match="384 channels of the MLP of DiTBlock cannot be cut into 5"
    ):
        adaptok.wrap(make_dc(), stack=[{"name": "width", "groups": 5}])


def test_blocks_of_one_size():
    model = make_research()
    model.blocks[2] = ResearchBlock(96, 4)
    with pytest.raises(StackError, match=r"blocks of one size.*give a span of equal blocks"):
        adaptok.wrap(model, stack=["width"])
    adaptok.wrap(model, stack=["width"], span=(0, 2))


class Twisted(ResearchBlock):
    """Has every attribute, and computes something else."""

    def forward(self, x, c):
        return super().forward(x, c) + 0.1 * self.norm1(x)


class Gated(ResearchBlock):
    """Has one more part."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.gate = nn.Linear(width, width)


@pytest.mark.parametrize("kind", [Twisted, Gated])
def test_unknown_blocks_are_named(kind):
    model = make_research()
    model.blocks = nn.ModuleList(kind(96, 6) for _ in range(3))
    with pytest.raises(StackError, match=f"block 0, a {kind.__name__}, has no form.*known are"):
        adaptok.wrap(model, stack=["width"])
    assert not adaptok.is_wrapped(model)


def test_other_families_are_refused_with_what_is_known():
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4, sample_size=8,
        cross_attention_dim=32, caption_channels=16,
    )  # fmt: skip
    with pytest.raises(StackError, match="a BasicTransformerBlock, has no form"):
        adaptok.wrap(model, stack=["width"])


class TimmLike(nn.Module):
    """DiT's block as the research code makes it of timm's parts."""

    def __init__(self, width, heads, qk_norm=False, drop=0.0, gated=False):
        super().__init__()
        from timm.layers import Attention, Mlp, SwiGLU

        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        extra = {"qk_norm": True, "norm_layer": nn.LayerNorm} if qk_norm else {}
        self.attn = Attention(width, num_heads=heads, qkv_bias=True, **extra)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = (
            SwiGLU(width, 4 * width)
            if gated
            else Mlp(width, 4 * width, act_layer=lambda: nn.GELU("tanh"), drop=drop)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        a, b, g, d, e, h = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + g * self.attn(self.norm1(x) * (1 + b) + a)
        return x + h * self.mlp(self.norm2(x) * (1 + e) + d)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"drop": 0.1}])
def test_blocks_of_timms_parts(options):
    assert timm.__version__
    plain, model = make_research(), make_research()
    torch.manual_seed(0)
    blocks = nn.ModuleList(TimmLike(96, 6, **options) for _ in range(3))
    plain.blocks = fill(blocks).eval()
    model.blocks = plain.blocks
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = plain(*inputs)
        adaptok.wrap(model, stack=["width"])
        assert float((model(*inputs) - expected).abs().max() / expected.abs().max()) < 1e-5
    adaptok.unwrap(model)
    if not options:
        _, stage = wrap_width(model, gate_tokens=False)
        masks = stage.read_masks((420.0,))
        x, _, y = inputs
        with torch.no_grad():
            found = model(x, torch.full((3,), 420.0), y)
            adaptok.unwrap(model)
            for block, heads, groups in zip(blocks, masks.heads[0], masks.groups[0], strict=True):
                block.attn.proj.weight *= heads.repeat_interleave(16)
                block.mlp.fc2.weight *= groups.repeat_interleave(64)
            expected = plain(x, torch.full((3,), 420.0), y)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_gated_mlps_have_no_form():
    assert find_form(TimmLike(32, 2, gated=True)) is None
    assert find_form(TimmLike(32, 2)) is not None
    assert find_form(DiTBlock(32, 2)) is not None


def test_a_trial_leaves_block_and_numbers_as_they_were():
    block = fill(TimmLike(32, 2, drop=0.5)).train()
    before = {k: v.clone() for k, v in block.state_dict().items()}
    state = torch.get_rng_state()
    assert find_form(block) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in block.modules())
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


def test_hooks_and_replaced_layers_are_refused_when_called():
    model, _ = wrap_width(make_research())
    inputs = make_inputs(model)
    layer = model.get_submodule("blocks.1.attn.qkv")
    hook = layer.register_forward_hook(lambda *_: None)
    with pytest.raises(HostOptionError, match="a hook listens to Linear of DiTBlock"):
        model(*inputs)
    hook.remove()
    model(*inputs)

    class Adapter(nn.Linear):
        pass

    model.get_submodule("blocks.1.mlp")[2] = Adapter(384, 96)
    with pytest.raises(HostOptionError, match=r"was replaced by a Adapter.*merge adapters"):
        model(*inputs)


def test_diffusers_attention_kwargs_are_refused():
    model, _ = wrap_width(make_diffusers())
    x, t, y = make_inputs(model)
    with pytest.raises(Exception, match=r"attention_kwargs|cross_attention_kwargs"):
        model(x, t.long(), y, cross_attention_kwargs={"scale": 2.0})


def test_limits():
    model, stage = wrap_width(make_dc())
    with pytest.raises(BudgetError, match="exclude each other"):
        stage.limit_tokens(keep=0.5, tokens=3)
    stage.limit_tokens(tokens=17)
    with pytest.raises(BudgetError, match="more than the 16 cells"):
        model(*make_inputs(model))
    with pytest.raises(ConfigError, match="needs gate_tokens=True"):
        DynamicWidth(gate_tokens=False).limit_tokens(keep=0.5)


def test_a_stage_without_a_wrap():
    with pytest.raises(StackError, match="has seen no blocks yet"):
        DynamicWidth().tabulate((1.0,))


def test_a_stage_goes_into_another_wrap_of_the_same_blocks():
    model, stage = wrap_width(make_dc())
    inputs = make_inputs(model)
    expected = model(*inputs)
    adaptok.unwrap(model)
    adaptok.wrap(model, stack=[stage], verify=False)  # it is not fresh any more
    assert torch.equal(model(*inputs), expected)
    with pytest.raises(StackError, match=r"was made for blocks like .*: make a new one"):
        adaptok.wrap(make_dc(), stack=[stage], span=(1, 3))
