"""Wraps of models of other packages: a timm ViT, research DiT, diffusers, rotary ones and video."""

import copy

import pytest
import timm
import torch
from adaptok_patch import entropy_maps, measure_entropy, quadtree

import adaptok
from adaptok.testing import fill_weights
from benchmarks.architectures import find_case

NAMES = [
    "facebook/dit",
    "diffusers/dit",
    "diffusers/sd3",
    "diffusers/wan",
    "timm/eva02_tiny_patch14_224",
    "transformers/dinov2_registers",
]
NATURAL = {"name": "apt", "thresholds": (3.5, 3.2)}


def make(name, **options):
    case = find_case(name)
    model = case.build()
    return case, model, case.inputs(model)


def call(case, model, inputs):
    with torch.no_grad():
        return case.run(model, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_identity_and_exact_unwrap(name):
    case, model, inputs = make(name)
    expected = call(case, model, inputs)
    adaptok.wrap(model, "apt", budget=1.0)
    found = call(case, model, inputs)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with adaptok.budget(model, keep=0.5):
        assert (call(case, model, inputs) - expected).abs().max() > 1e-3 * expected.abs().max()
    assert torch.equal(call(case, adaptok.unwrap(model), inputs), expected)


@pytest.mark.parametrize("name", NAMES)
def test_samples_keep_what_they_need_whoever_is_beside_them(name):
    case, model, inputs = make(name)
    adaptok.wrap(model, "apt", router=NATURAL, span=(1, 3))
    with adaptok.trace(model) as seen:
        together = call(case, model, inputs)
    kept = seen.steps[0].plans[0].requested
    assert len(set(kept.tolist())) > 1
    for sample in range(3):
        with adaptok.trace(model) as alone:
            found = call(case, model, case.one(inputs, sample))
        plan, beside = alone.steps[0].plans[0], seen.steps[0].plans[0]
        assert plan.keep_mask[0].equal(beside.keep_mask[sample])
        assert plan.provenance.token[0].equal(beside.provenance.token[sample])
        scale = together.abs().max()
        assert (found[0] - together[sample]).abs().max() <= 2e-5 * scale


@pytest.mark.parametrize("name", ["facebook/dit", "diffusers/dit"])
def test_budgets_are_exact_per_sample(name):
    case, model, inputs = make(name)
    adaptok.wrap(model, {"name": "apt", "layout": "bucketed"}, budget=0.5)
    for count in ([1, 2, 3], [9, 16, 22], 7):
        with adaptok.budget(model, tokens=count), adaptok.trace(model) as seen:
            out = call(case, model, inputs)
        assert seen.steps[0].kept.tolist() == (count if isinstance(count, list) else [7] * 3)
        assert out.isfinite().all()


def test_save_and_load(tmp_path):
    model = fill_weights(timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=10)).eval()
    other = copy.deepcopy(model)
    images = torch.randn(2, 3, 224, 224)
    images[1, :, :, :150] = 0.3
    chunker = {"name": "apt", "scales": [1, 2]}
    router = {"name": "apt", "scales": [1, 2], "thresholds": [2.0]}
    adaptok.wrap(model, chunker, router=router, budget={"drop": 0.2})
    stage = next(iter(model.blocks.adaptok.values()))
    fill_weights(stage.chunker)
    adaptok.save(model, tmp_path / "adapter")
    adaptok.load(other, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other(images), model(images))
        fill_weights(stage.chunker, seed=1)
        assert not torch.equal(other(images), model(images))


def test_a_timm_vit_of_full_size():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    images = torch.rand(2, 3, 224, 224)
    images[0, :, 64:, 64:] = 0.0
    maps = measure_entropy(images, 16, peak=1.0)
    with torch.no_grad():
        expected = vit(images)
        adaptok.wrap(vit, "apt", budget=1.0)
        assert torch.allclose(vit(images), expected, atol=1e-5)
        with adaptok.budget(vit), entropy_maps(vit, maps), adaptok.trace(vit) as seen:
            vit(images)
    requested = seen.steps[0].plans[0].requested
    assert requested.equal(quadtree(maps, (6.0, 4.0), (14, 14)).counts)
    # 96 fine cells; of the flat ones 4 blocks of 4 by 4 and 9 of 2 by 2
    assert requested.tolist() == [109, 196]
