import math

import pytest
import torch
from adaptok_graph.chunker import GraphChunker
from adaptok_graph.segments import SegmentPlan, choose_members, share_cells
from graph_oracles import assert_segments, members_of, neighbours_by_loop

from adaptok import Budget, Provenance, Routing, Tokens
from adaptok.errors import BudgetError, ConfigError, ShapeError


def make_tokens(grid=(4, 7), b=3, d=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, math.prod(grid), d, generator=generator)
    return Tokens(x + 0.5 * x.cumsum(1), grid)


def make_routing(tokens, seed=1):
    generator = torch.Generator().manual_seed(seed)
    b, n, _ = tokens.x.shape
    lean = torch.tensor([0.3, 0.6, 0.95])[:b, None]
    return Routing((torch.rand(b, n, generator=generator) + lean) / 2)


BUDGETS = [
    Budget(keep=0.3),
    Budget(tokens=1),
    Budget(tokens=[28, 3, 11]),
    Budget(keep=[0.1, 1.0, 0.5]),
    Budget(),
    Budget(drop=0.5),
]


@pytest.mark.parametrize("token", ["mean", "member"])
@pytest.mark.parametrize("layout", ["packed", "bucketed"])
@pytest.mark.parametrize("budget", BUDGETS, ids=Budget.describe)
@pytest.mark.parametrize("grid", [(4, 7), (2, 2, 7)])
def test_segments_and_their_tokens(grid, budget, layout, token):
    tokens = make_tokens(grid)
    routing = make_routing(tokens)
    few, plan = GraphChunker(layout, token=token)(tokens, routing, budget)
    assert isinstance(plan, SegmentPlan)
    pairs = neighbours_by_loop(grid, 4)
    rows = few.x.reshape(-1, 40)
    row = 0
    for sample, count in enumerate(plan.computed.tolist()):
        names = plan.provenance.token[sample]
        assert_segments(names, pairs, count)
        for name in range(count):
            members = (names == name).nonzero().flatten()
            cell = int(plan.cells.flatten()[row])
            assert cell in members
            p = routing.keep_prob[sample, members, None]
            mean = (p * tokens.x[sample, members]).sum(0) / p.sum()
            expected = mean if token == "mean" else tokens.x[sample, cell]
            assert torch.allclose(rows[row], expected, atol=1e-5)
            row += 1
    assert row == len(rows)
    assert plan.cells.shape == few.cells.shape
    if budget.is_exact or layout == "packed":
        assert torch.equal(plan.requested, plan.computed)
    else:
        assert (plan.computed % 2 == 0).all()  # buckets of 28 cells in 16 steps
        assert (plan.requested <= plan.computed).all()


def test_a_packed_run_speaks_of_batch_and_ptr():
    tokens = make_tokens()
    few, plan = GraphChunker("packed")(tokens, make_routing(tokens), Budget(tokens=[5, 1, 28]))
    assert few.ptr.tolist() == [0, 5, 6, 34]
    assert few.batch.tolist() == [0] * 5 + [1] + [2] * 28
    assert plan.lengths == (5, 1, 28)
    for cells in torch.split(few.cells, plan.lengths):
        assert (cells.diff() > 0).all()


def test_every_cell_kept_gives_the_tokens_that_came_bit_for_bit():
    tokens = make_tokens()
    for layout in ("packed", "bucketed", "fixed"):
        for token in ("mean", "member"):
            few, plan = GraphChunker(layout, token=token)(
                tokens, make_routing(tokens), Budget(keep=1.0)
            )
            assert torch.equal(few.x.reshape(3, 28, 40), tokens.x)
            assert plan.provenance.token.tolist() == [list(range(28))] * 3


def test_the_middle_cell_names_a_segment():
    grid = torch.arange(3.0)
    v = torch.cartesian_prod(grid, grid)[None]
    segment = torch.tensor([[0, 0, 0, 0, 0, 0, 6, 6, 6]])  # two rows, and one
    found = choose_members(v, segment).nonzero()[:, 1].tolist()
    assert found == [1, 7]
    # two cells are equally far from their mean: the first one, however rounding falls
    v = torch.randn(2000, 2, 7)
    assert choose_members(v, torch.zeros(2000, 2, dtype=torch.long))[:, 0].all()


