import torch
from routers.fields import make_noise

from adaptok import Context, Tokens
from adaptok.budgets import rank_cells
from adaptok.routers import NormRouter


def test_cells_are_ranked_by_their_length():
    x = make_noise((4, 5))
    norm = x.double().square().sum(-1).sqrt()
    routing = NormRouter()(Tokens(x, (4, 5)), Context())
    assert torch.equal(rank_cells(routing.keep_prob), rank_cells(norm))
    expected = norm / (norm + norm.mean(1, keepdim=True))
    assert torch.allclose(routing.keep_prob.double(), expected, atol=1e-6)
    smallest = NormRouter(smallest=True)(Tokens(x, (4, 5)), Context())
    assert torch.equal(rank_cells(smallest.keep_prob), rank_cells(-norm))


def test_large_features_keep_their_order():
    x = 1e6 * (1 + 1e-4 * torch.arange(50.0)).reshape(1, 50, 1)
    routing = NormRouter()(Tokens(x, (5, 10)), Context())
    assert rank_cells(routing.keep_prob).tolist() == [list(range(50))[::-1]]
