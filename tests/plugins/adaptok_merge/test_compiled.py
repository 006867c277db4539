"""Compiled: one graph for many counts, and the values of the eager model."""

import copy

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

import adaptok
from adaptok.testing import make_vit

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0
        self.inner = lookup_backend("eager")

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.inner(graph, inputs)


def make_pair(spec, backend=None, **budget):
    eager = adaptok.wrap(make_vit(depth=2), stack=[spec])
    adaptok.set_budget(eager, **budget)
    eager(IMAGES[:1])  # a grid of another size than that of the probe: what graphs read of it
    counter = Counter()
    return eager, adaptok.compile(copy.deepcopy(eager), backend=backend or counter), counter


def compare(eager, model, images=IMAGES):
    with torch.inference_mode():
        found, expected = model(images), eager(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def stage_of(model, name="tome"):
    return model.blocks.adaptok[name]


def test_another_r_makes_no_graph():
    eager, model, counter = make_pair({"name": "tome", "r": 4})
    for r in (4, 5, 6):
        stage_of(eager).r = stage_of(model).r = r
        compare(eager, model)
    before = counter.graphs
    assert before <= 4
    for r in (7, 9, 3, 11, 2):
        stage_of(eager).r = stage_of(model).r = r
        compare(eager, model)
    assert counter.graphs == before


def test_another_budget_makes_no_graph():
    eager, model, counter = make_pair("tome", tokens=40)
    for tokens in (40, 39, 38):
        for part in (eager, model):
            adaptok.set_budget(part, tokens=tokens)
        compare(eager, model)
    before = counter.graphs
    assert before <= 4
    for tokens in (30, 44, 25, 52):
        for part in (eager, model):
            adaptok.set_budget(part, tokens=tokens)
        compare(eager, model)
    assert counter.graphs == before


def test_a_schedule_and_back():
    eager, model, _ = make_pair({"name": "tome", "r": [6, -0.5]})
    for r in ([6, -0.5], [9, 0]):
        stage_of(eager).r = stage_of(model).r = r
        compare(eager, model)


def test_a_threshold_runs_in_regions():
    eager, model, counter = make_pair({"name": "tome", "threshold": 0.7})
    images = IMAGES * torch.tensor([1.0, 0.3, 3.0])[:, None, None, None]
    compare(eager, model, images)
    compare(eager, model, images.flip(-1))
    before = counter.graphs
    for shift in (3, 20):
        compare(eager, model, images.roll(shift, -1))
    assert counter.graphs <= before + 2


@pytest.mark.parametrize("spec", [{"name": "tome", "r": 5}, "tomesd"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_training(spec):
    eager, model, _ = make_pair(spec, "aot_eager")
    for part in (eager.train(), model.train()):
        part(IMAGES)  # the first call, which lays down what graphs read
        part.zero_grad()
        part(IMAGES).square().mean().backward()
    known = dict(eager.named_parameters())
    for name, parameter in model.named_parameters():
        if known[name].grad is not None:
            torch.testing.assert_close(parameter.grad, known[name].grad, rtol=1e-3, atol=1e-5)


def test_tomesd_of_many_budgets():
    eager, model, counter = make_pair("tomesd", tokens=40)
    for tokens in (40, 39, 38):
        for part in (eager, model):
            adaptok.set_budget(part, tokens=tokens)
        compare(eager, model)
    before = counter.graphs
    assert before <= 4
    for tokens in (30, 44, 25, 52):
        for part in (eager, model):
            adaptok.set_budget(part, tokens=tokens)
        compare(eager, model)
    assert counter.graphs == before
