import pytest
import torch
from adaptok_graph.chunker import GraphChunker
from adaptok_graph.dechunker import GraphDechunker, weigh_borders
from adaptok_graph.grids import connect_cells, repeat_edges

from adaptok import Budget, Routing, Tokens
from adaptok.errors import ConfigError
from adaptok.testing import fill_weights

GRID = (4, 7)


def make_run(budget, layout="packed", token="mean", grad=False):
    generator = torch.Generator().manual_seed(0)
    tokens = Tokens(torch.randn(3, 28, 24, generator=generator), GRID)
    prob = torch.rand(3, 28, generator=generator).requires_grad_(grad)
    few, plan = GraphChunker(layout, token=token)(tokens, Routing(prob), budget)
    return tokens, few, plan, prob


@pytest.mark.parametrize("budget", [Budget(tokens=[28, 1, 9]), Budget(), Budget(keep=1.0)])
@pytest.mark.parametrize("token", ["mean", "member"])
@torch.no_grad()
def test_blocks_that_change_nothing_give_every_cell_back(budget, token):
    tokens, few, plan, _ = make_run(budget, token=token)
    for part in (GraphDechunker(24), fill_weights(GraphDechunker(24, neighbours=8))):
        assert torch.equal(part(few, plan, tokens).x, tokens.x)


@pytest.mark.parametrize("token", ["mean", "member"])
@torch.no_grad()
def test_a_fresh_one_adds_to_each_cell_what_came_to_its_token(token):
    tokens, few, plan, _ = make_run(Budget(tokens=[28, 1, 9]), token=token)
    h = few.x + torch.randn(few.x.shape)
    after = GraphDechunker(24)(few.with_x(h), plan, tokens).x
    for sample in range(3):
        for cell in range(28):
            row = plan.ptr[sample] + plan.provenance.token[sample, cell]
            expected = tokens.x[sample, cell] + h[row] - few.x[row]
            assert torch.allclose(after[sample, cell], expected, atol=1e-5)
    # where every cell is a token, the blocks' answer is taken bit for bit
    assert torch.equal(after[0], h[:28])


@torch.no_grad()
def test_borders_weigh_by_their_length():
    source = torch.tensor([0, 0, 1, 0, 2, 2])  # two rows of three
    edges = repeat_edges(torch.zeros(1), (2, 3), 1)
    ends, weight = weigh_borders(source, edges, 3)
    found = torch.zeros(3, 3)
    for (i, j), w in zip(ends.T.tolist(), weight.tolist(), strict=True):
        found[i, j] += w
    # 0 touches 1 once and 2 twice; 1 touches 0 once and 2 once
    assert torch.allclose(
        found.T, torch.tensor([[0, 1 / 3, 2 / 3], [0.5, 0, 0.5], [2 / 3, 1 / 3, 0]])
    )


@torch.no_grad()
def test_the_smoothing_mixes_segments_that_touch():
    tokens, few, plan, _ = make_run(Budget(tokens=[6, 12, 9]))
    part = fill_weights(GraphDechunker(24))
    plain = GraphDechunker(24)
    update = torch.randn(few.x.shape)
    after = part(few.with_x(few.x + update), plan, tokens).x
    base = plain(few.with_x(few.x + update), plan, tokens).x
    down = part.down(update)
    for sample in range(3):
        names = plan.provenance.token[sample]
        for own in range(int(plan.computed[sample])):
            borders = torch.zeros(len(names))
            for i, j in connect_cells(GRID).T.tolist():
                if names[j] == own and names[i] != own:
                    borders[names[i]] += 1
            around = plan.ptr[sample] + borders.nonzero().flatten()
            share = borders[borders > 0] / borders.sum()
            mean = (share[:, None] * down[around]).sum(0)
            mixed = part.mix.lin_rel(mean) + part.mix.lin_root(down[plan.ptr[sample] + own])
            expected = part.gate * part.up(torch.nn.functional.silu(mixed))
            cells = names == own
            assert torch.allclose(after[sample, cells] - base[sample, cells], expected, atol=1e-4)


def test_a_gate_of_zero_learns():
    tokens, few, plan, _ = make_run(Budget(tokens=9))
    part = GraphDechunker(24)
    (part(few.with_x(few.x + torch.randn(few.x.shape)), plan, tokens).x ** 2).sum().backward()
    assert (part.gate.grad != 0).all()


def test_a_router_learns_from_what_the_blocks_did():
    tokens, few, plan, prob = make_run(Budget(tokens=9), grad=True)
    h = few.x.detach() + torch.randn(few.x.shape)
    after = GraphDechunker(24)(few.with_x(h), plan, tokens).x
    (gradient,) = torch.autograd.grad(after.sum(), prob)
    assert (gradient != 0).all()


def test_other_neighbours_are_refused():
    with pytest.raises(ConfigError, match="neighbours is 4 or 8, got 3"):
        GraphDechunker(24, neighbours=3)
