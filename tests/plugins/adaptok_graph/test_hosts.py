"""Contracted edges inside hosts of other libraries."""

import copy
import math

import pytest
import torch
from adaptok_graph.segments import SegmentPlan
from graph_oracles import assert_segments, neighbours_by_loop
from torch._dynamo.testing import CompileCounter
from wrapped_vit import IMAGE

import adaptok
from adaptok.testing import fill_weights, make_vit
from benchmarks.architectures import find_case

HOSTS = ["timm/deit_tiny_distilled_patch16_224", "facebook/dit", "diffusers/dit", "diffusers/wan"]


def make_wrapped(**options):
    """A small ViT in which every part matters."""
    return fill_stages(adaptok.wrap(make_vit(), **({"chunker": "graph", "budget": 0.5} | options)))


def fill_stages(model):
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
    adaptok.wrap(model, chunker="graph", budget=0.5)
    return case, fill_stages(model), before


@torch.no_grad()
def run(case, model, inputs):
    with adaptok.trace(model) as seen:
        out = case.run(model, inputs)
    return out, seen.steps[0]


def test_half_as_many_connected_segments(host):
    case, model, before = host
    out, step = run(case, model, case.inputs(model))
    n = math.prod(case.cells)
    count = max(1, math.floor(n / 2 + 0.5))
    assert step.kept.tolist() == [count] * len(step.kept)
    (plan,) = step.plans
    assert isinstance(plan, SegmentPlan)
    assert torch.equal(step.provenance.token, plan.provenance.token)
    for names in step.provenance.token:
        assert_segments(names, neighbours_by_loop(case.cells, 4), count)
    assert out.isfinite().all()
    assert (out - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("budget", [{"drop": 0.0}, {"tokens": [9, 2, 5]}, {"keep": 0.3}])
def test_a_sample_is_the_same_alone(host, budget):
    case, model, _ = host
    inputs = case.inputs(model)
    with adaptok.budget(model, **budget):
        together, step = run(case, model, inputs)
    for sample in range(3):
        own = {name: v[sample] if isinstance(v, list) else v for name, v in budget.items()}
        with adaptok.budget(model, **own):
            out, single = run(case, model, case.one(inputs, sample))
        assert single.kept.tolist() == step.kept[sample : sample + 1].tolist()
        error = (out[0] - together[sample]).abs().max() / together[sample].abs().max()
        assert error < 1e-4


def test_unwrap_is_exact(host):
    case, model, before = host
    twin = adaptok.unwrap(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(case.run(twin, case.inputs(twin)), before)


@pytest.mark.parametrize("token", ["mean", "member"])
@torch.no_grad()
def test_every_cell_kept_is_the_identity(token):
    before = make_vit()(IMAGE)
    chunker = {"name": "graph", "token": token}
    vit = adaptok.wrap(make_vit(), chunker=chunker, budget=1.0)
    assert torch.allclose(vit(IMAGE), before, atol=1e-6)


@torch.no_grad()
def test_a_packed_run_is_that_of_groups():
    out = {}
    for layout in ("packed", "bucketed"):
        chunker = {"name": "graph", "layout": layout}
        vit = make_wrapped(chunker=chunker, budget={"tokens": [20, 4, 9]})
        out[layout] = vit(IMAGE)
    assert torch.allclose(out["packed"], out["bucketed"], atol=1e-4)


@torch.no_grad()
def test_a_saved_wrap_comes_back(tmp_path):
    chunker = {"name": "graph", "token": "mean", "trust": 0.5, "neighbours": 8}
    router = {"name": "graph", "kind": "gat", "layers": 1}
    vit = make_wrapped(chunker=chunker, router=router)
    expected = vit(IMAGE)
    adaptok.save(vit, tmp_path)
    again = adaptok.load(make_vit(), tmp_path)
    assert torch.equal(again(IMAGE), expected)
    (stage,) = [m for m in again.modules() if isinstance(m, adaptok.Stage)]
    assert (stage.chunker.token, stage.chunker.trust, stage.router.kind) == ("mean", 0.5, "gat")


@torch.no_grad()
def test_one_graph_serves_many_counts():
    vit = adaptok.wrap(make_vit(depth=1), chunker={"name": "graph", "layout": "fixed"}, budget=0.5)
    fill_stages(vit)(IMAGE)
    torch.compiler.reset()
    counter = CompileCounter()
    graph = torch.compile(vit, fullgraph=True, backend=counter)
    try:
        for keep in (0.5, 0.25, 0.7, 0.4):
            adaptok.set_budget(vit, keep=keep)
            assert torch.allclose(graph(IMAGE), vit(IMAGE), atol=1e-4)
        assert counter.frame_count <= 2
    finally:
        torch.compiler.reset()


def test_training_moves_router_and_dechunker():
    vit = make_wrapped(span=(0, 2)).train()  # behind the span, the class token sees all cells
    before = {name: p.clone() for name, p in vit.named_parameters() if ".adaptok." in name}
    optimiser = torch.optim.SGD(vit.parameters(), 0.1)
    with adaptok.collect_losses(vit) as losses:
        out = vit(IMAGE)
    (out.square().mean() + losses["ratio"]).backward()
    optimiser.step()
    for name, parameter in vit.named_parameters():
        if name in before:
            assert not torch.equal(parameter, before[name]), name
