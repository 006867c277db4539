import pytest
import torch
import torch.nn.functional as F
from conftest import randomise

import adaptok
from adaptok.dc import DiT, DiTConfig
from adaptok.dc.position import encode_grid
from adaptok.errors import BudgetError, LabelError, ShapeError


def make_baseline(**options):
    options = {
        "hidden_size": 64,
        "depth": 2,
        "num_heads": 2,
        "latent_size": (8, 12),
        "num_classes": 10,
    } | options
    return randomise(DiT(DiTConfig(**options))).eval()


def make_batch(b=2, h=8, w=12, c=4):
    return torch.randn(b, c, h, w), torch.arange(b) * 300 + 7, torch.arange(b) + 1


def run_by_hand(model, x, t, y):
    """The baseline patch by patch: cut, embed, run the blocks, put pixels back one by one."""
    p, c_out = model.config.patch_size, model.config.out_channels
    b, _, h, w = x.shape
    weight = model.x_embedder.weight.flatten(1)
    codes = encode_grid((h // p, w // p), model.config.hidden_size)
    condition = model.t_embedder(t) + model.y_embedder(y)
    patches = []
    for row in range(h // p):
        for column in range(w // p):
            patch = x[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
            patches.append(patch.flatten(1) @ weight.T + model.x_embedder.bias)
    tokens = torch.stack(patches, dim=1) + codes
    for block in model.blocks:
        tokens = block(tokens, condition)
    tokens = model.final_layer(tokens, condition)
    out = torch.empty(b, c_out, h, w)
    for row in range(h):
        for column in range(w):
            token = (row // p) * (w // p) + column // p
            for channel in range(c_out):
                place = ((row % p) * p + column % p) * c_out + channel
                out[:, channel, row, column] = tokens[:, token, place]
    return out


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_go_in_and_come_out_in_their_places(patch_size):
    model = make_baseline(patch_size=patch_size)
    x, t, y = make_batch()
    with torch.no_grad():
        out, expected = model(x, t, y), run_by_hand(model, x, t, y)
    assert out.shape == (2, 8, 8, 12)
    assert torch.allclose(out, expected, atol=1e-5)
    # the test can fail: pixels of a patch, rows and columns, channels all differ
    assert not torch.allclose(out, out.flip(2), atol=0.1)
    assert out.std((0, 2, 3)).min() > 0.01


def test_every_cell_sees_every_other_one():
    model = make_baseline(patch_size=4)
    x, t, y = make_batch(b=1)
    moved = x.clone()
    moved[:, :, -1, -1] += 5.0
    assert ((model(x, t, y) - model(moved, t, y)).abs().amax(1) > 0).all()


@pytest.mark.parametrize("size", [(4, 4), (12, 8), (16, 20)])
def test_other_latent_sizes_than_the_configured_one(size):
    model = make_baseline(patch_size=4)
    x, t, y = make_batch(1, *size)
    with torch.no_grad():
        assert torch.allclose(model(x, t, y), run_by_hand(model, x, t, y), atol=1e-5)
    same = make_baseline(patch_size=4, latent_size=size)
    state = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    same.load_state_dict(state | {"pos_embed": same.pos_embed})
    assert torch.allclose(model(x, t, y), same(x, t, y), atol=1e-6)


def test_wrong_inputs_are_refused():
    model = make_baseline(patch_size=4)
    x, t, y = make_batch(1, 8, 10)
    with pytest.raises(ShapeError, match="8 x 10 cells is no multiple of the patch size 4"):
        model(x, t, y)
    x, t, y = make_batch(1)
    with pytest.raises(LabelError, match="label 11 is out of range"):
        model(x, t, torch.tensor([11]))
    with pytest.raises(ShapeError, match="x has 3 channels"):
        model(x[:, :3], t, y)


def test_without_learned_sigma():
    model = make_baseline(learn_sigma=False, in_channels=3)
    x, t, y = make_batch(c=3)
    assert model.out_channels == 3
    assert model(x, t, y).shape == (2, 3, 8, 12)


def test_budgets_are_refused_but_zero_is_none():
    model = make_baseline()
    x, t, y = make_batch()
    plain = model(x, t, y)
    for drop in (None, 0, 0.0, [0.0, 0.0], torch.zeros(2)):
        assert torch.equal(model(x, t, y, drop=drop), plain)
    both = x.repeat(2, 1, 1, 1), t.repeat(2), torch.tensor([1, 2, 10, 10])
    assert model.forward_with_cfg(*both, 2.0, drop=0.0, uncond_drop=0.0).shape == (4, 8, 8, 12)
    for options in (
        {"drop": 0.1}, {"drop": [0.0, 0.5]}, {"drop": torch.tensor([0.2, 0.0])},
        {"keep": 1.0}, {"tokens": 24},
    ):  # fmt: skip
        with pytest.raises(BudgetError, match="fixed-patch DiT keeps all its tokens"):
            model(x, t, y, **options)
        with pytest.raises(BudgetError, match="fixed-patch DiT keeps all its tokens"):
            model.forward_with_cfg(*both, 2.0, **options)
    with pytest.raises(BudgetError, match="use DCDiT, or leave the budget out"):
        model.forward_with_cfg(*both, 2.0, uncond_drop=0.9)
    with pytest.raises(BudgetError, match="DiT has no adaptive part"):
        adaptok.set_budget(model, keep=0.5)


def test_a_routing_is_asked_for_but_is_none():
    model = make_baseline()
    x, t, y = make_batch()
    out, routing = model(x, t, y, return_routing=True)
    assert routing is None
    assert torch.equal(out, model(x, t, y))


def test_guidance():
    model = make_baseline()
    x, t, y = make_batch()
    null = torch.full_like(y, 10)
    garbage = torch.cat([x, torch.randn_like(x)])
    args = garbage, t.repeat(2), torch.cat([y, null])
    with torch.no_grad():
        cond, uncond = model(x, t, y), model(x, t, null)
        out, routing = model.forward_with_cfg(*args, 2.5, return_routing=True)
        everything = model.forward_with_cfg(*args, 2.5, guided_channels=None)
    assert routing is None
    guided = uncond[:, :3] + 2.5 * (cond[:, :3] - uncond[:, :3])
    for half, own in ((out[:2], cond), (out[2:], uncond)):
        assert torch.allclose(half[:, :3], guided, atol=1e-5)
        assert torch.allclose(half[:, 3:], own[:, 3:], atol=1e-5)
    assert torch.equal(everything[:2, :4], everything[2:, :4])
    assert torch.allclose(everything[:2, 4:], cond[:, 4:], atol=1e-5)
    assert not torch.allclose(cond, uncond, atol=0.01)
    with pytest.raises(ShapeError, match="conditional and an unconditional half"):
        model.forward_with_cfg(x[:1], t[:1], y[:1], 2.0)


def test_gradient_checkpointing_changes_nothing():
    plain, saving = make_baseline(), make_baseline(gradient_checkpointing=True)
    x, t, y = make_batch()
    for model in (plain, saving):
        model(x, t, y).square().mean().backward()
    for ours, theirs in zip(plain.parameters(), saving.parameters(), strict=True):
        if ours.requires_grad:
            assert ours.grad.abs().max() > 0
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_gradient_checkpointing_runs_each_block_again():
    model = make_baseline(gradient_checkpointing=True)
    calls = []
    model.blocks[0].mlp.register_forward_hook(lambda *args: calls.append(1))
    out = model(*make_batch())
    assert len(calls) == 1
    out.sum().backward()
    assert len(calls) == 2


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity():
    model = DiT(DiTConfig(hidden_size=64, depth=2, num_heads=2, latent_size=8))
    x, t, y = make_batch(2, 8, 8)
    assert (model(x, t, y) == 0).all()
    tokens, condition = torch.randn(2, 5, 64), torch.randn(2, 64)
    assert torch.equal(model.blocks[1](tokens, condition), tokens)
    assert model.y_embedder.table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    weight = model.x_embedder.weight.flatten(1)
    assert weight.abs().max() <= (6 / sum(weight.shape)) ** 0.5
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize(("scale", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_parameter_counts_are_the_published_ones(scale, millions):
    with torch.device("meta"):
        model = DiT(DiTConfig(scale=scale, patch_size=2))
    count = sum(value.numel() for value in model.state_dict().values())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_patch_embedding_is_a_convolution_without_overlap():
    model = make_baseline(patch_size=2)
    x, _, _ = make_batch()
    embedded = model.x_embedder(x)
    by_unfold = F.unfold(x, 2, stride=2).transpose(1, 2) @ model.x_embedder.weight.flatten(1).T
    expected = by_unfold + model.x_embedder.bias
    assert torch.allclose(embedded.flatten(2).transpose(1, 2), expected, atol=1e-5)


def test_bfloat16():
    model = make_baseline().to(torch.bfloat16)
    x, t, y = make_batch()
    out = model(x, t, y)
    assert out.dtype == torch.bfloat16
    reference = make_baseline()(x, t, y)
    assert (out.float() - reference).abs().mean() < 0.1 * reference.abs().mean()
