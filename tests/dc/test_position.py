import math

import pytest
import torch

from adaptok.dc.position import encode_coordinates, encode_grid


def test_codes_are_those_of_the_published_checkpoint(golden):
    assert torch.allclose(encode_grid((16, 16), 128), golden["weights.pos_embed"][0], atol=1e-6)


@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 7), (40, 2)])
def test_codes_are_the_formula_column_first(grid):
    width = 24
    codes = encode_grid(grid, width)
    quarter = width // 4
    assert codes.shape == (grid[0] * grid[1], width)
    for row in range(grid[0]):
        for column in range(grid[1]):
            code = codes[row * grid[1] + column].tolist()
            expected = [
                wave(position * 10_000 ** (-i / quarter))
                for position in (column, row)
                for wave in (math.sin, math.cos)
                for i in range(quarter)
            ]
            assert code == pytest.approx(expected, abs=1e-6)


def test_all_cells_of_a_grid_differ():
    codes = encode_grid((12, 18), 64)
    distance = torch.cdist(codes.double(), codes.double()) + torch.eye(len(codes)) * 9
    assert distance.min() > 0.1


def test_a_grid_that_is_turned_is_another_one():
    wide, tall = encode_grid((2, 6), 16), encode_grid((6, 2), 16)
    assert not torch.allclose(wide, tall, atol=0.1)
    # cell (row, column) of the one is cell (column, row) of the other with the halves swapped
    swapped = tall.reshape(6, 2, 16).transpose(0, 1).reshape(12, 16).roll(8, dims=1)
    assert torch.allclose(wide, swapped)


def test_codes_are_exact_far_out():
    """Angles of large grids are computed in double precision."""
    code = encode_coordinates(torch.tensor([4095.0]), 8)[0].tolist()
    angles = [4095 * 10_000 ** (-i / 4) for i in range(4)]
    expected = [wave(angle) for wave in (math.sin, math.cos) for angle in angles]
    assert code == pytest.approx(expected, abs=1e-7)
