import pytest
import torch
from adaptok_patch import quadtree
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_oracles import grow_tree, mark_cells

from adaptok.errors import ConfigError, ShapeError


def make_maps(h, w, scales, seed, b=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        scale: 8 * torch.rand(b, -(-h // scale), -(-w // scale), generator=generator)
        for scale in scales
    }


@given(
    st.integers(1, 13),
    st.integers(1, 13),
    st.sampled_from([(2,), (2, 4), (4,), (2, 8), (2, 4, 8)]),
    st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_leaves_are_those_of_a_recursion(h, w, scales, seed):
    maps = make_maps(h, w, scales, seed)
    thresholds = [5.0, 4.0, 3.0][: len(scales)]
    leaves = quadtree(maps, thresholds, (h, w))
    for sample in range(2):
        own = {scale: x[sample].tolist() for scale, x in maps.items()}
        patches = grow_tree(own, thresholds, h, w)
        assert leaves.scale[sample].tolist() == mark_cells(patches, h, w)
        assert leaves.counts[sample] == len(patches)
        # one number a patch, counted by their first cells
        first = sorted(patches)
        for number, (y, x, edge) in enumerate(first):
            inside = leaves.leaf[sample, y : y + edge, x : x + edge]
            assert (inside == number).all()
            assert (leaves.leaf[sample] == number).sum() == edge**2


@given(st.integers(1, 13), st.integers(1, 13), st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_a_coarse_leaf_is_below_its_threshold(h, w, seed):
    maps = make_maps(h, w, (2, 4), seed)
    leaves = quadtree(maps, (5.0, 3.0), (h, w))
    for scale, limit in ((2, 5.0), (4, 3.0)):
        for sample, y, x in (leaves.scale == scale).nonzero().tolist():
            assert maps[scale][sample, y // scale, x // scale] < limit


def test_the_threshold_itself_is_not_below_it():
    maps = {2: torch.tensor([[[4.0, 3.999]]])}
    assert quadtree(maps, (4.0,), (2, 4)).scale[0, 0].tolist() == [1, 1, 2, 2]


def test_bad_input():
    maps = make_maps(4, 6, (2, 4), 0)
    with pytest.raises(ConfigError, match=r"one for each of the scales \(2, 4\)"):
        quadtree(maps, (5.0,), (4, 6))
    with pytest.raises(ConfigError, match=r"powers of two .* got \(1, 2, 3\)"):
        quadtree({2: maps[2], 3: maps[4]}, (5.0, 4.0), (4, 6))
    with pytest.raises(ShapeError, match=r"scale 2 needs the shape \(2, 2, 4\)"):
        quadtree(maps, (5.0, 4.0), (4, 7))
    with pytest.raises(ConfigError, match="one frame at a time"):
        quadtree(maps, (5.0, 4.0), (2, 4, 6))
