"""Split forms of every host of the catalogue, held against the hosts' own blocks as they run."""

import dataclasses

import pytest
import torch
from backbones.split_checks import (
    CASES,
    check_oracles,
    check_whole,
    find_case,
    relative,
    split_model,
    visit_blocks,
)

from adaptok.backbones.split_forms import can_split
from adaptok.backbones.split_timm import SplitDiTBlock, SplitTimmBlock
from adaptok.backbones.split_towers import SplitTowerLayer
from adaptok.backbones.timm_images import mask_of_pairs
from adaptok.backbones.transformers_vit import TransformersViT

REFUSED = {
    "timm/vit_dwee_patch16_reg1_gap_256": "Block with DiffAttention",
    "timm/vit_base_patch16_xp_224": "ParallelScalingBlock",
    "timm/vit_small_patch16_18x2_224": "ParallelThingsBlock",
}
SIZES_MIXED = ("timm/naflexvit_base_patch16_gap, sizes mixed", "transformers/siglip2")
FAMILIES = ("timm", "facebook", "transformers")
SPLIT = [
    case.name
    for case in CASES
    if case.family in FAMILIES and case.name not in REFUSED and case.name not in SIZES_MIXED
]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", SPLIT)
def test_both_halves_are_the_block(name, few):
    case = find_case(name)
    model = case.build()
    forms = split_model(model, case)
    visit_blocks(model, case.inputs(model), check_whole(forms), few=few)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", SPLIT)
def test_keys_biases_and_class_attention(name, few):
    case = find_case(name)
    model = case.build()
    forms = split_model(model, case)
    visit_blocks(model, case.inputs(model), check_oracles(forms), few=few)


@pytest.mark.parametrize("few", [False, True])
def test_a_mask_of_padding(few):
    case = find_case("transformers/siglip2")
    model = case.build()
    inputs = TransformersViT.match(model).example(model)
    forms = split_model(model, case)
    for check in (check_whole, check_oracles):
        visit_blocks(model, inputs, check(forms), few=few)


@pytest.mark.parametrize("check", [check_whole, check_oracles])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_a_mask_of_pairs(name, hidden, check):
    case = find_case(name)
    model = case.build()
    checked = check(split_model(model, case))
    s = case.prefix + case.cells[0] * case.cells[1]
    mask = torch.randn(3, 1, s, s)
    mask = (mask < 0.5) | torch.eye(s, dtype=torch.bool) if hidden else 2 * mask

    def visit(call, index, run):
        inputs = {**call.token_inputs, "attn_mask": mask_of_pairs(mask, case.prefix)}
        masked = dataclasses.replace(call, token_inputs=inputs)
        after = checked(masked, index, run)
        assert relative(after.x, run(call).x) > 1e-3
        return call.with_x(after.x)

    visit_blocks(model, case.inputs(model), visit)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_catalogue_is_split_but_for_what_is_refused(family):
    for case in CASES:
        if case.family == family:
            blocks = [
                block
                for path in case.containers
                for block in case.build().get_submodule(path).children()
            ]
            assert all(can_split(block) != (case.name in REFUSED) for block in blocks), case.name


BF16 = ["vit_small_patch14_reg4_dinov2", "eva02_base_patch16_clip_224", "transformers/dinov3"]


@pytest.mark.parametrize("name", BF16)
def test_half_precision(name):
    case = find_case(name)
    model = case.build().bfloat16()
    forms = split_model(model, case)
    inputs = case.inputs(model)
    inputs = dataclasses.replace(
        inputs,
        args=tuple(halve(value) for value in inputs.args),
        kwargs={key: halve(value) for key, value in inputs.kwargs.items()},
    )

    def visit(call, index, run):
        bias = torch.rand(call.x.shape[:2])
        wants = call.start > 0
        attended = forms[index].attend(call, key_bias=bias, keys=True, class_attention=wants)
        assert attended.call.x.dtype == attended.keys.dtype == torch.bfloat16
        if wants:
            assert attended.class_attention.dtype == torch.float32
            torch.testing.assert_close(
                attended.class_attention.sum(-1), torch.ones(len(call.x), 2), rtol=0, atol=1e-5
            )
        return check_whole(forms)(call, index, run)

    visit_blocks(model, inputs, visit)


def halve(value):
    is_image = isinstance(value, torch.Tensor) and value.ndim == 4
    return value.bfloat16() if is_image else value


# Twins: forms with one fault each, which the checks above must find.


