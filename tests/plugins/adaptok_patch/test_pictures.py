import math

import pytest
import torch
from adaptok_patch import measure_entropy, patch_entropy
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_oracles import histogram_entropy

from adaptok.errors import ConfigError, ShapeError


def test_entropy_is_that_of_a_histogram_by_loops():
    images = torch.randint(0, 256, (2, 1, 12, 20)).double()
    images[1, :, :6] = images[1, :, :1, :1]
    found = patch_entropy(images, patch=4, bins=64)
    for sample in range(2):
        for y in range(3):
            for x in range(5):
                values = images[sample, 0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].flatten().tolist()
                expected = histogram_entropy(values, 64, 255.0)
                assert found[sample, y, x] == pytest.approx(expected, abs=1e-5)


@given(st.integers(1, 5), st.integers(1, 17), st.integers(1, 17), st.integers(2, 600))
@settings(max_examples=25, deadline=None)
def test_bounds_and_border(patch, height, width, bins):
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(bins))
    found = patch_entropy(images, patch, bins, peak=1.0)
    assert found.shape == (1, math.ceil(height / patch), math.ceil(width / patch))
    whole = found[:, : height // patch, : width // patch]
    assert found.isinf().sum() == found.numel() - whole.numel()
    assert not whole.isinf().any()
    assert (whole >= 0).all()
    assert (whole <= math.log2(min(bins, patch**2)) + 1e-4).all()


def test_a_flat_patch_has_no_entropy_and_two_values_have_one_bit():
    images = torch.full((1, 3, 8, 16), 200, dtype=torch.uint8)
    images[:, :, 4:, 8:] = 3
    assert patch_entropy(images, 8).flatten().tolist() == [0.0, 1.0]


def test_colours_of_one_grey_value_are_alike():
    red, grey = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.299)
    red[:, 0] = 1.0
    both = torch.cat([red, grey], dim=-1)
    assert patch_entropy(both, 8, peak=1.0).tolist() == [[[0.0, 0.0]]]
    assert patch_entropy(both, 8, bins=2, peak=1.0).tolist() == [[[0.0, 0.0]]]


def test_pixels_in_0_to_1_are_the_same_picture():
    images = torch.randint(0, 256, (2, 3, 16, 16)).float()
    assert torch.allclose(patch_entropy(images, 4), patch_entropy(images / 255, 4, peak=1.0))


def test_many_patches_are_measured_in_parts(monkeypatch):
    import adaptok_patch.pictures as pictures

    images = torch.rand(2, 1, 12, 20)
    expected = patch_entropy(images, 4, peak=1.0)
    monkeypatch.setattr(pictures, "ROWS", 7)
    assert torch.equal(patch_entropy(images, 4, peak=1.0), expected)


def test_maps_of_all_coarse_scales():
    maps = measure_entropy(torch.rand(2, 3, 40, 56), patch=8, scales=(1, 2, 4), peak=1.0)
    assert {scale: tuple(x.shape) for scale, x in maps.items()} == {2: (2, 3, 4), 4: (2, 2, 2)}
    assert maps[2][:, 2].isinf().all()
    assert maps[2][:, :2, :3].isfinite().all()


@pytest.mark.parametrize(
    ("images", "options", "error", "words"),
    [
        (torch.zeros(3, 8, 8), {"patch": 4}, ShapeError, r"got the shape \(3, 8, 8\)"),
        (torch.zeros(1, 4, 8, 8), {"patch": 4}, ShapeError, r"\(b, 3, h, w\)"),
        (torch.zeros(1, 1, 8, 8), {"patch": 0}, ConfigError, "patch is at least 1"),
        (torch.zeros(1, 1, 8, 8), {"patch": 4, "bins": 1}, ConfigError, "bins at least 2"),
        (torch.zeros(1, 1, 8, 8) - 2, {"patch": 4}, ConfigError, "undo the host's normalisation"),
        (torch.zeros(1, 1, 8, 8) + 2, {"patch": 4, "peak": 1.0}, ConfigError, "from 2 to 2"),
        (torch.full((1, 1, 8, 8), math.nan), {"patch": 4}, ConfigError, "from nan to nan"),
    ],
)
def test_bad_input(images, options, error, words):
    with pytest.raises(error, match=words):
        patch_entropy(images, **options)
