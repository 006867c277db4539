import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import cells_of, nearest_all_pairs

from adaptok.dc.nearest import find_nearest, reach_of
from adaptok.errors import ShapeError

grids = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


@settings(max_examples=150, deadline=None)
@given(grid=grids, share=st.floats(0, 1), seed=st.integers(0, 999))
def test_nearest_is_that_of_all_pairs_with_and_without_a_reach(grid, share, seed):
    generator = torch.Generator().manual_seed(seed)
    n = cells_of(grid).shape[0]
    mask = torch.rand(2, n, generator=generator) < share
    mask[:, torch.randint(n, (1,), generator=generator)] = True
    expected = nearest_all_pairs(mask, grid)
    assert torch.equal(find_nearest(mask, grid), expected)
    assert torch.equal(find_nearest(mask, grid, int(reach_of(mask, grid))), expected)


@settings(max_examples=50, deadline=None)
@given(grid=grids, seed=st.integers(0, 999))
def test_reach_is_the_largest_city_block_distance(grid, seed):
    generator = torch.Generator().manual_seed(seed)
    u = cells_of(grid)
    mask = torch.rand(1, u.shape[0], generator=generator) < 0.2
    mask[0, -1] = True
    distance = (u[:, None] - u[mask[0]][None]).abs().sum(-1)
    assert reach_of(mask, grid).item() == distance.amin(1).amax().item()


@pytest.mark.parametrize("grid", [(32, 32), (24, 40), (4, 9, 11)])
@pytest.mark.parametrize("share", [0.02, 0.25])
def test_larger_grids(grid, share):
    mask = torch.rand(2, cells_of(grid).shape[0]) < share
    mask[:, 0] = True
    expected = nearest_all_pairs(mask, grid)
    assert torch.equal(find_nearest(mask, grid, int(reach_of(mask, grid))), expected)


def test_one_kept_cell_and_all_kept():
    one = torch.zeros(1, 12, dtype=torch.bool)
    one[0, 7] = True
    assert (find_nearest(one, (3, 4)) == 7).all()
    assert torch.equal(find_nearest(torch.ones(1, 12).bool(), (3, 4))[0], torch.arange(12))


def test_samples_of_a_batch_do_not_touch_each_other():
    mask = torch.rand(3, 30) < 0.15
    mask[:, 4] = True
    together = find_nearest(mask, (5, 6), int(reach_of(mask, (5, 6))))
    for sample in range(3):
        alone = mask[sample : sample + 1]
        assert torch.equal(find_nearest(alone, (5, 6)), together[sample : sample + 1])


def test_a_mask_that_does_not_fit_the_grid_is_refused():
    with pytest.raises(ShapeError, match="has 12 cells, but 13 tokens"):
        find_nearest(torch.ones(1, 13).bool(), (3, 4))
