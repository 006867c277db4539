"""H-Net's chunking inside hosts of other libraries."""

import math

import pytest
import torch
from adaptok_hnet.chunker import ScanPlan
from adaptok_hnet.scan import SCANS
from torch._dynamo.testing import CompileCounter
from wrapped_vit import IMAGE

import adaptok
from adaptok.testing import fill_weights, make_vit
from benchmarks.architectures import find_case

HOSTS = ["timm/deit_tiny_distilled_patch16_224", "facebook/dit", "diffusers/dit", "diffusers/wan"]


def make_wrapped(scan="hilbert", **options):
    """A small ViT in which every part matters."""
    chunker = {"name": "hnet", "scan": scan}
    vit = adaptok.wrap(make_vit(), **({"chunker": chunker, "budget": 0.5} | options))
    return fill_stages(vit)


def fill_stages(model):
    """Fill what a wrap has added."""
    for module in model.modules():
        if isinstance(module, adaptok.Stage):
            fill_weights(module)
    return model


@pytest.fixture(scope="module", params=HOSTS)
def host(request):
    """A host of the catalogue, its wrap proved, and its parts filled afterwards."""
    case = find_case(request.param)
    model = case.build()
    with torch.no_grad():
        before = case.run(model, case.inputs(model))
    adaptok.wrap(model, chunker={"name": "hnet", "scan": "hilbert"}, budget=0.5)
    return case, fill_stages(model), before


@torch.no_grad()
def run(case, model, inputs):
    with adaptok.trace(model) as seen:
        out = case.run(model, inputs)
    return out, seen.steps[0]


def test_half_of_the_cells_are_kept_of_each_sample(host):
    case, model, before = host
    out, step = run(case, model, case.inputs(model))
    n = math.prod(case.cells)
    assert step.kept.tolist() == [max(1, math.floor(n / 2 + 0.5))] * len(step.kept)
    assert out.isfinite().all()
    assert (out - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize(
    "budget", [{"drop": 0.0}, {"drop": 0.5}, {"tokens": [9, 2, 5]}, {"keep": 0.3}]
)
def test_a_sample_is_the_same_alone(host, budget):
    case, model, _ = host
    inputs = case.inputs(model)
    with adaptok.budget(model, **budget):
        together, step = run(case, model, inputs)
    (plan,) = step.plans
    assert isinstance(plan, ScanPlan)
    for sample in range(3):
        own = {name: v[sample] if isinstance(v, list) else v for name, v in budget.items()}
        with adaptok.budget(model, **own):
            out, single = run(case, model, case.one(inputs, sample))
        assert single.kept.tolist() == step.kept[sample : sample + 1].tolist()
        error = (out[0] - together[sample]).abs().max() / together[sample].abs().max()
        assert error < 1e-4


def test_unwrap_is_exact(host):
    """Last of its host: it takes the wrap away."""
    case, model, before = host
    adaptok.unwrap(model)
    with torch.no_grad():
        assert torch.equal(case.run(model, case.inputs(model)), before)


def test_a_whole_vit_tiny():
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224").eval()
    image = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = vit(image)
        adaptok.wrap(vit, chunker="hnet", budget=1.0)
        assert (vit(image) - before).abs().max() < 1e-5 * before.abs().max()
        adaptok.set_budget(vit, tokens=50)
        with adaptok.trace(vit) as seen:
            vit(image)
    assert seen.steps[0].kept.tolist() == [50, 50]


@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_without_a_budget_the_threshold_decides_at_once(layout):
    """No warning, as something is saved from the start: each image keeps what it needs."""
    vit = adaptok.wrap(make_vit(), chunker={"name": "hnet", "layout": layout})
    flat = torch.full((1, 3, 32, 48), 0.3)
    with adaptok.trace(vit) as seen, torch.no_grad():
        out = vit(torch.cat([IMAGE[:1], flat]))
        alone = vit(flat)
    requested = [plan.requested.tolist() for plan in seen.steps[0].plans]
    assert requested[0][0] < 24
    assert out.isfinite().all()
    assert torch.allclose(out[1], alone[0], atol=1e-5)


def test_the_router_follows_the_scan_of_the_chunker():
    for scan in SCANS:
        stage = make_wrapped(scan).blocks.adaptok["hnet"]
        assert stage.router.scan == stage.chunker.scan == scan
    with pytest.raises(adaptok.AdaptokError, match='router scans along "snake" and the chunker'):
        make_wrapped("raster", router={"name": "hnet", "scan": "snake"})
    bare = make_vit()
    with pytest.raises(adaptok.AdaptokError, match="scan"):
        adaptok.wrap(bare, chunker={"name": "hnet", "scan": "spiral"})
    assert not adaptok.is_wrapped(bare)


def test_parts_go_with_those_of_others():
    for options in (
        {"chunker": "hnet", "router": "norm"},
        {"chunker": "dc", "router": "hnet"},
        {"chunker": "dc", "dechunker": "hnet"},
        {"chunker": "hnet", "dechunker": "dc"},
    ):
        vit = make_wrapped(**options)
        with adaptok.trace(vit) as seen, torch.no_grad():
            assert vit(IMAGE).isfinite().all()
        assert seen.steps[0].kept.tolist() == [12, 12, 12]


def test_save_and_load(tmp_path):
    vit = make_wrapped("snake")
    adaptok.save(vit, tmp_path / "adapter")
    other = adaptok.load(make_vit(), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other(IMAGE), vit(IMAGE))
    stage = other.blocks.adaptok["hnet"]
    assert stage.router.scan == stage.chunker.scan == "snake"
    card = (tmp_path / "adapter" / "adaptok.json").read_text()
    assert '"snake"' in card


def test_one_graph_for_many_budgets():
    torch.compiler.reset()
    vit = make_wrapped("hilbert")
    counter = CompileCounter()
    graph = torch.compile(vit, fullgraph=True, backend=counter)
    try:
        for count in (12, 5, 7, 20, 9, 3, 16, 11):
            adaptok.set_budget(vit, tokens=count)
            with torch.no_grad():
                expected = vit(IMAGE)
                assert torch.allclose(graph(IMAGE), expected, atol=1e-4)
        assert counter.frame_count <= 3
    finally:
        torch.compiler.reset()


def test_a_bfloat16_host_keeps_float32_parts():
    vit = make_wrapped("snake").to(torch.bfloat16)
    stage = vit.blocks.adaptok["hnet"]
    assert {p.dtype for p in stage.parameters()} == {torch.float32}
    assert vit.patch_embed.proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert vit(IMAGE.bfloat16()).isfinite().all()


def test_losses_and_gradients_reach_router_and_gate():
    vit = make_wrapped("hilbert", chunker={"name": "hnet", "scan": "hilbert", "target": 6.0})
    vit.train()
    with adaptok.collect_losses(vit) as losses:
        out = vit(IMAGE)
    assert list(losses) == ["ratio"]
    stage = vit.blocks.adaptok["hnet"]
    out.square().sum().backward(retain_graph=True)
    weight = stage.router.query.weight
    assert weight.grad.abs().max() > 0
    assert stage.router.key.weight.grad.abs().max() > 0
    before = weight.grad.clone()
    losses["ratio"].backward()
    assert not torch.equal(weight.grad, before)
