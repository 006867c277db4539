"""Cells of an image: held against loops over pixels and cells."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptok.errors import DtypeError, ShapeError
from adaptok.see.cells import (
    count_carried,
    find_borders,
    flat_grid,
    locate_cells,
    paint_groups,
    read_image,
    shade_cells,
)

generator = np.random.default_rng(0)
PIXELS = generator.integers(0, 256, (12, 20, 3), dtype=np.uint8)
TOKEN = np.array([[0, 0, 1, 2], [0, 3, 3, 2], [-1, -1, 3, 4]])


def test_groups_get_their_mean_and_cells_without_a_token_fade():
    painted = paint_groups(PIXELS, TOKEN)
    places = locate_cells(12, 20, TOKEN.shape)
    for token in range(5):
        inside = np.isin(places, np.flatnonzero(TOKEN.ravel() == token))
        mean = np.broadcast_to(PIXELS[inside].mean(0), painted[inside].shape)
        np.testing.assert_allclose(painted[inside], mean, atol=0.51)
    lost = np.isin(places, [8, 9])
    expected = 0.2 * PIXELS[lost] + 0.8 * np.array([214, 218, 226])
    np.testing.assert_allclose(painted[lost], expected, atol=0.51)


def test_shade():
    keep = TOKEN == 3
    shaded = shade_cells(PIXELS, keep)
    for i in range(12):
        for j in range(20):
            same = (shaded[i, j] == PIXELS[i, j]).all()
            if keep[i // 4, j // 5]:
                assert same
            else:
                assert shaded[i, j].max() < 100


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 7), st.integers(0, 7))
def test_cells_share_the_pixels_nearly_evenly(h, w, more, wider):
    places = locate_cells(h + more, w + wider, (h, w))
    counts = np.bincount(places.ravel(), minlength=h * w)
    assert counts.min() >= 1
    assert (np.diff(places // w, axis=0) >= 0).all()
    heights = np.bincount(places[:, 0] // w)
    assert heights.max() - heights.min() <= 1


@given(st.lists(st.lists(st.integers(-1, 3), min_size=3, max_size=3), min_size=2, max_size=4))
def test_borders_lie_between_different_tokens(rows):
    token = np.array(rows)
    expected = set()
    for i, j in np.ndindex(token.shape):
        if j and token[i, j] != token[i, j - 1]:
            expected.add((j, i, j, i + 1))
        if i and token[i, j] != token[i - 1, j]:
            expected.add((j, i, j + 1, i))
    found = {tuple(line.ravel().astype(int)) for line in find_borders(token)}
    assert found == expected


def test_carried():
    counts = count_carried(TOKEN)
    assert counts.tolist() == [[3, 3, 1, 2], [3, 3, 3, 2], [0, 0, 3, 1]]


def test_images():
    image = torch.rand(2, 3, 4, 6)
    assert (read_image(image, 1) == read_image((image[1] * 255).round().byte())).all()
    with pytest.raises(ShapeError, match="no image 2 in a batch of 2"):
        read_image(image, 2)
    with pytest.raises(ShapeError, match=r"shape \(3, h, w\)"):
        read_image(torch.rand(1, 4, 4))
    with pytest.raises(DtypeError, match="before it was normalised"):
        read_image(3 * image - 1)
    with pytest.raises(DtypeError, match="uint8 or floats"):
        read_image(torch.zeros(3, 4, 4, dtype=torch.int64))


def test_bad_grids():
    with pytest.raises(ShapeError, match="too small for 3 x 4 cells"):
        locate_cells(2, 20, (3, 4))
    with pytest.raises(ShapeError, match="needs height and width"):
        flat_grid((12,))
    assert flat_grid((2, 3, 4)) == (3, 4)
