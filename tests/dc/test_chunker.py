import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import nearest_all_pairs

from adaptok import Budget, Provenance, Routing, Tokens
from adaptok.chunking import spread_tokens
from adaptok.dc import DCChunker
from adaptok.dc.host import HostChunker
from adaptok.errors import BudgetError, ConfigError, ShapeError

grids = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


def make_cells(grid, b=3, d=4):
    n = torch.tensor(grid).prod().item()
    return Tokens(torch.randn(b, n, d), grid)


@settings(max_examples=60, deadline=None)
@given(grid=grids, layout=st.sampled_from(["packed", "bucketed", "fixed"]), data=st.data())
def test_kept_cells_come_back_unchanged_and_others_from_their_nearest(grid, layout, data):
    before = make_cells(grid)
    n = before.x.shape[1]
    routing = Routing(torch.rand(3, n))
    if layout == "fixed":
        budget = Budget(tokens=data.draw(st.integers(1, n)))
    else:
        budget = data.draw(st.sampled_from([Budget(), Budget(keep=0.4), Budget(drop=0.5)]))
    kept, plan = DCChunker(layout, buckets=4)(before, routing, budget)
    nearest = nearest_all_pairs(plan.keep_mask, grid)
    rows = kept.x.reshape(-1, 4)
    assert torch.equal(
        spread_tokens(rows, plan), before.x.gather(1, nearest[..., None].expand_as(before.x))
    )
    assert torch.equal(plan.computed, plan.keep_mask.sum(1))
    assert torch.equal(before.x.reshape(-1, 4)[plan.rows], rows)
    assert (plan.keep_mask | ~plan.routing.keep_mask).all()


def test_all_kept_is_the_identity_and_one_kept_fills_the_grid():
    before = make_cells((3, 5))
    routing = Routing(torch.rand(3, 15))
    for layout in ("packed", "bucketed", "fixed"):
        kept, plan = DCChunker(layout)(before, routing, Budget(keep=1.0))
        assert torch.equal(spread_tokens(kept.x.reshape(-1, 4), plan), before.x)
        assert torch.equal(plan.provenance.token, torch.arange(15).expand(3, 15))
    kept, plan = DCChunker()(before, routing, Budget(tokens=1))
    assert kept.x.shape == (3, 4)
    assert (plan.provenance.token == 0).all()


def test_layouts():
    before = make_cells((4, 8))
    prob = torch.zeros(3, 32)
    prob[0, :3], prob[1, :9], prob[2, ::2] = 0.9, 0.8, 0.7
    kept, plan = DCChunker("packed")(before, Routing(prob), Budget())
    assert plan.lengths == (3, 9, 16)
    assert kept.ptr.tolist() == [0, 3, 12, 28]
    assert kept.batch.bincount().tolist() == [3, 9, 16]
    kept, plan = DCChunker("bucketed", buckets=4)(before, Routing(prob), Budget())
    assert plan.lengths == (8, 16, 16)
    assert plan.requested.tolist() == [3, 9, 16]
    assert plan.computed.tolist() == [8, 16, 16]
    # filled up with a sample's own next most probable cells, ties to the lower index
    assert plan.keep_mask[0].nonzero().flatten().tolist() == list(range(8))
    kept, plan = DCChunker("fixed")(before, Routing(prob), Budget(tokens=3))
    assert kept.x.shape == (3, 3, 4)
    assert plan.cells[2].tolist() == [0, 2, 4]
    assert plan.lengths is None


def test_bucketed_counts_do_not_depend_on_batch_mates():
    before = make_cells((4, 8))
    routing = Routing(torch.rand(3, 32) * torch.tensor([[0.6], [1.0], [0.8]]))
    _, together = DCChunker("bucketed")(before, routing, Budget())
    for sample in range(3):
        _, alone = DCChunker("bucketed")(
            Tokens(before.x[sample : sample + 1], (4, 8)),
            Routing(routing.keep_prob[sample : sample + 1]),
            Budget(),
        )
        assert torch.equal(alone.keep_mask[0], together.keep_mask[sample])


def test_fixed_refuses_counts_that_depend_on_the_image():
    before, routing = make_cells((2, 3)), Routing(torch.rand(3, 6))
    for budget, message in [
        (Budget(), 'layout "fixed" .* needs keep= or tokens=, got the natural budget'),
        (Budget(drop=0.5), "got drop=0.5"),
        (Budget(keep=[0.2, 0.5, 0.5]), "every sample needs the same count"),
    ]:
        with pytest.raises(BudgetError, match=message):
            DCChunker("fixed")(before, routing, budget)


