import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routers.fields import mean_by_loop

from adaptok.errors import ShapeError
from adaptok.routers.neighbours import mean_of_neighbours

GRIDS = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@given(GRIDS, st.floats(0, 6), st.integers(0, 2**20))
def test_means_are_those_of_a_loop(grid, falloff, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, math.prod(grid), 3, generator=generator)
    before = x.clone()
    ours = mean_of_neighbours(x, grid, falloff)
    assert torch.allclose(ours.double(), mean_by_loop(x, grid, falloff), atol=2e-6)
    assert torch.equal(x, before)


def test_a_corner_an_edge_and_the_middle_count_their_real_neighbours():
    x = torch.arange(9.0).reshape(1, 9, 1)
    mean = mean_of_neighbours(x, (3, 3), falloff=0).flatten()
    assert mean[0] == pytest.approx((1 + 3 + 4) / 3)
    assert mean[1] == pytest.approx((0 + 2 + 3 + 4 + 5) / 5)
    assert mean[4] == pytest.approx(4)
    weighted = mean_of_neighbours(x, (3, 3), falloff=2).flatten()
    assert weighted[0] == pytest.approx((1 + 3 + 4 / 2) / 2.5)


@given(GRIDS)
def test_equal_cells_are_exactly_their_own_mean(grid):
    x = torch.randn(2, 1, 3).expand(2, math.prod(grid), 3)
    assert torch.equal(mean_of_neighbours(x, grid), x)


def test_a_cell_without_neighbours_is_its_own_mean():
    x = torch.randn(2, 1, 4)
    for grid in ((1,), (1, 1), (1, 1, 1)):
        assert torch.equal(mean_of_neighbours(x, grid), x)


def test_gradients_are_those_of_the_loop():
    x = torch.randn(1, 12, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mean_of_neighbours(x, (3, 4)), (x,))


def test_a_grid_of_another_size_is_refused():
    with pytest.raises(ShapeError, match="has 6 cells, but 5 tokens came"):
        mean_of_neighbours(torch.zeros(1, 5, 2), (2, 3))
