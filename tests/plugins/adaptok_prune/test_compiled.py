"""Compiled by `adaptok.compile`: few graphs for many budgets."""

import copy

import pytest
import torch
from prune_oracles import IMAGES, make_model
from torch._dynamo.testing import CompileCounter

import adaptok


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["evit", "dynamicvit"])
def test_two_graphs_serve_every_exact_budget(name):
    vit = adaptok.wrap(make_model(4), stack=[name], budget={"tokens": 9})
    vit(IMAGES[:1])
    counter = CompileCounter()
    model = adaptok.compile(copy.deepcopy(vit), backend=counter)
    with torch.inference_mode():
        for count in (9, 12, 5, 7, 20, 3):
            adaptok.set_budget(vit, tokens=count)
            adaptok.set_budget(model, tokens=count)
            assert torch.allclose(model(IMAGES), vit(IMAGES), atol=1e-4)
    assert counter.frame_count <= 3
