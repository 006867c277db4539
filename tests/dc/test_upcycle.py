import copy

import pytest
import torch
from conftest import randomise
from torch import nn

import adaptok
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DCDiTConfig, DiTConfig
from adaptok.dc.folder import ModelCard, load_model, save_model
from adaptok.dc.position import encode_grid
from adaptok.dc.upcycle import upcycle
from adaptok.errors import ConfigError, UnsupportedModelError

WIDTH, HEADS, DEPTH = 64, 4, 2


def make_dit(**options):
    options = {
        "hidden_size": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "latent_size": (8, 12),
        "num_classes": 5,
    } | options
    return randomise(DiT(DiTConfig(**options))).eval()


class Attn(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, approximate):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.act = nn.GELU(approximate=approximate)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, approximate="tanh"):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        self.attn, self.mlp = Attn(), Mlp(approximate)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c):
        s1, k1, g1, s2, k2, g2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + g1 * self.attn(self.norm1(x) * (1 + k1) + s1)
        return x + g2 * self.mlp(self.norm2(x) * (1 + k2) + s2)


class ResearchDiT(nn.Module):
    """A stand-in with the names of DiT's research code."""

    def __init__(self, patch=2, side=4, channels=3, approximate="tanh", rows=6):
        super().__init__()
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, WIDTH, patch, patch)
        self.t_embedder = adaptok.dc.scaffold.TimestepEmbedder(WIDTH)
        self.y_embedder = nn.Module()
        self.y_embedder.num_classes = 5
        self.y_embedder.embedding_table = nn.Embedding(rows, WIDTH)
        self.pos_embed = nn.Parameter(encode_grid((side, side), WIDTH)[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(approximate) for _ in range(DEPTH))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(WIDTH, patch**2 * channels)
        randomise(self)


def assert_same_blocks(model, run):
    """Each block gives what `run(number, x, t, y)` gives, condition included."""
    x, t, y = torch.randn(3, 7, WIDTH), torch.tensor([3, 400, 999]), torch.tensor([0, 4, 5])
    condition = model.timestep_embedder(t) + model.label_embedder(y)
    for number, block in enumerate(model.backbone.blocks):
        torch.testing.assert_close(block(x, condition), run(number, x, t, y), atol=2e-5, rtol=1e-4)


def test_blocks_of_the_baseline_are_taken_over():
    host = make_dit()
    before = copy.deepcopy(host.state_dict())
    model = upcycle(host)
    config = model.config
    assert (config.grid, config.position_cells, config.target) == ((8, 12), 2, 4.0)
    assert config.learn_sigma
    assert config.num_classes == 5
    assert_same_blocks(
        model, lambda i, x, t, y: host.blocks[i](x, host.t_embedder(t) + host.y_embedder(y))
    )
    with torch.no_grad():
        model.backbone.blocks[0].mlp.fc1.weight.zero_()  # copied, not shared
    assert all(torch.equal(value, before[name]) for name, value in host.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_host_in_half_precision_gives_its_weights_exactly(dtype):
    host = make_dit().to(dtype)
    model = upcycle(host)
    exact = copy.deepcopy(host).float()
    assert next(model.parameters()).dtype == torch.float32
    assert_same_blocks(
        model, lambda i, x, t, y: exact.blocks[i](x, exact.t_embedder(t) + exact.y_embedder(y))
    )


def test_blocks_of_research_code_are_taken_over():
    host = ResearchDiT(patch=4)
    model = upcycle(host, latent_size=(20, 16), target=3.0, layout="bucketed")
    assert model.config.grid == (20, 16)
    assert model.config.layout == "bucketed"
    assert (model.config.target, model.config.learn_sigma) == (3.0, False)
    table = host.y_embedder.embedding_table
    assert_same_blocks(model, lambda i, x, t, y: host.blocks[i](x, host.t_embedder(t) + table(y)))
    out = model(torch.randn(2, 3, 20, 16), torch.tensor([5, 800]), torch.tensor([1, 5]), drop=0.3)
    assert out.shape == (2, 3, 20, 16)


@pytest.fixture(scope="module")
def diffusers_dit():
    diffusers = pytest.importorskip("diffusers")
    host = randomise(
        diffusers.DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            num_layers=DEPTH,
            sample_size=8,
            out_channels=8,
            norm_num_groups=4,
            num_embeds_ada_norm=5,
        )
    ).eval()
    first = host.transformer_blocks[0].norm1.emb.state_dict()
    for block in host.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return host


def test_blocks_of_diffusers_are_taken_over(diffusers_dit):
    model = upcycle(diffusers_dit.train())
    assert diffusers_dit.training  # as it was
    diffusers_dit.eval()
    assert model.config.frequency_shift == 1
    assert_same_blocks(
        model,
        lambda i, x, t, y: diffusers_dit.transformer_blocks[i](x, timestep=t, class_labels=y),
    )


def test_diffusers_blocks_with_their_own_embedders_are_refused(diffusers_dit):
    host = copy.deepcopy(diffusers_dit)
    with torch.no_grad():
        host.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.add_(1)
    with pytest.raises(UnsupportedModelError, match="block 1 embeds time and label otherwise"):
        upcycle(host)


def test_positions_of_cells_lie_around_those_of_their_patch():
    model = upcycle(make_dit())
    codes = model.position[0].view(4, 2, 6, 2, WIDTH)
    host = encode_grid((4, 6), WIDTH).view(4, 6, WIDTH)
    # slow sines are nearly straight: the mean of a patch's cells is the code of the patch
    slow = slice(WIDTH // 8, WIDTH // 4)
    torch.testing.assert_close(codes.mean((1, 3))[..., slow], host[..., slow], atol=1e-3, rtol=0)
    assert not torch.allclose(codes[:, 0], codes[:, 1], atol=1e-2)


def test_embedders_stay_and_everything_else_learns():
    model = randomise(upcycle(make_dit()), scale=0.1)  # leaves what needs no gradient alone
    host = make_dit()
    assert torch.equal(model.label_embedder.table.weight, host.y_embedder.table.weight)
    out, routing = model(
        torch.randn(2, 4, 8, 12), torch.tensor([5, 800]), torch.tensor([1, 5]), return_routing=True
    )
    (out.square().mean() + adaptok.losses.ratio_loss(routing)).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None}
    frozen = {name for name in still if name.startswith(("timestep_embedder", "label_embedder"))}
    assert still == frozen | {"position"}
    assert len(frozen) == 5
    assert model.condition_norm.weight.grad.abs().sum() > 0


def test_an_upcycled_model_comes_back_from_its_folder(tmp_path):
    model = upcycle(make_dit()).eval()
    randomise(model.final_layer)
    save_model(model, ModelCard(), tmp_path / "model")
    back = load_model(tmp_path / "model").model
    inputs = torch.randn(1, 4, 8, 12), torch.tensor([77]), torch.tensor([2])
    assert torch.equal(back(*inputs), model(*inputs))
    assert back.config == model.config
    assert not back.label_embedder.table.weight.requires_grad


def test_the_condition_is_adapted_for_the_scaffold_only():
    model = randomise(upcycle(make_dit()), scale=0.1)
    seen = {}
    for name in ("encoder", "decoder", "final_layer", "router", "backbone"):
        getattr(model, name).register_forward_hook(
            lambda _, args, out, name=name: seen.update({name: args[1]})
        )
    t, y = torch.tensor([40]), torch.tensor([2])
    model(torch.randn(1, 4, 8, 12), t, y)
    raw = model.timestep_embedder(t) + model.label_embedder(y)
    assert torch.equal(seen["backbone"], raw)
    assert torch.equal(seen["router"].condition, raw)
    for name in ("encoder", "decoder", "final_layer"):
        assert torch.equal(seen[name], model.condition_norm(raw))
    assert not torch.allclose(model.condition_norm(raw), raw)


def drop_bias(host):
    host.blocks[1].attn.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)


