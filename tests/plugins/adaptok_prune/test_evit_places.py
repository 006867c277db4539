"""Where EViT acts, and what it refuses."""

import pytest
import torch
from adaptok_prune.evit import EViT
from prune_oracles import (
    BLOCKS,
    DEPTH,
    IMAGES,
    make_model,
    run_traced,
)

import adaptok
from adaptok import BlockRange, Site
from benchmarks.architectures import find_case


def wrap_evit(vit=None, budget=None, **options):
    options = {"name": "evit", "blocks": BLOCKS} | options
    return adaptok.wrap(vit or make_model(), stack=[options], budget=budget)


def test_the_default_blocks_are_quarters():
    vit = adaptok.wrap(make_model(8), stack=["evit"])
    _, plan = run_traced(vit)
    assert [event.site for event in plan.events] == [Site(b, "between") for b in (2, 4, 6)]
    vit = adaptok.wrap(make_model(8), stack=["evit"], span=(2, 6))
    _, plan = run_traced(vit)
    assert [event.site.block for event in plan.events] == [3, 4, 5]


@pytest.mark.parametrize(
    "name",
    [
        "timm/vit_base_patch16_siglip_224",
        "timm/vit_base_patch16_gap_224",
        "timm/vit_wee_patch16_reg1_gap_256",  # registers in front, and no class token
    ],
)
def test_a_model_without_class_token_is_refused(name):
    model = find_case(name).build()
    message = r'this model has none: stack=\["tome"\] merges .* stack=\["dynamicvit"\]'
    with pytest.raises(adaptok.errors.StackError, match=message):
        adaptok.wrap(model, stack=["evit"])
    assert not adaptok.is_wrapped(model)


def test_blocks_without_a_split_form_are_refused():
    model = find_case("timm/vit_base_patch16_xp_224").build()
    message = r'ParallelScalingBlock.*stack=\["dynamicvit"\] acts in front of blocks'
    with pytest.raises(adaptok.errors.StackError, match=message):
        adaptok.wrap(model, stack=["evit"])
    assert not adaptok.is_wrapped(model)


@pytest.mark.parametrize("verify", [True, False])
def test_blocks_out_of_range_are_refused(verify):
    message = "tokens are to go at block 5, 9, and the blocks here are 0 to 4"
    with pytest.raises(adaptok.errors.StackError, match=message):
        adaptok.wrap(make_model(), stack=[EViT(blocks=(1, 5, 9))], verify=verify)(IMAGES)
    with pytest.raises(adaptok.errors.StackError, match="block 3, and the blocks here are 1 to 2"):
        adaptok.wrap(make_model(), stack=[EViT(blocks=(2, 3))], span=(1, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ()}, "one index or several that rise"),
        ({"blocks": (3, 2)}, r"rise.*got \(3, 2\)"),
        ({"blocks": (-1, 2)}, "rise"),
        ({"keep_rate": 0.0}, r"keep_rate is a share in \(0, 1\], got 0"),
        ({"restore": "nearest"}, "restore"),
        ({"keep": 0.5}, "this option does not exist"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(adaptok.errors.ConfigError, match=message):
        adaptok.wrap(make_model(), stack=[{"name": "evit", **options}])


def test_halves_without_a_name_for_why():
    """A range that nobody can split says so in the words of the range."""
    inner = BlockRange(lambda call, first, last: call, 0, 4, whole="the toy has none")
    with pytest.raises(adaptok.errors.StackError, match="here it cannot: the toy has none"):
        EViT().find_sites(inner)


class InPieces(adaptok.Stage):
    """Runs the blocks inside it piece by piece, as an early exit does."""

    effects = adaptok.Effects("depth")

    def forward(self, inner, call):
        for first, last in ((0, 3), (3, DEPTH)):
            call = inner.run(call, first, last)
        return call


@pytest.mark.parametrize("blocks", [(1, 3), None])
def test_pieces_of_the_span_have_the_blocks_that_lie_in_them(blocks):
    evit = {"name": "evit"} if blocks is None else {"name": "evit", "blocks": blocks}
    vit = adaptok.wrap(make_model(), stack=[InPieces(), evit], verify=False)
    with adaptok.trace(vit) as seen, torch.no_grad():
        vit(IMAGES)
    found = [event.site.block for plan in seen.steps[0].plans for event in plan.events]
    assert found == list(blocks or BLOCKS)
