"""Regions of a module, compiled each for itself."""

import copy

import pytest
import torch

from adaptok.errors import ConfigError
from adaptok.regions import Regional, mark_dynamic


class Halver(Regional):
    regions = ("halve",)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))

    def halve(self, x):
        return self.weight * x

    def forward(self, x):
        return self.region("halve")(x)


def test_a_compiled_region_is_called_and_is_no_state():
    module, calls = Halver(), []
    module.compile_region("halve", lambda method: lambda x: calls.append(x) or method(x))
    assert module(torch.tensor(4.0)) == 2.0
    assert len(calls) == 1
    assert set(module.state_dict()) == {"weight"}
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.fill_(2.0)
    assert other(torch.tensor(4.0)) == 8.0  # its own weight, and not compiled
    assert len(calls) == 1


def test_inside_a_larger_graph_a_region_is_a_part_of_it():
    module, graphs = Halver(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module.compile_region("halve", lambda method: torch.compile(method, backend=backend))
    torch.compile(lambda x: module(x) + 1, backend=backend, fullgraph=True)(torch.ones(2))
    assert len(graphs) == 1


def test_an_unknown_region():
    with pytest.raises(ConfigError, match=r"Halver has no region 'double': \('halve',\)"):
        Halver().region("double")


def test_marked_axes_do_not_make_new_graphs():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    for length in (4, 5, 9):
        double(mark_dynamic(torch.ones(length, 3), 0))
    assert len(graphs) == 1
