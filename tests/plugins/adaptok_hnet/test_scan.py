import itertools
import math

import numpy as np
import pytest
import torch
from adaptok_hnet.scan import SCANS, invert_order, order_cells, order_on, read_grid
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptok import Tokens
from adaptok.errors import ConfigError, ShapeError

SIDES = range(1, 25)
LONG = [(2, 101), (101, 2), (3, 64), (64, 3), (127, 62), (62, 127), (4, 101), (101, 100)]


def step_lengths(order, grid):
    """How far each step of a walk goes: 1 to a neighbour, 2 or more for any other."""
    places = np.stack(np.unravel_index(order, grid))
    return np.abs(np.diff(places, axis=1)).sum(0)


@pytest.mark.parametrize("scan", SCANS)
def test_every_cell_comes_once_and_cell_0_first(scan):
    for grid in [*itertools.product(SIDES, SIDES), *LONG]:
        order = order_cells(grid, scan)
        assert sorted(order.tolist()) == list(range(math.prod(grid))), grid
        assert order[0] == 0, grid


@pytest.mark.parametrize("scan", ["snake", "hilbert"])
def test_cells_that_follow_each_other_are_neighbours_on_any_rectangle(scan):
    """No diagonal step, whatever the parity of the sides."""
    for grid in [*itertools.product(SIDES, SIDES), *LONG]:
        assert (step_lengths(order_cells(grid, scan), grid) == 1).all(), grid


@pytest.mark.parametrize("scan", ["snake", "hilbert"])
def test_the_same_in_videos_and_on_more_axes(scan):
    grids = [*itertools.product(range(1, 6), repeat=3), (2, 3, 3, 2), (7,), (3, 5, 8)]
    for grid in grids:
        order = order_cells(grid, scan)
        assert sorted(order.tolist()) == list(range(math.prod(grid))), grid
        assert (step_lengths(order, grid) == 1).all(), grid


@given(st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=40, deadline=None)
def test_hilbert_on_any_sides(h, w):
    order = order_cells((h, w), "hilbert")
    assert len(set(order.tolist())) == h * w
    assert (step_lengths(order, (h, w)) == 1).all()


def test_scans_by_hand():
    assert order_cells((2, 3), "raster").tolist() == [0, 1, 2, 3, 4, 5]
    assert order_cells((3, 3), "snake").tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    # the Hilbert curve of order two
    second = [0, 4, 5, 1, 2, 3, 7, 6, 10, 11, 15, 14, 13, 9, 8, 12]
    found = order_cells((4, 4), "hilbert").reshape(-1)
    mirrored = np.arange(16).reshape(4, 4).T.flatten()[second]
    assert found.tolist() in (second, mirrored.tolist())
    # the second frame begins where the first one ended
    assert order_cells((2, 1, 3), "snake").tolist() == [0, 1, 2, 5, 4, 3]


@pytest.mark.parametrize("grid", [(16, 16), (32, 32), (14, 21), (17, 30)])
def test_a_run_of_the_hilbert_curve_is_more_compact_than_one_of_other_scans(grid):
    """Spread of runs of 16 cells around their middle."""

    def spread(scan):
        order = order_cells(grid, scan)
        places = np.stack(np.unravel_index(order, grid)).astype(float)
        runs = places[:, : len(order) // 16 * 16].reshape(2, -1, 16)
        return runs.var(-1).sum(0).mean()

    assert spread("hilbert") < 0.5 * min(spread("raster"), spread("snake"))


@pytest.mark.parametrize("grid", [(4, 101), (101, 4), (2, 77), (6, 45)])
def test_a_long_grid_is_walked_from_end_to_end(grid):
    """And not there on one side and back on the other, where the long side is odd."""
    places = np.stack(np.unravel_index(order_cells(grid, "hilbert"), grid))[np.argmax(grid)]
    assert (np.maximum.accumulate(places) - places).max() <= 2 * min(grid)


def test_what_comes_back_is_the_callers_own():
    order_cells((4, 5), "hilbert")[:] = 0
    assert sorted(order_cells((4, 5), "hilbert").tolist()) == list(range(20))
    device = torch.device("cpu")
    order_on((4, 5), "hilbert", device).zero_()
    assert sorted(order_on((4, 5), "hilbert", device).tolist()) == list(range(20))


@pytest.mark.parametrize("scan", SCANS)
def test_tensor_and_inverse(scan):
    order = order_on((5, 6), scan, torch.device("cpu"))
    assert order.tolist() == order_cells((5, 6), scan).tolist()
    assert torch.equal(order[invert_order(order)], torch.arange(30))
    assert invert_order(order)[order].tolist() == list(range(30))


def test_one_graph_for_every_grid_and_gradients_after_inference_mode():
    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def walk(x, grid):
        return x.index_select(1, order_on(grid, "hilbert", x.device)) * 2

    for grid in [(4, 6), (5, 3), (7, 2)]:
        x = torch.randn(2, math.prod(grid), 3, requires_grad=True)
        with torch.inference_mode():
            walk(x, grid)
        out = walk(x, grid)
        assert torch.equal(out, 2 * x[:, order_cells(grid, "hilbert")])
        out.sum().backward()
        assert (x.grad == 2).all()


def test_the_operator_obeys_the_rules_of_operators():
    operator = torch.ops.adaptok_hnet.order_cells.default
    torch.library.opcheck(operator, ([3, 4], "hilbert", torch.device("cpu")))


def test_bad_scans_and_grids_are_refused_in_words():
    with pytest.raises(ConfigError, match="scan is one of raster, snake, hilbert, got 'peano'"):
        order_cells((2, 2), "peano")
    with pytest.raises(ShapeError, match="one or more axes of positive length"):
        order_cells((2, 0), "snake")
    with pytest.raises(ShapeError, match="one or more axes"):
        order_cells((), "raster")
    with pytest.raises(ShapeError, match=r"part needs a grid.*give grid=\(h, w\)"):
        read_grid(Tokens(torch.zeros(1, 4, 2)), "part")
    with pytest.raises(ShapeError, match="route before tokens are packed, padded or taken away"):
        read_grid(Tokens(torch.zeros(1, 2, 2), (2, 2), cells=torch.tensor([[0, 3]])), "part")
