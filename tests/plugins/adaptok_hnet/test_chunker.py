import numpy as np
import pytest
import torch
from adaptok_hnet.chunker import HNetChunker, ScanPlan, trace_runs
from adaptok_hnet.router import HNetRouter, ScanRouting
from adaptok_hnet.scan import SCANS, order_cells

from adaptok import Budget, Context, Routing, Tokens
from adaptok.errors import BudgetError, ConfigError, ShapeError
from adaptok.losses import ratio_loss
from adaptok.testing.cases import make_routing, make_tokens

GRIDS = [(4, 6), (5, 7), (2, 3, 4)]
BUDGETS = [Budget(keep=0.3), Budget(tokens=[20, 1, 7]), Budget(), Budget(drop=[0.0, 0.9, 0.5])]


def trace_by_loop(mask, order):
    """Walk along the scan and remember the last kept cell."""
    token = {cell: number for number, cell in enumerate(np.flatnonzero(mask))}
    answer = np.full(len(mask), -1)
    last = next(cell for cell in order if mask[cell])
    for cell in order:
        last = cell if mask[cell] else last
        answer[cell] = token[last]
    return answer


@pytest.mark.parametrize("budget", BUDGETS, ids=Budget.describe)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scan", SCANS)
def test_each_cell_belongs_to_the_last_boundary_in_the_scan(scan, grid, budget):
    tokens = make_tokens(grid)
    _, plan = HNetChunker(scan)(tokens, make_routing(tokens), budget)
    order = order_cells(grid, scan)
    for sample in range(3):
        expected = trace_by_loop(plan.keep_mask[sample].numpy(), order)
        assert plan.provenance.token[sample].tolist() == expected.tolist()
    counts = plan.computed
    assert budget.is_uniform or counts.max() >= 2 * counts.min()


def is_connected(cells, grid):
    """Whether cells hang together by their sides."""
    left, front = set(cells), [next(iter(cells))]
    left.remove(front[0])
    strides = [(axis, int(np.prod(grid[axis + 1 :]))) for axis in range(len(grid))]
    while front:
        cell = front.pop()
        for axis, stride in strides:
            place = cell // stride % grid[axis]
            for step in (-1, 1):
                other = cell + step * stride
                if 0 <= place + step < grid[axis] and other in left:
                    left.remove(other)
                    front.append(other)
    return not left


@pytest.mark.parametrize(("scan", "connected"), [("snake", True), ("hilbert", True), ("raster", 0)])
def test_tokens_stand_for_connected_patches(scan, connected):
    torn = 0
    for grid in [*GRIDS, (7, 9), (6, 5)]:
        tokens = make_tokens(grid)
        routing = HNetRouter(96, scan)(tokens, Context())
        _, plan = HNetChunker(scan)(tokens, routing, Budget(keep=0.2))
        for token in plan.provenance.token:
            for number in token.unique():
                cells = (token == number).nonzero().flatten().tolist()
                torn += not is_connected(cells, grid)
    assert (torn == 0) == bool(connected)  # a run of the raster is torn where a row ends


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("budget", [Budget(keep=0.3), Budget(tokens=5)], ids=Budget.describe)
def test_an_exact_budget_gives_the_same_tokens_in_every_layout(scan, budget):
    tokens = make_tokens()
    routing = make_routing(tokens)
    fixed, plan = HNetChunker(scan, "fixed")(tokens, routing, budget)
    bucketed, other = HNetChunker(scan)(tokens, routing, budget)
    packed, third = HNetChunker(scan, "packed")(tokens, routing, budget)
    assert torch.equal(fixed.x, bucketed.x)
    assert torch.equal(fixed.x.flatten(0, 1), packed.x)
    assert torch.equal(plan.cells.flatten(), third.cells)
    assert torch.equal(plan.provenance.token, third.provenance.token)
    assert (plan.layout, other.layout, third.layout) == ("fixed", "fixed", "packed")
    assert {p.scan for p in (plan, other, third)} == {scan}
    taken = tokens.x.gather(1, plan.cells[..., None].expand(-1, -1, 96))
    assert torch.equal(fixed.x, taken)


def test_unequal_exact_budgets_stay_exact_and_run_bucketed():
    tokens = make_tokens()
    kept, plan = HNetChunker()(tokens, make_routing(tokens), Budget(tokens=[23, 1, 7]))
    assert plan.lengths == (23, 1, 7)
    assert plan.layout == "bucketed"
    assert kept.counts.tolist() == [23, 1, 7]


