import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptok import Budget, Context, Tokens
from adaptok.budgets import apply_budget, rank_cells
from adaptok.routers import RandomRouter
from adaptok.routers.chance import make_key, scatter_cells


def draw(router, b=2, grid=(4, 5)):
    n = grid[0] * grid[1]
    return router(Tokens(torch.randn(b, n, 4), grid), Context()).keep_prob


def test_without_a_seed_torch_decides_in_each_call():
    router = RandomRouter()
    first, second = draw(router), draw(router)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append(router(Tokens(torch.zeros(2, 20, 4), (4, 5)), Context()).keep_prob)
    assert torch.equal(*runs)


@given(st.integers())
def test_a_seed_gives_every_sample_and_call_the_same_ranking(seed):
    router = RandomRouter(seed)
    state = torch.get_rng_state()
    prob = router(Tokens(torch.zeros(3, 20, 4), (4, 5)), Context()).keep_prob
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(prob, draw(RandomRouter(seed), b=3))
    assert torch.equal(prob[:1].expand(3, 20), prob)
    assert not torch.equal(rank_cells(prob)[0], torch.arange(20))


def test_the_numbers_never_change():
    prob = scatter_cells(torch.arange(4), 0xDEADBEEF)
    expected = []
    for cell in range(4):
        bits = cell ^ 0xDEADBEEF
        for _ in range(2):
            bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) % 2**32
        expected.append(((bits ^ (bits >> 16)) >> 8) / 2**24)
    assert prob.tolist() == expected
    assert make_key(0) != make_key(1) != make_key(-1)


@pytest.mark.parametrize("make", [RandomRouter, lambda: RandomRouter(7)])
def test_each_cell_is_as_likely_as_any_other(make):
    kept = torch.zeros(20)
    for seed in range(400):
        router = RandomRouter(seed) if make().seed is not None else make()
        prob = draw(router, b=1)
        kept += apply_budget(
            router(Tokens(torch.zeros(1, 20, 4), (4, 5)), Context()), Budget(tokens=5)
        ).keep_mask[0]
        assert prob.shape == (1, 20)
    # binomial: mean 100, deviation 8.7
    assert kept.sum() == 2000
    assert ((kept - 100).abs() < 40).all()


def test_numbers_of_neighbouring_cells_and_seeds_are_unrelated():
    prob = torch.stack([scatter_cells(torch.arange(256), make_key(seed)) for seed in range(256)])
    assert prob.mean().item() == pytest.approx(0.5, abs=0.01)
    assert prob.var().item() == pytest.approx(1 / 12, abs=0.005)
    for a, b in ((prob[:, :-1], prob[:, 1:]), (prob[:-1], prob[1:])):
        both = torch.stack([a.flatten(), b.flatten()])
        assert torch.corrcoef(both)[0, 1].abs() < 0.02
