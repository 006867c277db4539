"""timm's Eva: rotary tables for all blocks, for each, or none."""

import copy
import dataclasses
import pickle

import pytest
import torch
from backbones import host_checks, timm_checks
from backbones.host_checks import find_case, run
from backbones.timm_checks import host_of, make_case
from timm.models.eva import Eva
from torch import nn

import adaptok
from adaptok.backbones.timm_eva import TimmEva
from adaptok.errors import HostOptionError
from adaptok.hosts import NoMatch
from benchmarks.architectures import HostInputs
from benchmarks.architectures.case import make_images

DINO = "vit_small_patch16_dinov3"
MIXED = "vit_small_patch16_rope_mixed_224"
SOME = [DINO, MIXED, "vit_base_patch16_rope_reg1_gap_256", "vit_base_patch16_sapiens2"]
SIZES = {"img_size": (40, 56), "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
ROTARY = SIZES | {"use_rot_pos_emb": True, "num_classes": 10}
DYNAMIC = {"dynamic_img_size": True, "img_size": (32, 32)}
IMAGES = make_images((5, 7), 8)


def make_eva_case(**options):
    """A case of an Eva that is registered under no name."""
    return make_case(
        "eva02_tiny_patch14_224",
        lambda: Eva(**(ROTARY | options)),
        inputs=lambda _: HostInputs((IMAGES,)),
        prefix=1 + options.get("num_reg_tokens", 0),
    )


UNNAMED = {
    "a learned rotation for each block, any size": make_eva_case(rope_type="mixed", **DYNAMIC),
    "DINOv3's, any size": make_eva_case(rope_type="dinov3", num_reg_tokens=2, **DYNAMIC),
    "three axes": make_eva_case(rope_type="mrope", rope_mrope_section=(4, 6, 6)),
    "half rotations": make_eva_case(rope_rotate_half=True, attn_type="rope"),
}
UNNAMED_CASES = pytest.mark.parametrize("case", UNNAMED.values(), ids=UNNAMED.keys())


@pytest.mark.parametrize("name", timm_checks.EVA)
def test_identity_is_exact(name):
    host_checks.check_identity_keys_and_unwrap(find_case(name), host_of)


@pytest.mark.parametrize("name", timm_checks.EVA)
def test_kept_tokens_are_those_of_the_blocks_on_one_sample(name):
    timm_checks.check_oracle(find_case(name))


@UNNAMED_CASES
def test_unnamed_kinds(case):
    host_checks.check_identity_keys_and_unwrap(case, host_of)
    timm_checks.check_oracle(case)


@pytest.mark.parametrize("name", SOME)
def test_a_sample_does_not_depend_on_its_batch(name):
    host_checks.check_batch_invariance(find_case(name), host_of)


@pytest.mark.parametrize("name", SOME[:2])
def test_copies_have_weights_of_their_own(name):
    host_checks.check_copies(find_case(name), host_of)


def test_a_copy_takes_its_own_rotations():
    case = find_case(MIXED)
    model = case.build()
    adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
    inputs = case.inputs(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.blocks.backbone.rope == (other.rope,)
        with torch.no_grad():
            other.rope.freqs.mul_(3)
        assert (run(case, other, inputs) - run(case, model, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("name", SOME)
def test_checkpointing_keeps_gradients(name):
    timm_checks.check_checkpointing(find_case(name))


@pytest.mark.parametrize("name", SOME[:2])
def test_ways_in_and_refusals(name):
    timm_checks.check_ways_in_and_refusals(find_case(name))


def test_one_graph():
    host_checks.check_compile(find_case(MIXED), host_of)


def test_router_learns():
    host_checks.check_router_gradient(find_case(MIXED), host_of)


def test_other_models_are_no_match():
    with pytest.raises(NoMatch, match="no timm Eva"):
        TimmEva.match(nn.Linear(2, 2))


def test_masks_go_with_rotations():
    case = make_eva_case()
    model = case.build()
    mask = torch.rand(3, 1, 36, 36, generator=torch.Generator().manual_seed(1)) < 0.8
    mask |= torch.eye(36, dtype=torch.bool)
    with torch.no_grad():
        expected = model(IMAGES, attn_mask=mask)
        assert (expected - model(IMAGES)).abs().max() > 1e-3
        adaptok.wrap(model, "dc", router="norm", budget=1.0, backbone=host_of(model))
        assert torch.equal(model(IMAGES, attn_mask=mask), expected)
        adaptok.set_budget(model, keep=[0.2, 0.5, 1.0])
        out = model(IMAGES, attn_mask=mask)
        for sample, keep in enumerate((0.2, 0.5, 1.0)):
            one = slice(sample, sample + 1)
            adaptok.set_budget(model, keep=keep)
            alone = model(IMAGES[one], attn_mask=mask[one])
            torch.testing.assert_close(alone[0], out[sample], rtol=0, atol=1e-5)


def test_causal_order_is_refused():
    model = make_eva_case().build()
    adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
    with pytest.raises(HostOptionError, match="is_causal=True"):
        model(IMAGES, is_causal=True)


@pytest.mark.parametrize("rope_type", ["cat", "dinov3"])
def test_rotations_that_training_moves_are_those_that_the_host_drew(rope_type):
    options = {"rope_type": rope_type, "rope_shift_coords": 0.5, "rope_jitter_coords": 1.5}
    model = make_eva_case(**options).build().train()
    with torch.no_grad():
        still = model.eval()(IMAGES)
        torch.manual_seed(1)
        expected = model.train()(IMAGES)
        assert (expected - still).abs().max() > 1e-3
        adaptok.wrap(model, "dc", budget=1.0, backbone=host_of(model))
        torch.manual_seed(1)
        assert torch.equal(model(IMAGES), expected)


def test_moved_rotations_of_each_block_are_refused_in_training():
    model = make_eva_case(rope_type="mixed", rope_shift_coords=0.5).build()
    adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
    model.train()
    with pytest.raises(HostOptionError, match=r"rope_shift_coords.*model.rope.eval\(\)"):
        model(IMAGES)
    model.rope.eval()
    assert model(IMAGES).shape == (3, 10)


@pytest.mark.parametrize("rope_type", ["cat", "mixed"])
def test_dropped_patches_are_refused_in_training_only(rope_type):
    model = Eva(**ROTARY, rope_type=rope_type, patch_drop_rate=0.5)
    timm_checks.check_dropped_patches(model, IMAGES)


class Rolled(TimmEva):
    """Each cell takes the rotation of its neighbour."""

    name = "twin"

    def read(self, numbers, args, kwargs):
        rope = kwargs["rope"].roll(1, dims=-2)
        return super().read(numbers, args, kwargs | {"rope": rope})


class FirstTable(TimmEva):
    """All blocks take the rotations of the first one."""

    name = "twin"

    def read_tables(self, grid):
        tables = super().read_tables(grid)
        return tables[:1] * len(tables)


class FirstRows(TimmEva):
    """Few tokens take the first rows."""

    name = "twin"

    def read(self, numbers, args, kwargs):
        call = super().read(numbers, args, kwargs)
        by_depth = [
            timm_checks.with_first_rows({"rope": table})["rope"]
            for table in call.depth_inputs.get("rope", [])
        ]
        return dataclasses.replace(
            call,
            token_inputs=timm_checks.with_first_rows(call.token_inputs),
            depth_inputs={"rope": by_depth} if by_depth else {},
        )


@pytest.mark.parametrize(("name", "twin"), [(DINO, Rolled), (MIXED, FirstTable)])
def test_twins_with_wrong_rotations_are_caught_by_the_probe(name, twin):
    timm_checks.check_twin_is_caught_by_probe(find_case(name), twin)


@pytest.mark.parametrize("name", [DINO, MIXED])
def test_twins_with_rotations_of_other_rows_are_caught_by_the_oracle(name):
    timm_checks.check_twin_is_caught_by_oracle(find_case(name), FirstRows)


def test_a_wrong_prefix_is_told_by_its_count():
    model = find_case(DINO).build()
    host = host_of(model)
    host.prefix = 1  # forgets the registers
    with pytest.raises(HostOptionError, match="29 tokens, and 1 in front of the grid"):
        adaptok.wrap(model, "dc", budget=0.5, backbone=host)
