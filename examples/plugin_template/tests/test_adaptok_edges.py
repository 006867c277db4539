"""The checks that adaptok gives to every plug-in, and a few of our own."""

import pytest
import torch
from adaptok_edges.chunker import SimilarChunker
from adaptok_edges.router import EdgeRouter, measure_edges

import adaptok
from adaptok.testing import ChunkerTests, RouterTests, make_vit


class TestEdges(RouterTests):
    """All checks of a router, one test each."""

    part = "edges"


class TestSharpEdges(RouterTests):
    """The same with an option."""

    def make(self) -> EdgeRouter:
        """Return what is checked."""
        return EdgeRouter(contrast=3.0)


class TestSimilar(ChunkerTests):
    """All checks of a chunker."""

    part = "similar"


def test_both_names_are_announced() -> None:
    """The entry point leads to the classes."""
    assert "edges" in adaptok.available("routers")
    assert "similar" in adaptok.available("chunkers")
    assert adaptok.describe("edges").entries[0].load() is EdgeRouter


def test_an_edge_is_found_where_it_is() -> None:
    """A step has a gradient on both sides, and nowhere else."""
    x = torch.zeros(1, 20, 4)
    x.view(1, 4, 5, 4)[:, :, 3:] = 1.0  # a step between the third and the fourth column
    edge = measure_edges(x, (4, 5)).view(4, 5)
    assert (edge[:, 2:4] > 1).all()
    assert not edge[:, [0, 1, 4]].any()


def test_a_cell_is_stood_for_by_a_token_like_it() -> None:
    """The last cell is like the first one, though the third is nearer."""
    x = torch.eye(2)[[0, 0, 1, 1, 0]][None]  # features of five cells in a row
    routing = adaptok.Routing(torch.tensor([[0.9, 0.1, 0.8, 0.1, 0.1]]))
    tokens = adaptok.Tokens(x, grid=(1, 5))
    _, plan = SimilarChunker()(tokens, routing, adaptok.Budget(tokens=2))
    assert plan.provenance.token.tolist() == [[0, 0, 1, 1, 0]]


def test_a_host_runs_with_both() -> None:
    """A quarter of 24 cells is 6."""
    vit = adaptok.wrap(make_vit(), chunker="similar", budget=0.25)
    with adaptok.trace(vit) as trace:
        vit(torch.randn(2, 3, 32, 48))
    assert trace.steps[0].kept.tolist() == [6, 6]


def test_a_wrong_option_is_refused() -> None:
    """In words."""
    with pytest.raises(ValueError, match="contrast is a positive number, got -1"):
        EdgeRouter(contrast=-1)
