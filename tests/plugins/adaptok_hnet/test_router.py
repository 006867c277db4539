import itertools

import pytest
import torch
from adaptok_hnet.router import HNetRouter, ScanRouting
from adaptok_hnet.scan import SCANS, order_cells

from adaptok import Budget, Context, Tokens
from adaptok.budgets import apply_budget
from adaptok.errors import ConfigError, DtypeError, ShapeError
from adaptok.losses import ratio_loss
from adaptok.testing import fill_weights
from adaptok.testing.cases import make_tokens

GRIDS = [(4, 6), (5, 7), (2, 3, 4)]


def find_prob_by_loop(router, tokens):
    """(1 - cos) / 2 of each cell and the one before it in the scan, pair by pair."""
    order = order_cells(tokens.grid, router.scan)
    query, key = router.query.weight.double(), router.key.weight.double()
    x = tokens.x.double()
    prob = torch.ones(x.shape[:2], dtype=torch.double)
    for sample in range(len(x)):
        for before, here in itertools.pairwise(order):
            q, k = query @ x[sample, before], key @ x[sample, here]
            prob[sample, here] = (1 - q @ k / (q.norm() * k.norm())) / 2
    return prob


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("scan", SCANS)
def test_probabilities_are_those_of_the_loop(scan, grid, filled):
    router = HNetRouter(96, scan)
    if filled:
        fill_weights(router)
    tokens = make_tokens(grid)
    routing = router(tokens, Context())
    expected = find_prob_by_loop(router, tokens)
    assert torch.allclose(routing.keep_prob.double(), expected, atol=1e-5)
    assert expected[:, 1:].std() > 0.01
    assert (routing.keep_prob[:, 0] == 1).all()
    assert routing.scan == scan
    assert torch.equal(routing.natural_mask, routing.keep_prob > 0.5)


def test_a_fresh_router_keeps_what_points_away_and_first_cells_and_no_ties():
    x = torch.tensor([[1.0, 0], [1, 0.1], [-1, 0], [0, 1], [0, -1], [0, 0]])[None]
    routing = HNetRouter(2)(Tokens(x, (2, 3)), Context())
    #  first, alike, opposite, at a right angle (a tie), opposite, zeros (a tie)
    assert routing.natural_mask.tolist() == [[True, False, True, False, True, False]]
    assert HNetRouter.starts_full is False


def test_natural_counts_differ_and_budgets_are_exact():
    routing = HNetRouter(96)(make_tokens(), Context())
    counts = apply_budget(routing, Budget()).kept
    assert counts.max() >= 2 * counts.min()
    for budget, kept in [(Budget(keep=0.25), [6] * 3), (Budget(tokens=[24, 1, 7]), [24, 1, 7])]:
        chosen = apply_budget(routing, budget)
        assert chosen.kept.tolist() == kept
        assert chosen.keep_mask[:, 0].all()  # its probability is 1, and ties go to lower cells
        assert isinstance(chosen, ScanRouting)
    dropped = apply_budget(routing, Budget(drop=0.5)).kept
    assert dropped.tolist() == (counts - (counts * 0.5).floor().long()).tolist()


def test_it_stays_in_float32_and_autocast_does_not_touch_it():
    router = fill_weights(HNetRouter(96, "snake"))
    tokens = make_tokens()
    expected = router(tokens, Context()).keep_prob
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(tokens, Context()).keep_prob, expected)
    router.to(torch.bfloat16)
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    half = router(make_tokens(dtype=torch.bfloat16), Context()).keep_prob
    assert half.dtype == torch.float32
    assert (half - expected).abs().max() < 0.02


def test_weights_of_half_precision_are_refused():
    router = HNetRouter(8)
    state = {name: value.bfloat16() for name, value in router.state_dict().items()}
    router.load_state_dict(state, assign=True)
    with pytest.raises(DtypeError, match=r"HNetRouter runs in float32 only.*assign=True"):
        router(Tokens(torch.randn(1, 4, 8), (2, 2)), Context())


def test_the_ratio_loss_teaches_it_how_many_cells_to_keep():
    """Features of a host share a large part, so that a fresh one keeps the first cell only."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 48, 16, generator=generator) + 3 * torch.randn(1, 1, 16, generator=generator)
    tokens = Tokens(x, (6, 8))
    router = HNetRouter(16, "hilbert")
    assert router(tokens, Context()).natural_mask.sum(1).tolist() == [1, 1, 1, 1]
    optimiser = torch.optim.Adam(router.parameters(), lr=0.02)
    for _ in range(80):
        loss = ratio_loss(router(tokens, Context()), target=4.0)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in router.parameters())
        optimiser.step()
    share = router(tokens, Context()).natural_mask.float().mean()
    assert 0.15 < share < 0.35


def test_bad_options_and_tokens_are_refused_in_words():
    with pytest.raises(ConfigError, match="scan is one of raster, snake, hilbert, got 'zigzag'"):
        HNetRouter(8, "zigzag")
    with pytest.raises(ShapeError, match=r"made for 8 features.*host has 6: give width=6"):
        HNetRouter(8)(Tokens(torch.zeros(1, 4, 6), (2, 2)), Context())
    with pytest.raises(ShapeError, match="HNetRouter needs a grid"):
        HNetRouter(8)(Tokens(torch.zeros(1, 4, 8)), Context())
    assert repr(HNetRouter(8, "snake")).startswith("HNetRouter(\n  scan='snake'")