def test_shares_follow_probabilities():
    share = share_cells(torch.tensor([[0.0, 0.5, 1.0], [0.3, 0.3, 0.9]]), torch.arange(6) // 3)
    assert torch.allclose(share[:3], torch.tensor([0.001, 0.5, 1.0]) / 1.501)
    assert share[3:].tolist() == pytest.approx([0.2, 0.2, 0.6])


def test_cells_with_a_high_probability_are_not_swallowed():
    tokens = make_tokens((6, 6))
    prob = torch.full((3, 36), 0.2)
    prob[:, [7, 20, 33]] = 0.995
    alone = {}
    for trust in (0.0, 1.0):
        _, plan = GraphChunker(trust=trust)(tokens, Routing(prob), Budget(tokens=9))
        sizes = [
            {i: len(m) for m in members_of(names) for i in m} for names in plan.provenance.token
        ]
        alone[trust] = [[size[i] for i in (7, 20, 33)] for size in sizes]
    assert alone[1.0] == [[1, 1, 1]] * 3
    assert alone[0.0] != alone[1.0]


def test_a_threshold_gives_each_sample_its_own_count():
    x = torch.randn(3, 1, 40) + torch.zeros(3, 30, 40)
    parts = [1, 4, 12]  # stretches of equal cells, of equal length
    for sample, count in enumerate(parts):
        for part in range(count):
            length = 30 / count
            x[sample, round(part * length) : round((part + 1) * length)] = torch.randn(40)
    tokens, routing = Tokens(x, (1, 30)), Routing(torch.full((3, 30), 0.7))
    chunker = GraphChunker("packed", threshold=0.9)
    _, plan = chunker(tokens, routing, Budget())
    assert plan.requested.tolist() == parts
    for sample in range(3):
        one = Tokens(x[sample : sample + 1], (1, 30))
        _, alone = chunker(one, Routing(torch.full((1, 30), 0.7)), Budget())
        assert torch.equal(alone.provenance.token[0], plan.provenance.token[sample])
    _, less = chunker(tokens, routing, Budget(drop=0.5))
    assert less.requested.tolist() == [1, 2, 6]
    _, exact = chunker(tokens, routing, Budget(tokens=7))
    assert exact.requested.tolist() == [7, 7, 7]
    _, filled = GraphChunker(threshold=0.9)(tokens, routing, Budget())
    assert filled.requested.tolist() == parts
    assert filled.computed.tolist() == [2, 4, 12]
    _, more = GraphChunker("packed", threshold=0.5)(
        make_tokens(), make_routing(make_tokens()), Budget()
    )
    _, fewer = GraphChunker("packed", threshold=-3.0)(
        make_tokens(), make_routing(make_tokens()), Budget()
    )
    assert (fewer.requested < more.requested).all()


def test_dense_and_packed_runs_make_the_same_segments():
    tokens = make_tokens()
    routing = make_routing(tokens)
    dense, plan = GraphChunker("fixed")(tokens, routing, Budget(tokens=9))
    packed, other = GraphChunker("packed")(tokens, routing, Budget(tokens=9))
    assert torch.equal(plan.provenance.token, other.provenance.token)
    assert torch.equal(dense.x.flatten(0, 1), packed.x)
    assert torch.equal(plan.sources, other.sources)


def test_provenance_composes():
    tokens = make_tokens()
    _, first = GraphChunker()(tokens, make_routing(tokens), Budget(tokens=12))
    short = Tokens(torch.randn(3, 12, 40), (3, 4))
    _, second = GraphChunker()(short, make_routing(short), Budget(tokens=4))
    both = first.provenance.then(second.provenance)
    start = Provenance.identity(3, 28).then(both)
    for sample in range(3):
        for cell in range(28):
            token = first.provenance.token[sample, cell]
            assert start.token[sample, cell] == second.provenance.token[sample, token]


@pytest.mark.parametrize("token", ["mean", "member"])
def test_a_gradient_reaches_the_cells_and_the_probabilities(token):
    tokens = make_tokens()
    x = tokens.x.requires_grad_()
    prob = make_routing(tokens).keep_prob.requires_grad_()
    few, plan = GraphChunker(token=token)(tokens, Routing(prob), Budget(tokens=9))
    (few.x * torch.randn(few.x.shape)).sum().backward()
    sizes = plan.provenance.token[..., None].eq(torch.arange(9)).sum(1)
    merged = sizes.gather(1, plan.provenance.token) > 1
    assert (prob.grad[merged] != 0).all()
    used = x.grad.abs().amax(-1) > 0
    assert torch.equal(used, plan.keep_mask if token == "member" else torch.ones_like(used))


def test_the_ratio_loss_needs_a_threshold():
    tokens = make_tokens()
    chunker = GraphChunker()
    assert chunker.losses(make_routing(tokens))["ratio"] > 0
    assert chunker.losses(Routing(torch.rand(1, 4), threshold=None)) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "dense"}, "layout is one of packed, bucketed, fixed, got 'dense'"),
        ({"buckets": 0}, "buckets is at least 1, got 0"),
        ({"layout": "fixed", "buckets": 4}, 'buckets=4 is for layout "bucketed"'),
        ({"token": "sum"}, 'token is "mean" or "member", got \'sum\''),
        ({"threshold": 1.0}, "threshold is a similarity below 1, got 1"),
        ({"threshold": math.nan}, "threshold is a similarity below 1, got nan"),
        ({"trust": -1.0}, "trust is an exponent from 0 to 8, got -1"),
        ({"neighbours": 6}, "neighbours is 4 or 8, got 6"),
        ({"target": 1.0}, "target is a compression above 1, got 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GraphChunker(**options)


def test_wrong_calls_are_refused():
    tokens = make_tokens()
    routing = make_routing(tokens)
    with pytest.raises(BudgetError, match='layout "fixed" runs the same count for every sample'):
        GraphChunker("fixed")(tokens, routing, Budget())
    with pytest.raises(BudgetError, match="only ranks cells"):
        GraphChunker()(tokens, Routing(routing.keep_prob, threshold=None), Budget())
    with pytest.raises(BudgetError, match="tokens=29 is more than the 28 cells"):
        GraphChunker()(tokens, routing, Budget(tokens=29))
    with pytest.raises(ShapeError, match="one probability per cell is needed"):
        GraphChunker()(tokens, Routing(torch.rand(3, 27)), Budget(keep=0.5))
    with pytest.raises(ShapeError, match="dense tokens, one per cell of a known grid"):
        GraphChunker()(Tokens(tokens.x), routing, Budget(keep=0.5))
