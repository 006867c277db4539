"""timm's VisionTransformer in all its kinds, held against its own blocks."""

import pytest
import timm
import torch
from backbones import host_checks, timm_checks
from backbones.host_checks import KEEP, find_case
from backbones.timm_checks import host_of, make_case
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import adaptok
from adaptok.backbones.timm_vit import TimmViT
from adaptok.calls import BlockCall
from adaptok.errors import HostOptionError
from adaptok.hosts import NoMatch
from adaptok.testing import make_vit
from benchmarks.architectures import HostInputs

NAMES = timm_checks.VIT
SOME = [
    "vit_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_so150m_patch16_reg4_map_256",
    "vit_base_patch16_xp_224",
    "vit_small_patch16_18x2_224",
    "vit_tiny_r_s16_p8_224",
]
POST_NORM = "vit_base_patch16_rpn_224"  # reads tokens in another memory layout when none is moved
IMAGES = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(3))


def test_the_catalogue_has_them_all():
    assert len(NAMES) >= 26
    assert set(SOME) < set(NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != POST_NORM])
def test_identity_is_exact(name):
    host_checks.check_identity_keys_and_unwrap(find_case(name), host_of)


@pytest.mark.parametrize("name", [POST_NORM])
def test_identity_is_near(name):
    timm_checks.check_near_identity(find_case(name))


@pytest.mark.parametrize("name", NAMES)
def test_kept_tokens_are_those_of_the_blocks_on_one_sample(name):
    timm_checks.check_oracle(find_case(name))


@pytest.mark.parametrize("name", SOME)
def test_a_sample_does_not_depend_on_its_batch(name):
    host_checks.check_batch_invariance(find_case(name), host_of)


@pytest.mark.parametrize("name", SOME[:3])
def test_copies_have_weights_of_their_own(name):
    host_checks.check_copies(find_case(name), host_of)


@pytest.mark.parametrize("name", SOME)
def test_checkpointing_keeps_gradients(name):
    timm_checks.check_checkpointing(find_case(name))


@pytest.mark.parametrize("name", SOME[:3])
def test_ways_in_and_refusals(name):
    timm_checks.check_ways_in_and_refusals(find_case(name))


def test_one_graph():
    host_checks.check_compile(find_case("vit_medium_patch16_reg4_gap_256"), host_of)


def test_router_learns():
    host_checks.check_router_gradient(find_case("vit_base_patch16_siglip_224"), host_of)


def test_other_models_are_no_match():
    with pytest.raises(NoMatch, match="no timm VisionTransformer"):
        TimmViT.match(nn.Linear(2, 2))


def make_masks(n, heads):
    """Masks that block some keys of every query, of every shape that attention takes."""
    generator = torch.Generator().manual_seed(4)
    allowed = torch.rand(3, heads, n, n, generator=generator) < 0.7
    allowed |= torch.eye(n, dtype=torch.bool)
    bias = torch.randn(3, heads, n, n, generator=generator)
    return {
        "pairs": allowed[0, 0],
        "heads": bias[0],
        "samples": allowed[:, :1],
        "both": bias,
        "keys": bias[:, :1, :1],
    }


