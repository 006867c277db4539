import pytest
import torch
from adaptok_patch.blocks import axis_representatives, lay_blocks
from adaptok_patch.merging import order_merges
from hypothesis import given, settings
from hypothesis import strategies as st
from patch_oracles import merge_blocks


def partition(order, count, sample=0):
    """Return the groups of cells that share a token, as sets of flat cells."""
    kept = order.places() < count
    tokens = order.find_tokens(kept)[sample].tolist()
    groups = {}
    for cell, token in enumerate(tokens):
        groups.setdefault(token, set()).add(cell)
    assert sorted(groups) == list(range(count))
    # tokens are in the order of their cells, and stand for their own one
    assert [tokens[cell] for cell in kept[sample].nonzero().flatten()] == list(range(count))
    return {frozenset(group) for group in groups.values()}


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_whole_blocks_merge_cheapest_first(h, w, seed, equal):
    generator = torch.Generator().manual_seed(seed)
    prob = torch.rand(2, h * w, generator=generator)
    if equal:  # many cells are equally probable
        prob = (3 * prob).round() / 3
    order = order_merges(prob, (1, h, w))
    ranks = (prob * 1e6).long() * h * w
    static = torch.empty(h * w, dtype=torch.long)
    static[lay_blocks(h, w).order] = torch.arange(h * w)
    for sample in range(2):
        table = (ranks[sample] + static).view(h, w).tolist()
        seen = 0
        for parts in merge_blocks(table, h, w):
            flat = {frozenset(y * w + x for y, x in part) for part in parts}
            assert partition(order, len(parts), sample) == flat
            seen += 1
        assert seen > 1 or h * w == 1


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_every_count_is_met_and_smaller_ones_merge_more(frames, h, w, seed):
    prob = torch.rand(1, frames * h * w, generator=torch.Generator().manual_seed(seed))
    prob = (4 * prob).round() / 4
    order = order_merges(prob, (frames, h, w))
    finer = partition(order, frames * h * w)
    assert all(len(part) == 1 for part in finer)
    for count in range(frames * h * w - 1, 0, -1):
        coarser = partition(order, count)
        assert len(coarser - finer) == 1  # two groups became one
        assert all(any(part <= whole for whole in coarser) for part in finer)
        finer = coarser


def test_frames_do_not_mix_before_each_is_one_token():
    prob = torch.rand(2, 3 * 4 * 5, generator=torch.Generator().manual_seed(0))
    order = order_merges(prob, (3, 4, 5))
    for count in range(3, 61):
        for part in partition(order, count, 1):
            assert len({cell // 20 for cell in part}) == 1
    assert len({cell // 20 for part in partition(order, 2, 1) for cell in part}) == 3


def test_at_most_one_block_is_merged_in_part():
    h, w = 8, 8
    order = order_merges(torch.rand(1, 64, generator=torch.Generator().manual_seed(3)), (1, h, w))
    for count in range(1, 65):
        broken = 0
        for part in partition(order, count):
            ys, xs = [c // w for c in part], [c % w for c in part]
            edge = max(max(ys) - min(ys), max(xs) - min(xs)) + 1
            aligned = len(part) == edge**2 and min(ys) % edge == 0 and min(xs) % edge == 0
            broken += not (aligned and edge & (edge - 1) == 0)
        assert broken <= 1


def test_the_most_probable_cell_stands_for_its_block():
    prob = torch.full((1, 16), 0.2)
    prob[0, 7] = 0.9
    order = order_merges(prob, (1, 4, 4))
    for count in (1, 4, 7):
        assert bool((order.places() < count)[0, 7])


def test_among_equal_cells_the_first_blocks_stay_and_the_one_near_the_centre_stands_for_them():
    order = order_merges(torch.full((1, 16), 0.5), (1, 4, 4))
    kept = order.places() < 13
    assert kept.view(4, 4).int().tolist() == [
        [1, 1, 1, 1],
        [1, 1, 1, 1],
        [1, 1, 1, 0],
        [1, 1, 0, 0],
    ]
    assert (order.places() < 1)[0].nonzero().tolist() == [[10]]  # row 2, column 2


def test_a_part_of_a_block_is_a_neighbour_of_its_representative():
    order = order_merges(torch.full((1, 4), 0.5), (1, 2, 2))
    assert order.cells.tolist() == [[0, 3, 1, 2]]


@pytest.mark.parametrize("length", range(1, 20))
def test_a_representative_is_nearest_to_the_centre_of_its_block(length):
    levels = (length - 1).bit_length()
    table = axis_representatives(length, levels)
    assert len(set(table[-1])) == 1
    for level in range(1, levels + 1):
        for first in range(0, length, 1 << level):
            block = range(first, min(first + (1 << level), length))
            (chosen,) = {table[level][place] for place in block}
            inner = sorted({table[level - 1][place] for place in block})
            centre = (block[0] + block[-1]) / 2
            assert abs(chosen - centre) == min(abs(place - centre) for place in inner)
            assert chosen in inner