@pytest.mark.parametrize(
    "chunker", [DCChunker("fixed"), HostChunker("fixed"), HostChunker("bucketed")]
)
@pytest.mark.parametrize("tokens", [7, torch.tensor(7)])
def test_more_tokens_than_cells_are_called_so(chunker, tokens):
    before, routing = make_cells((2, 3)), Routing(torch.rand(3, 6))
    with pytest.raises(BudgetError, match=r"^tokens=7 is more than the 6 cells of the grid"):
        chunker(before, routing, Budget(tokens=tokens))


def test_wrong_options_and_inputs_are_refused():
    with pytest.raises(ConfigError, match="layout is one of packed, bucketed, fixed, got 'dense'"):
        DCChunker("dense")
    with pytest.raises(ConfigError, match="buckets is at least 1"):
        DCChunker("bucketed", buckets=0)
    with pytest.raises(ShapeError, match="one probability per cell"):
        DCChunker()(make_cells((2, 3)), Routing(torch.rand(3, 5)), Budget())
    with pytest.raises(ShapeError, match="cell of a known grid"):
        DCChunker()(Tokens(torch.randn(1, 6, 2)), Routing(torch.rand(1, 6)), Budget())


def test_provenance_composes_through_two_chunkers():
    first_cells = make_cells((3, 4), b=2)
    kept, first = DCChunker("fixed")(first_cells, Routing(torch.rand(2, 12)), Budget(tokens=6))
    second_cells = Tokens(kept.x, (6,))
    kept2, second = DCChunker("fixed")(second_cells, Routing(torch.rand(2, 6)), Budget(tokens=2))
    both = first.provenance.then(second.provenance)
    by_steps = spread_tokens(spread_tokens(kept2.x.reshape(-1, 4), second).reshape(-1, 4), first)
    direct = kept2.x.gather(1, both.token[..., None].expand(-1, -1, 4))
    assert torch.equal(by_steps, direct)


@given(data=st.data())
def test_provenance_composition_is_associative_keeps_minus_one_and_has_an_identity(data):
    sizes = [data.draw(st.integers(1, 6)) for _ in range(4)]
    maps = [
        Provenance(torch.randint(-1, m, (2, n)), torch.rand(2, n))
        for n, m in itertools.pairwise(sizes)
    ]
    left = maps[0].then(maps[1]).then(maps[2])
    right = maps[0].then(maps[1].then(maps[2]))
    assert torch.equal(left.token, right.token)
    alive = left.token >= 0
    assert torch.allclose(left.weight[alive], right.weight[alive])
    assert (left.token[maps[0].token < 0] == -1).all()
    same = Provenance.identity(2, sizes[0]).then(maps[0])
    assert torch.equal(same.token, maps[0].token)


def test_cells_without_a_token_come_back_as_zeros():
    before = make_cells((2, 2), b=1)
    kept, plan = DCChunker()(before, Routing(torch.tensor([[0.9, 0.9, 0.1, 0.1]])), Budget())
    pruned = Provenance(torch.tensor([[0, 1, -1, 1]]))
    plan = type(plan)(
        plan.grid,
        plan.layout,
        plan.routing,
        plan.keep_mask,
        plan.cells,
        pruned,
        plan.batch,
        plan.ptr,
        plan.lengths,
    )
    spread = spread_tokens(kept.x, plan)[0]
    assert torch.equal(spread[:2], before.x[0, :2])
    assert (spread[2] == 0).all()
    assert torch.equal(spread[3], before.x[0, 1])


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="of 3 samples, this one of 2"):
        Provenance.identity(2, 4).then(Provenance.identity(3, 4))
    with pytest.raises(ShapeError, match="points at token 4, but the later map has only 4"):
        Provenance.identity(2, 5).then(Provenance.identity(2, 4))
    with pytest.raises(ShapeError, match="dense: no ragged run"):
        DCChunker("fixed")(make_cells((2, 2)), Routing(torch.rand(3, 4)), Budget(tokens=2))[
            1
        ].ragged()


def test_buckets_are_filled_with_the_next_most_probable_cells_and_lose_none():
    before = make_cells((2, 4), b=2)
    prob = torch.tensor([[0.9, 0.1, 0.4, 0.2, 0.45, 0.3, 0.0, 0.05]] * 2)
    _, plan = DCChunker("bucketed", buckets=2)(before, Routing(prob), Budget())
    assert plan.keep_mask[0].nonzero().flatten().tolist() == [0, 2, 4, 5]
    # a natural mask that does not follow the probabilities stays whole
    natural = torch.tensor([[False, True, False, False, False, False, True, False]] * 2)
    _, plan = DCChunker("bucketed", buckets=2)(
        before, Routing(prob, natural_mask=natural), Budget()
    )
    assert plan.keep_mask[1].nonzero().flatten().tolist() == [0, 1, 4, 6]
    assert plan.requested.tolist() == [2, 2]