def test_natural_counts_are_rounded_up_with_the_next_most_probable_cells():
    tokens = make_tokens((5, 7))
    routing = make_routing(tokens)
    _, plan = HNetChunker("hilbert", buckets=5)(tokens, routing, Budget())
    natural = routing.natural_mask.sum(1)
    assert plan.requested.tolist() == natural.clamp(min=1).tolist()
    assert plan.computed.tolist() == [-(-max(1, count) // 7) * 7 for count in natural.tolist()]
    for sample in range(3):
        ranked = routing.keep_prob[sample].argsort(descending=True, stable=True)
        chosen = set(plan.keep_mask[sample].nonzero().flatten().tolist())
        assert chosen == set(ranked[: len(chosen)].tolist())
    _, exact = HNetChunker("hilbert", "packed")(tokens, routing, Budget())
    assert exact.computed.tolist() == exact.requested.tolist()


def test_cells_in_front_of_the_first_kept_one_belong_to_it():
    mask = torch.tensor([[False, False, True, False, True]])
    assert trace_runs(mask, torch.arange(5)).tolist() == [[0, 0, 0, 0, 1]]
    assert trace_runs(mask, torch.tensor([4, 3, 2, 1, 0])).tolist() == [[0, 0, 0, 1, 1]]


def test_probabilities_reach_the_blocks_only_as_gradients():
    tokens = make_tokens()
    prob = make_routing(tokens).keep_prob.requires_grad_()
    for layout in ("bucketed", "packed"):
        kept, plan = HNetChunker(layout=layout)(tokens, Routing(prob), Budget(keep=0.5))
        plain, _ = HNetChunker(layout=layout)(tokens, Routing(prob.detach()), Budget(keep=0.5))
        assert torch.equal(kept.x, plain.x)
        (gradient,) = torch.autograd.grad(kept.x.sum(), prob)
        expected = torch.where(plan.keep_mask, tokens.x.sum(-1), 0.0)
        assert torch.allclose(gradient, expected, atol=1e-4)


def test_the_scan_goes_to_the_router_beside_it():
    assert HNetChunker("hilbert").router == {"name": "hnet", "scan": "hilbert"}
    assert HNetChunker.dechunker == "hnet"


def test_a_router_that_scans_another_way_is_refused():
    tokens = make_tokens()
    routing = HNetRouter(96, "snake")(tokens, Context())
    with pytest.raises(ConfigError, match='router scans along "snake" and the chunker along "ra'):
        HNetChunker()(tokens, routing, Budget(keep=0.5))
    _, plan = HNetChunker("snake")(tokens, routing, Budget(keep=0.5))
    assert isinstance(plan, ScanPlan)
    assert isinstance(plan.routing, ScanRouting)


def test_the_ratio_loss_has_the_target():
    routing = make_routing(make_tokens())
    for target in (2.0, 6.0):
        losses = HNetChunker(target=target).losses(routing)
        assert list(losses) == ["ratio"]
        assert torch.equal(losses["ratio"], ratio_loss(routing, target))
    assert HNetChunker(target=2.0).losses(routing) != HNetChunker(target=6.0).losses(routing)
    assert HNetChunker().losses(Routing(torch.rand(1, 4), threshold=None)) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scan": "spiral"}, "scan is one of raster, snake, hilbert, got 'spiral'"),
        ({"layout": "padded"}, "layout is one of packed, bucketed, fixed, got 'padded'"),
        ({"buckets": 0}, "buckets is at least 1, got 0"),
        ({"layout": "fixed", "buckets": 4}, "buckets=4 is for layout \"bucketed\", and 'fixed'"),
        ({"target": 1.0}, "target is a compression above 1, got 1"),
    ],
)
def test_bad_options_are_refused_in_words(options, message):
    with pytest.raises(ConfigError, match=message):
        HNetChunker(**options)


def test_bad_input_is_refused_in_words():
    tokens = make_tokens()
    with pytest.raises(BudgetError, match=r'"fixed" runs the same count.*"bucketed"'):
        HNetChunker(layout="fixed")(tokens, make_routing(tokens), Budget())
    with pytest.raises(BudgetError, match="tokens=25 is more than the 24 cells"):
        HNetChunker()(tokens, make_routing(tokens), Budget(tokens=25))
    with pytest.raises(ShapeError, match="one probability per cell is needed"):
        HNetChunker()(tokens, Routing(torch.rand(3, 23)), Budget(keep=0.5))
    with pytest.raises(ShapeError, match="HNetChunker needs a grid"):
        HNetChunker()(Tokens(torch.zeros(1, 4, 2)), Routing(torch.rand(1, 4)), Budget(keep=0.5))
