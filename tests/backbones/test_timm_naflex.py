"""timm's NaFlexVit with images, and with patches of images of one size."""

import dataclasses

import pytest
import torch
from backbones import host_checks, timm_checks
from backbones.host_checks import KEEP, find_case, run
from backbones.timm_checks import host_of, make_case
from timm.models.naflexvit import NaFlexVit
from torch import nn

import adaptok
from adaptok.backbones.timm_naflex import TimmNaFlex, grid_of_patches
from adaptok.errors import HostOptionError
from adaptok.hosts import NoMatch
from benchmarks.architectures import HostInputs
from benchmarks.architectures.case import make_noise

NAME = "naflexvit_base_patch16_gap"
SIZES = {"patch_size": 16, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10}
GRID = (5, 7)
PADDING = 6


def make_naflex_case(**options):
    prefix = int(options.get("class_token", False)) + options.get("reg_tokens", 0)
    options = SIZES | {"reg_tokens": 0, "class_token": False, "global_pool": "avg"} | options
    return make_case(NAME, lambda: NaFlexVit(**options), prefix=prefix)


UNNAMED = {
    "rotation": make_naflex_case(rope_type="axial", reg_tokens=3),
    "a learned rotation for each block": make_naflex_case(rope_type="mixed", class_token=True),
    "DINOv3's rotation": make_naflex_case(rope_type="dinov3", class_token=True, reg_tokens=2),
    "map pooling": make_naflex_case(global_pool="map", reg_tokens=1),
    "keys masked": make_naflex_case(use_key_only_attn_mask=True, class_token=True),
    "no positions": make_naflex_case(pos_embed="none", rope_type="axial"),
}
UNNAMED_CASES = pytest.mark.parametrize("case", UNNAMED.values(), ids=UNNAMED.keys())
MIXED = UNNAMED["a learned rotation for each block"]


def make_patches(grids=(GRID,) * 3, length=None):
    """Patches of images, padded as NaFlex's loaders pad them."""
    length = length or max(h * w for h, w in grids) + PADDING
    patches = make_noise(len(grids), length, 16 * 16 * 3)
    places = torch.zeros(len(grids), length, 2, dtype=torch.long)
    valid = torch.zeros(len(grids), length, dtype=torch.bool)
    for sample, (h, w) in enumerate(grids):
        places[sample, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[sample, : h * w] = True
    return {"patches": patches, "patch_coord": places, "patch_valid": valid}


def with_patches(case):
    """The same case with patches in NaFlex's own way."""
    return dataclasses.replace(case, inputs=lambda _: HostInputs((make_patches(),)))


@pytest.mark.parametrize("name", timm_checks.NAFLEX)
def test_images(name):
    case = find_case(name)
    host_checks.check_identity_keys_and_unwrap(case, host_of)
    timm_checks.check_oracle(case)


@UNNAMED_CASES
def test_unnamed_kinds(case):
    host_checks.check_identity_keys_and_unwrap(case, host_of)
    timm_checks.check_oracle(case)


@UNNAMED_CASES
def test_patches_of_one_grid_with_padding(case):
    case = with_patches(case)
    host_checks.check_identity_keys_and_unwrap(case, host_of)
    host_checks.check_batch_invariance(case, host_of)


@UNNAMED_CASES
def test_padding_changes_nothing(case):
    model = case.build()
    adaptok.wrap(model, "dc", router="norm", budget=list(KEEP), backbone=host_of(model))
    padded = make_patches()
    exact = {name: value[:, :35] for name, value in padded.items()}
    found, expected = (run(case, model, HostInputs((given,))) for given in (padded, exact))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    by_name = {name: value for name, value in padded.items() if name != "patches"}
    with torch.no_grad():
        torch.testing.assert_close(model(padded["patches"], **by_name), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [NAME, "naflexvit_base_patch16_siglip"])
def test_a_sample_does_not_depend_on_its_batch(name):
    host_checks.check_batch_invariance(find_case(name), host_of)


def test_copies_have_weights_of_their_own():
    host_checks.check_copies(MIXED, host_of)
    host_checks.check_copies(with_patches(MIXED), host_of)


@UNNAMED_CASES
def test_checkpointing_keeps_gradients(case):
    timm_checks.check_checkpointing(case)
    timm_checks.check_checkpointing(with_patches(case))


def test_ways_in_and_refusals():
    timm_checks.check_ways_in_and_refusals(find_case(NAME))


def test_one_graph():
    host_checks.check_compile(UNNAMED["DINOv3's rotation"], host_of)


def test_other_models_are_no_match():
    with pytest.raises(NoMatch, match="no timm NaFlexVit"):
        TimmNaFlex.match(nn.Linear(2, 2))


def make_wrapped(**options):
    model = make_naflex_case(**options).build()
    return adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))