@pytest.mark.parametrize("shape", ["pairs", "heads", "samples", "both", "keys"])
def test_masks_are_gathered_along_both_axes(shape):
    vit = make_vit()
    mask = make_masks(25, 3)[shape]
    with torch.no_grad():
        expected = vit(IMAGES, attn_mask=mask)
        assert (expected - vit(IMAGES)).abs().max() > 0.01
        adaptok.wrap(vit, "dc", router="norm", budget=1.0, backbone=host_of(vit))
        torch.testing.assert_close(vit(IMAGES, attn_mask=mask), expected, rtol=0, atol=1e-5)
        adaptok.set_budget(vit, keep=list(KEEP))
        out = []
        vit.blocks.register_forward_hook(
            lambda _, args, kwargs, x: out.append((args[0], x)), with_kwargs=True
        )
        with adaptok.trace(vit) as seen:
            vit(IMAGES, attn_mask=mask)
        ((before, after),) = out
        for sample, kept in enumerate(seen.steps[0].plans[0].keep_mask):
            rows = torch.cat([torch.zeros(1, dtype=torch.long), 1 + kept.nonzero().flatten()])
            own = mask[sample : sample + 1] if mask.ndim == 4 else mask
            own = own if own.shape[-2] == 1 else own[..., rows, :]
            x = before[sample : sample + 1, rows]
            for block in vit.blocks.blocks:
                x = block(x, attn_mask=own[..., rows])
            torch.testing.assert_close(after[sample, rows], x[0], rtol=0, atol=1e-5)


def test_causal_order_is_refused_with_the_way_round():
    vit = adaptok.wrap(make_vit(), "dc", budget=0.5, backbone=host_of(make_vit()))
    with pytest.raises(HostOptionError, match=r"is_causal=True.*attn_mask="):
        vit(IMAGES, is_causal=True)
    assert vit(IMAGES).shape == (3, 10)


def test_dropped_patches_are_refused_in_training_only():
    vit = VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=2, patch_drop_rate=0.5)
    timm_checks.check_dropped_patches(vit, torch.randn(2, 3, 32, 32))


def test_sizes_change_from_call_to_call():
    vit = make_vit()
    adaptok.wrap(vit, "dc", budget=0.5, backbone=host_of(vit))
    for h, w in ((32, 48), (48, 32), (24, 64)):
        with adaptok.trace(vit) as seen:
            vit(torch.randn(1, 3, h, w))
        assert seen.steps[0].grid == (h // 8, w // 8)


def test_padded_sizes_round_up():
    options = {"dynamic_img_size": True, "dynamic_img_pad": True}
    vit = VisionTransformer(32, 8, embed_dim=64, depth=2, num_heads=2, **options).eval()
    adaptok.wrap(vit, "dc", budget=0.5, backbone=host_of(vit))
    with adaptok.trace(vit) as seen:
        vit(torch.randn(1, 3, 30, 41))
    assert seen.steps[0].grid == (4, 6)


def test_other_channels_and_stems():
    def make():
        return timm.create_model("vit_base_mci_224", img_size=64, depth=2, num_heads=2, in_chans=4)

    images = torch.randn(3, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    case = make_case(
        "vit_tiny_patch16_224",
        make,
        cells=(4, 4),
        inputs=lambda _: HostInputs((images,)),
    )
    timm_checks.check_near_identity(case)
    host_checks.check_batch_invariance(case, host_of)


class OneRowDown(TimmViT):
    """Takes the class token for the first cell, and so on."""

    name = "twin"

    def read(self, numbers, args, kwargs):
        return BlockCall(args[0], numbers.grid, self.prefix - 1)


def test_a_wrong_prefix_is_told_by_its_count():
    vit = make_vit()
    host = host_of(vit)
    host.prefix = 0
    with pytest.raises(HostOptionError, match="25 tokens, and 0 in front of the grid"):
        adaptok.wrap(vit, "dc", budget=0.5, backbone=host)
    assert not adaptok.is_wrapped(vit)


def test_a_twin_with_the_wrong_prefix_is_caught_by_the_oracle():
    timm_checks.check_twin_is_caught_by_oracle(find_case("vit_tiny_patch16_224"), OneRowDown)


class Halved(TimmViT):
    """Gives the blocks half of what they got."""

    name = "twin"

    def read(self, numbers, args, kwargs):
        return super().read(numbers, (args[0] / 2, *args[1:]), kwargs)


def test_a_twin_that_changes_the_tokens_is_caught_by_the_probe():
    timm_checks.check_twin_is_caught_by_probe(find_case("vit_tiny_patch16_224"), Halved)