def without_scale(form):
    bare = tuple(names[1:] for names in form.layout.after)
    return dataclasses.replace(form, layout=dataclasses.replace(form.layout, after=bare))


def with_the_other_norm(form):
    norms = form.layout.norms[::-1]
    return dataclasses.replace(form, layout=dataclasses.replace(form.layout, norms=norms))


def with_norms_in_front(form):
    layout = dataclasses.replace(
        form.layout, norms=("norm1", "norm2"), after=(("drop_path1",), ("drop_path2",))
    )
    return dataclasses.replace(form, layout=layout)


def with_shifted_rows(form):
    def rotate(x, rope, half):
        return form.rotate(x, rope.roll(1, -2), half=half)

    return dataclasses.replace(form, rotate=rotate)


def with_another_depth(form):
    return dataclasses.replace(form, index=(form.index + 1) % 4)


class DeafForm(SplitTimmBlock):
    def attend(self, call, *, key_bias=None, **wanted):
        return SplitTimmBlock.attend(self, call, **wanted)


class LateKeys(SplitTimmBlock):
    def make_heads(self, y, call):
        heads = SplitTimmBlock.make_heads(self, y, call)
        return dataclasses.replace(heads, keys=heads.k)


class OtherRow(SplitTimmBlock):
    def attend(self, call, *, class_attention=False, **wanted):
        attended = SplitTimmBlock.attend(self, call, class_attention=class_attention, **wanted)
        flipped = attended.class_attention.roll(1, -1)
        return dataclasses.replace(attended, class_attention=flipped)


class WholeBias(SplitTimmBlock):
    def find_mask(self, call):
        mask = SplitTimmBlock.find_mask(self, call)
        s = call.x.shape[1]
        return self.attn._get_rel_pos_bias()[..., :s, :s] if mask is not None else None


class ShiftedTower(SplitTowerLayer):
    def make_heads(self, y, call):
        inputs = {
            name: dataclasses.replace(given, value=given.value.roll(1, -2))
            for name, given in call.token_inputs.items()
        }
        return SplitTowerLayer.make_heads(self, y, dataclasses.replace(call, token_inputs=inputs))


class OtherGates(SplitDiTBlock):
    def modulate(self, call):
        parts = SplitDiTBlock.modulate(self, call)
        return (*parts[:2], parts[5], *parts[3:5], parts[2])


class OtherConditions(SplitDiTBlock):
    def modulate(self, call):
        other = dataclasses.replace(call, condition=call.condition.roll(1, 0))
        return SplitDiTBlock.modulate(self, other)


def of_class(kind):
    def change(form):
        return kind(*(getattr(form, field.name) for field in dataclasses.fields(form)))

    return change


TWINS = {
    "no LayerScale": ("vit_small_patch14_dinov2", without_scale, check_whole),
    "no LayerScale in a tower": ("transformers/dinov2", without_scale, check_whole),
    "no gamma": ("vit_small_patch16_dinov3", without_scale, check_whole),
    "the other norm": ("vit_tiny_patch16_224", with_the_other_norm, check_whole),
    "norms in front": ("vit_base_patch16_rpn_224", with_norms_in_front, check_whole),
    "a row too far": ("eva02_tiny_patch14_224", with_shifted_rows, check_whole),
    "a row too far in a tower": ("transformers/dinov3", of_class(ShiftedTower), check_whole),
    "gates swapped": ("facebook/dit", of_class(OtherGates), check_whole),
    "conditions of others": ("facebook/dit", of_class(OtherConditions), check_whole),
    "another depth": ("vit_small_patch16_rope_mixed_224", with_another_depth, check_whole),
    "rows of other cells": ("beit_base_patch16_224", of_class(WholeBias), check_whole),
    "no bias": ("vit_tiny_patch16_224", of_class(DeafForm), check_oracles),
    "rotated keys": ("eva02_tiny_patch14_224", of_class(LateKeys), check_oracles),
    "another row": ("vit_tiny_patch16_224", of_class(OtherRow), check_oracles),
}


@pytest.mark.parametrize(("name", "change", "check"), TWINS.values(), ids=TWINS.keys())
def test_twins_are_caught(name, change, check):
    case = find_case(name)
    model = case.build()
    forms = split_model(model, case)
    inputs = case.inputs(model)
    visit_blocks(model, inputs, check(forms), few=True)
    with pytest.raises(AssertionError):
        visit_blocks(model, inputs, check([change(form) for form in forms]), few=True)