def add_norm(host):
    host.blocks[0].attn.q_norm = nn.LayerNorm(4)


def learn_positions(host):
    host.pos_embed.data = torch.randn_like(host.pos_embed)


def widen_head(host):
    host.final_layer.linear = nn.Linear(WIDTH, 5)


def overlap(host):
    host.x_embedder.proj = nn.Conv2d(3, WIDTH, 3, 2, 1)


def remove_labels(host):
    del host.y_embedder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_bias, r"block 1 \(Block\) is no block of DiT: no attn.qkv.bias"),
        (add_norm, "attn.q_norm.weight is unknown"),
        (learn_positions, "not the fixed sine-cosine table"),
        (widen_head, "gives 5 numbers for a patch of 2 x 2 cells of 3 channels: 12 are needed"),
        (overlap, "kernel of .* square patches"),
        (remove_labels, "has no y_embedder: upcycle takes"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    host = ResearchDiT()
    change(host)
    with pytest.raises(UnsupportedModelError, match=message):
        upcycle(host)


def test_blocks_that_compute_something_else_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"block 0 .* gives something else"):
        upcycle(ResearchDiT(approximate="none"))


def test_other_refusals():
    with pytest.raises(UnsupportedModelError, match="5 rows for 5 classes"):
        upcycle(ResearchDiT(rows=5))
    with pytest.raises(UnsupportedModelError, match="a pipeline take its transformer"):
        upcycle("dit")
    with pytest.raises(UnsupportedModelError, match=r"call adaptok.unwrap\(dit\) first"):
        upcycle(adaptok.wrap(make_dit(), chunker="dc", budget=0.5))
    with pytest.raises(ConfigError, match="no multiple of narrowing=7"):
        upcycle(make_dit(), narrowing=7)


def test_the_scaffold_alone_is_that_of_the_reference_model():
    plain = adaptok.DCDiT(DCDiTConfig(hidden_size=64, depth=1, num_heads=2, latent_size=8))
    more = {name for name, _ in upcycle(make_dit()).named_parameters()}
    assert {name for name, _ in plain.named_parameters()} - more == set()
