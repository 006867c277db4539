import pytest
import torch
from adaptok_graph.grids import (
    check_neighbours,
    connect_cells,
    count_edges,
    find_edges,
    pair_cells,
    repeat_edges,
)
from graph_oracles import neighbours_by_loop

from adaptok.errors import ConfigError

GRIDS = [(3, 4), (1, 5), (5, 1), (1, 1), (2, 2), (2, 3, 4), (3, 1, 1), (2, 2, 2, 3), (4,)]


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize("grid", GRIDS)
def test_edges_join_the_cells_that_touch(grid, neighbours):
    edges = connect_cells(grid, neighbours)
    expected = neighbours_by_loop((1, *grid) if len(grid) == 1 else grid, neighbours)
    assert set(map(tuple, edges.T.tolist())) == expected
    assert edges.shape[1] == len(expected) == count_edges(grid, neighbours)
    pairs = pair_cells(grid, neighbours)
    assert set(map(tuple, pairs.T.tolist())) == {(i, j) for i, j in expected if i < j}


def test_pairs_are_shuffled_always_alike():
    pairs = pair_cells((8, 8))
    pair_cells.cache_clear()
    state = torch.get_rng_state()
    assert torch.equal(pair_cells((8, 8)), pairs)
    assert torch.equal(torch.get_rng_state(), state)
    assert (pairs[0].diff() < 0).float().mean() > 0.3


def test_copies_do_not_touch():
    edges = repeat_edges(torch.zeros(1), (2, 3), 3)
    expected = {(i + 6 * s, j + 6 * s) for i, j in neighbours_by_loop((2, 3), 4) for s in range(3)}
    assert set(map(tuple, edges.T.tolist())) == expected


def test_a_caller_cannot_change_the_shared_edges():
    first = find_edges(torch.zeros(1), [2, 3], 4)
    first.zero_()
    assert find_edges(torch.zeros(1), [2, 3], 4).any()


def test_the_operation_has_the_right_shape_in_a_graph():
    torch.library.opcheck(find_edges, (torch.zeros(1), [2, 3, 4], 8))


def test_other_neighbours_are_refused():
    with pytest.raises(ConfigError, match="neighbours is 4 or 8, got 6"):
        check_neighbours(6)