def test_grids_of_each_sample_are_refused():
    model = make_wrapped()
    given = make_patches(((5, 7), (4, 6), (5, 7)))
    with pytest.raises(HostOptionError, match=r"grids \(4, 6\), \(5, 7\).*one grid per call"):
        model(given)
    assert model({name: value[1:2] for name, value in given.items()}).shape == (1, 10)


def break_patches(given, how):
    given = {name: value.clone() for name, value in given.items()}
    if how == "shuffled":
        given["patch_coord"][0, [1, 2]] = given["patch_coord"][0, [2, 1]]
    if how == "dropped":
        given["patch_valid"][:, 3] = False
    if how == "padded in front":
        given = {name: value.roll(2, dims=1) for name, value in given.items()}
    if how == "cut":
        given = {name: value[:, 1:34] for name, value in given.items()}
    if how == "empty":
        given["patch_valid"][:] = False
    return given


@pytest.mark.parametrize("how", ["shuffled", "dropped", "padded in front", "cut", "empty"])
def test_patches_in_another_order_are_refused(how):
    model = make_wrapped()
    with pytest.raises(HostOptionError, match="row by row"):
        model(break_patches(make_patches(), how))


def test_grid_of_patches_without_padding():
    given = make_patches(((2, 3),), length=6)
    assert grid_of_patches(given["patch_coord"], None) == (2, 3)


@pytest.mark.parametrize("rope_type", ["axial", "mixed"])
def test_dropped_patches_are_refused_in_training_only(rope_type):
    case = make_naflex_case(rope_type=rope_type, patch_drop_rate=0.5)
    model = case.build()
    (images,) = case.inputs(model).args
    timm_checks.check_dropped_patches(model, images)
    model.train()
    with pytest.raises(HostOptionError, match="patch_drop_rate=0"):
        model(make_patches())


def test_moved_rotations_of_each_block_are_refused_in_training():
    model = make_wrapped(rope_type="mixed", rope_jitter_coords=2.0).train()
    with pytest.raises(HostOptionError, match=r"rope_jitter_coords.*model.rope.eval\(\)"):
        model(make_patches())


class FirstTable(TimmNaFlex):
    """All blocks take the rotations of the first one."""

    name = "twin"

    def read(self, numbers, args, kwargs):
        call = super().read(numbers, args, kwargs)
        tables = call.depth_inputs["rope"]
        return dataclasses.replace(call, depth_inputs={"rope": tables[:1] * len(tables)})


class FirstRows(TimmNaFlex):
    """Few tokens take the first rows."""

    name = "twin"

    def read(self, numbers, args, kwargs):
        call = super().read(numbers, args, kwargs)
        return dataclasses.replace(
            call, token_inputs=timm_checks.with_first_rows(call.token_inputs)
        )


def test_a_twin_with_one_table_is_caught_by_the_probe():
    timm_checks.check_twin_is_caught_by_probe(MIXED, FirstTable)


def test_a_twin_with_rotations_of_other_rows_is_caught_by_the_oracle():
    timm_checks.check_twin_is_caught_by_oracle(UNNAMED["rotation"], FirstRows)
