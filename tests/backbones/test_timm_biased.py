"""timm's Beit and VisionTransformerRelPos: blocks with relative positions of their own."""

import pytest
import torch
from backbones import host_checks, timm_checks
from backbones.host_checks import find_case
from backbones.timm_checks import host_of, make_case
from timm.models import beit, vision_transformer_relpos
from torch import nn

import adaptok
from adaptok.backbones.timm_beit import TimmBeit
from adaptok.backbones.timm_relpos import TimmRelPos
from adaptok.calls import BlockCall
from adaptok.errors import HostOptionError, UnsupportedModelError
from adaptok.hosts import NoMatch

BEIT, BEIT_2, RELPOS, SHARED = timm_checks.BIASED
SIZES = {"img_size": (80, 112), "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 10}


def make_beit_case(**options):
    return make_case(BEIT, lambda: beit.Beit(**(SIZES | options)))


def make_relpos_case(prefix=0, **options):
    options = SIZES | {"class_token": prefix > 0} | options
    make = vision_transformer_relpos.VisionTransformerRelPos
    return make_case(RELPOS, lambda: make(**options), prefix=prefix)


UNNAMED = {
    "own table, shared bias and LayerScale": make_beit_case(
        use_rel_pos_bias=True, use_shared_rel_pos_bias=True, init_values=0.5
    ),
    "shared bias only": make_beit_case(use_shared_rel_pos_bias=True),
    "no bias": make_beit_case(qkv_bias=False, swiglu_mlp=True),
    "own table, no bias of queries": make_beit_case(use_rel_pos_bias=True, qkv_bias=False),
    "class token": make_relpos_case(prefix=1, rel_pos_type="mlp", qk_norm=True),
    "class token and tables": make_relpos_case(prefix=1, rel_pos_type="bias"),
    "norms behind": make_relpos_case(
        block_fn=vision_transformer_relpos.ResPostRelPosBlock, rel_pos_type="swin"
    ),
    "shared tables": make_relpos_case(shared_rel_pos=True, rel_pos_type="bias"),
}
UNNAMED_CASES = pytest.mark.parametrize("case", UNNAMED.values(), ids=UNNAMED.keys())
NAMES = pytest.mark.parametrize("name", timm_checks.BIASED)


@pytest.mark.parametrize("name", [BEIT, BEIT_2, SHARED])
def test_identity_is_exact(name):
    host_checks.check_identity_keys_and_unwrap(find_case(name), host_of)


@NAMES
def test_identity_and_kept_tokens(name):
    timm_checks.check_near_identity(find_case(name))
    timm_checks.check_oracle(find_case(name))


@UNNAMED_CASES
def test_unnamed_kinds(case):
    timm_checks.check_near_identity(case)
    timm_checks.check_oracle(case)


@NAMES
def test_a_sample_does_not_depend_on_its_batch(name):
    host_checks.check_batch_invariance(find_case(name), host_of)


@pytest.mark.parametrize("name", [BEIT, SHARED])
def test_copies_have_weights_of_their_own(name):
    host_checks.check_copies(find_case(name), host_of)


@NAMES
def test_checkpointing_keeps_gradients(name):
    timm_checks.check_checkpointing(find_case(name))


@pytest.mark.parametrize("name", [BEIT, RELPOS])
def test_ways_in_and_refusals(name):
    timm_checks.check_ways_in_and_refusals(find_case(name))


@pytest.mark.parametrize("name", [BEIT, RELPOS])
def test_one_graph(name):
    host_checks.check_compile(find_case(name), host_of)


def test_other_models_are_no_match():
    with pytest.raises(NoMatch, match="no timm Beit"):
        TimmBeit.match(nn.Linear(2, 2))
    with pytest.raises(NoMatch, match="no timm VisionTransformerRelPos"):
        TimmRelPos.match(nn.Linear(2, 2))


class MyBlock(beit.Block):
    pass


class MyAttention(vision_transformer_relpos.RelPosAttention):
    pass


def test_other_classes_are_refused():
    model = find_case(BEIT).build()
    model.blocks[1].__class__ = MyBlock
    known = "MyBlock with Attention .* exactly Block with Attention of timm.models.beit"
    with pytest.raises(UnsupportedModelError, match=known):
        adaptok.wrap(model, "dc", budget=0.5, backbone=TimmBeit.match(model))
    model = find_case(RELPOS).build()
    model.blocks[3].attn.__class__ = MyAttention
    with pytest.raises(UnsupportedModelError, match=r"RelPosBlock with MyAttention .* exactly"):
        TimmRelPos.match(model)


def test_other_classes_without_a_bias_of_their_own_run_as_they_are():
    model = make_beit_case().build()
    for block in model.blocks:
        block.__class__ = MyBlock
    assert TimmBeit.match(model).depth == 4


@pytest.mark.parametrize("name", [BEIT, RELPOS])
def test_hooks_that_a_form_would_pass_by_are_refused(name):
    case = find_case(name)
    model = case.build()
    inputs = case.inputs(model)
    adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
    handle = model.blocks[1].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(HostOptionError, match=r"hook listens to .*Block"):
        case.run(model, inputs)
    with adaptok.budget(model, keep=1.0), pytest.raises(HostOptionError, match="hook"):
        case.run(model, inputs)
    handle.remove()
    assert case.run(model, inputs).shape == (3, 10)


class Transposed(TimmBeit):
    """Queries and keys of the shared bias change places."""

    name = "twin"

    def read(self, numbers, args, kwargs):
        bias = kwargs["shared_rel_pos_bias"].transpose(-1, -2)
        return super().read(numbers, args, {"shared_rel_pos_bias": bias})


def test_a_twin_with_a_wrong_bias_is_caught_by_the_probe():
    case = make_beit_case(use_rel_pos_bias=True, use_shared_rel_pos_bias=True)
    timm_checks.check_twin_is_caught_by_probe(case, Transposed)


def call_of_first_rows(call):
    """The same call, as if the first cells had been kept."""
    if call.cells is None:
        return call
    first = torch.arange(call.cells.shape[1]).expand_as(call.cells)
    return BlockCall(call.x, call.grid, call.start, first, token_inputs=call.token_inputs)


class FirstRows(TimmBeit):
    """Few tokens take the first rows of the table."""

    name = "twin"

    def run(self, block, index, call):
        return call.with_x(super().run(block, index, call_of_first_rows(call)).x)


class FirstRelPosRows(TimmRelPos):
    """Few tokens take the first rows of the bias."""

    name = "twin"

    def run(self, block, index, call):
        return call.with_x(super().run(block, index, call_of_first_rows(call)).x)


@pytest.mark.parametrize(("name", "twin"), [(BEIT, FirstRows), (RELPOS, FirstRelPosRows)])
def test_twins_with_the_bias_of_other_rows_are_caught_by_the_oracle(name, twin):
    timm_checks.check_twin_is_caught_by_oracle(find_case(name), twin)
