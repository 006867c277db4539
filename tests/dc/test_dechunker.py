import pytest
import torch
from conftest import randomise
from oracles import nearest_all_pairs, smooth_all_pairs

from adaptok import Budget, Routing, Tokens
from adaptok.dc import DCChunker, DCDechunker
from adaptok.dc.dechunker import natural_confidence, pass_gradient, smooth_and_spread
from adaptok.errors import ConfigError

GRID = (5, 8)
CASES = [
    ("packed", Budget()),
    ("packed", Budget(drop=0.5)),
    ("packed", Budget(keep=[0.05, 0.6, 1.0])),
    ("bucketed", Budget(drop=0.3)),
    ("fixed", Budget(tokens=7)),
]


def make_case(layout, budget, d=6):
    """Cells, chunks that the blocks have changed, a plan, and the leaf of the probabilities."""
    before = Tokens(torch.randn(3, 40, d), GRID)
    # confident, doubtful and almost impossible cells
    prob = torch.rand(3, 40).pow(torch.tensor([[0.5], [1.0], [4.0]]))
    prob[:, 0], prob[:, -1], prob[:, 7] = 1.0, 1.0, 1e-6
    prob = prob.requires_grad_()
    kept, plan = DCChunker(layout, buckets=5)(before, Routing(prob), budget)
    chunks = kept.with_x(torch.randn(kept.x.shape))
    return before, chunks, plan, prob


def dechunk_by_hand(chunks, plan, sigma):
    """Smooth each sample with the whole matrix, then look for each cell's nearest one."""
    nearest = nearest_all_pairs(plan.keep_mask, plan.grid)
    out = []
    x = chunks.x.reshape(-1, chunks.width)
    start = 0
    for sample, mask in enumerate(plan.keep_mask):
        cells = mask.nonzero().squeeze(1)
        h = x[start : start + len(cells)]
        start += len(cells)
        prob = plan.routing.keep_prob[sample, cells]
        smooth = smooth_all_pairs(h, prob, cells, plan.grid, sigma)
        place = {cell: row for row, cell in enumerate(cells.tolist())}
        out.append(smooth[[place[cell] for cell in nearest[sample].tolist()]])
    assert start == len(x)
    return torch.stack(out)


@pytest.mark.parametrize("sigma", [0.7, 2.0])
@pytest.mark.parametrize(("layout", "budget"), CASES)
def test_dechunk_is_smoothing_nearest_and_residual(layout, budget, sigma):
    before, chunks, plan, _ = make_case(layout, budget)
    dechunker = DCDechunker(6, sigma)
    expected = dechunk_by_hand(chunks, plan, sigma)
    fresh = dechunker(chunks, plan, before)
    assert torch.allclose(fresh.x.double(), expected, atol=1e-5)
    assert fresh.grid == GRID
    randomise(dechunker)
    weight, bias = (part.double() for part in dechunker.residual.parameters())
    with_residual = expected + before.x.double() @ weight.T + bias
    assert torch.allclose(dechunker(chunks, plan, before).x.double(), with_residual, atol=1e-5)
    assert (with_residual - expected).abs().mean() > 0.1


@pytest.mark.parametrize(("layout", "budget"), CASES)
def test_gradients_are_those_of_the_slow_form_through_every_path(layout, budget):
    """To the blocks' output, to the probabilities by smoothing and by gate, to the residual."""
    before, chunks, plan, prob = make_case(layout, budget)
    h = chunks.x.requires_grad_()
    cells = before.x.clone().requires_grad_()
    dechunker = randomise(DCDechunker(6, 1.0))
    probe = torch.randn(3, 40, 6)
    out = dechunker(chunks, plan, before.with_x(cells)).x
    leaves = (h, prob, cells, *dechunker.residual.parameters())
    ours = torch.autograd.grad((out * probe).sum(), leaves)

    spread = dechunk_by_hand(chunks, plan, 1.0)
    natural = (prob > 0.5).double()
    confidence = natural * prob + (1 - natural) * (1 - prob)
    gate = 1.0 + (confidence - confidence.detach())
    residual = dechunker.residual(cells).double()
    theirs = torch.autograd.grad(
        ((spread * gate[..., None] + residual) * probe).sum(), leaves, retain_graph=True
    )
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max().item())
    # both paths to the probabilities count: cells that the budget dropped have the gate's alone
    dropped = ~plan.keep_mask
    by_gate = ((spread * probe).sum(-1) * (2 * natural - 1)).detach().float()
    if dropped.any():
        assert torch.allclose(ours[1][dropped], by_gate[dropped], atol=1e-3, rtol=1e-3)
    clear = plan.keep_mask & (prob > 0.01) & (prob < 0.99)
    assert (ours[1][clear] - by_gate[clear]).abs().max() > 1e-3


def test_the_residual_is_not_gated():
    """Its gradient to the probabilities is nothing, whatever its weights."""
    before, chunks, plan, prob = make_case("packed", Budget())
    dechunker = randomise(DCDechunker(6, 1.0))
    silent = chunks.with_x(torch.zeros_like(chunks.x))
    (grad,) = torch.autograd.grad(dechunker(silent, plan, before).x.square().sum(), prob)
    assert (grad == 0).all()


def test_a_router_without_threshold_decides_by_the_budget():
    routing = Routing(torch.tensor([[0.9, 0.2, 0.7]]), threshold=None)
    routing = routing.with_keep_mask(torch.tensor([[False, True, True]]))
    assert torch.allclose(natural_confidence(routing), torch.tensor([[0.1, 0.2, 0.7]]))


def test_the_gate_is_exactly_one_for_any_probability():
    prob = torch.cat([torch.rand(1, 5000), torch.tensor([[0.0, 1.0, 1e-30, 1 / 3]])], dim=1)
    assert (pass_gradient(prob) == 1).all()


def test_dechunker_stays_in_float32_under_autocast_and_after_a_cast():
    before, chunks, plan, _ = make_case("packed", Budget())
    dechunker = randomise(DCDechunker(6, 1.0))
    half = chunks.with_x(chunks.x.to(torch.bfloat16))
    before = before.with_x(before.x.to(torch.bfloat16))
    full = before.with_x(before.x.float())
    expected = dechunker(half.with_x(half.x.float()), plan, full).x
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = dechunker(half, plan, before).x
    cast = dechunker.to(torch.bfloat16)(half, plan, before).x
    for ours in (under_autocast, cast):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


def test_video_grids():
    before = Tokens(torch.randn(2, 24, 4), (2, 3, 4))
    kept, plan = DCChunker()(before, Routing(torch.rand(2, 24)), Budget(keep=0.3))
    expected = dechunk_by_hand(kept, plan, 1.0)
    assert torch.allclose(smooth_and_spread(kept, plan, 1.0).double(), expected, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan")])
def test_a_sigma_that_is_not_positive_is_refused(sigma):
    with pytest.raises(ConfigError, match="sigma is a positive number of cells, got"):
        DCDechunker(8, sigma)
