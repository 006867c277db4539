import math

import pytest
import torch

from adaptok import Context, Tokens
from adaptok.errors import ConfigError
from adaptok.routers import CoveringRouter
from adaptok.routers.covering import order_evenly
from adaptok.routers.predictability import measure_surprise


def ranking_by_hand(x, grid, share):
    surprise = measure_surprise(x, grid)[0].tolist()
    n = len(surprise)
    phi = {1: 1.618033988749895, 2: 1.324717957244746, 3: 1.220744084605760}[len(grid)]
    even = []
    for cell in range(n):
        total, rest = 0.5, cell
        coordinates = []
        for length in reversed(grid):
            coordinates.append(rest % length)
            rest //= length
        for axis, coordinate in enumerate(reversed(coordinates), 1):
            total += coordinate * phi**-axis
        even.append(total % 1)
    by_surprise = sorted(range(n), key=lambda i: (-surprise[i], i))
    by_even = sorted(range(n), key=lambda i: (even[i], i))
    key = {i: min(by_surprise.index(i) / (1 - share), by_even.index(i) / share) for i in range(n)}
    return sorted(range(n), key=lambda i: (key[i], i))


@pytest.mark.parametrize("grid", [(6, 7), (1, 9), (2, 3, 4), (11,)])
@pytest.mark.parametrize("share", [0.21, 0.35, 0.61])
def test_the_ranking_is_its_formula(grid, share):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, math.prod(grid), 8, generator=generator)
    if len(grid) == 1:
        grid = (1, *grid)
    prob = CoveringRouter(share)(Tokens(x, grid), Context()).keep_prob
    assert prob[0].argsort(descending=True).tolist() == ranking_by_hand(x[:1], grid, share)
    alone = CoveringRouter(share)(Tokens(x[1:], grid), Context()).keep_prob
    assert torch.equal(alone[0], prob[1])


def test_without_a_share_it_ranks_by_surprise_alone():
    x = torch.randn(1, 20, 8)
    prob = CoveringRouter(0.0)(Tokens(x, (4, 5)), Context()).keep_prob
    surprise = measure_surprise(x, (4, 5))
    assert prob.argsort(descending=True).tolist() == surprise.argsort(descending=True).tolist()


def test_a_flat_half_gets_its_share():
    grid = (16, 16)
    x = torch.randn(1, 256, 8)
    x[0, 128:] = 0.0
    kept = CoveringRouter()(Tokens(x, grid), Context()).keep_prob[0].argsort(descending=True)[:64]
    flat = (kept >= 144).sum().item()
    assert 6 <= flat <= 16  # about half of a third of 64


@pytest.mark.parametrize("grid", [(16, 16), (10, 24), (4, 8, 8)])
@pytest.mark.parametrize("kept", [0.1, 0.25, 0.5])
def test_even_cells_leave_no_large_hole(grid, kept):
    even = order_evenly(grid, torch.device("cpu")) < kept
    assert even.float().mean().item() == pytest.approx(kept, abs=0.05)
    cells = torch.cartesian_prod(*(torch.arange(length) for length in grid)).float()
    reach = torch.cdist(cells, cells[even]).amin(1).max().item()
    assert reach <= 1.6 * (1 / kept) ** (1 / len(grid)) + 1


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan"), "much"])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ConfigError, match="share is a f"):
        CoveringRouter(share)


def test_it_compiles_whole():
    router = CoveringRouter()
    x = torch.randn(2, 12, 8)
    compiled = torch.compile(
        lambda x: router(Tokens(x, (3, 4)), Context()).keep_prob, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x), router(Tokens(x, (3, 4)), Context()).keep_prob)
