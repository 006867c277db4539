import math

import pytest
import torch
from adaptok_graph import contraction
from adaptok_graph.contraction import MergeTree, contract_edges, run_contraction
from adaptok_graph.similarity import sketch_cells
from graph_oracles import (
    assert_segments,
    cut_by_loop,
    lost_share,
    members_of,
    merge_by_rounds,
    merge_greedily,
    neighbours_by_loop,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def make_field(grid, b=3, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = math.prod(grid)
    steps = torch.randn(b, n, k, generator=generator)
    return steps + 0.4 * steps.cumsum(1)


def make_reluctance(b, n, seed=0):
    generator = torch.Generator().manual_seed(seed + 1)
    return 10 ** torch.rand(b, n, generator=generator)


def segment(z, grid, counts, reluctance=None, neighbours=4):
    b, n, _ = z.shape
    counts = torch.as_tensor(counts).expand(b)
    r = torch.ones(b, n) if reluctance is None else reluctance
    return contract_edges(z, r, grid, neighbours, counts).cut(counts)


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize("grid", [(4, 6), (1, 13), (2, 2, 4)])
def test_merges_are_those_of_a_loop(grid, neighbours):
    z, n = make_field(grid), math.prod(grid)
    r = make_reluctance(3, n)
    pairs = neighbours_by_loop(grid, neighbours)
    loops = [merge_by_rounds(z[sample], r[sample], pairs) for sample in range(3)]
    for count in (1, 2, n // 4, n // 2, n - 2):
        found = segment(z, grid, count, r, neighbours)
        for sample, merges in enumerate(loops):
            assert members_of(found[sample]) == cut_by_loop(merges, n, count)


def test_reluctant_cells_stay_alone():
    grid = (4, 6)
    z, r = make_field(grid), torch.ones(3, 24)
    r[:, [3, 8, 21]] = 1e3
    found = segment(z, grid, 8, r)
    for sample in range(3):
        alone = [members for members in members_of(found[sample]) if len(members) == 1]
        assert {(3,), (8,), (21,)} <= set(map(tuple, alone))


def test_little_more_is_lost_than_by_a_greedy_merge():
    grid = (5, 6)
    z = make_field(grid)
    pairs = neighbours_by_loop(grid, 4)
    for count in (15, 6):
        found = segment(z, grid, count)
        for sample in range(3):
            names = torch.zeros(30, dtype=torch.long)
            greedy = merge_greedily(z[sample], torch.ones(30), pairs, count)
            for i, members in enumerate(greedy):
                names[members] = i
            assert lost_share(z[sample], found[sample]) < 1.1 * lost_share(z[sample], names)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(4, 5), (1, 9), (7, 1), (2, 3, 3), (1, 1)]),
    st.sampled_from([4, 8]),
    st.sampled_from(["noise", "flat", "two", "ramp", "huge"]),
    st.data(),
)
def test_any_count_is_met_exactly_by_connected_segments(grid, neighbours, kind, data):
    n = math.prod(grid)
    counts = data.draw(st.lists(st.integers(1, n), min_size=1, max_size=3))
    z = make_field(grid, b=len(counts), seed=data.draw(st.integers(0, 99)))
    if kind == "flat":
        z = torch.zeros_like(z)
    elif kind == "two":
        z = (z > 0).float()
    elif kind == "ramp":
        z = (torch.arange(n).float() ** 2)[None, :, None].expand_as(z).clone()
    elif kind == "huge":
        z = z * 1e15
    r = make_reluctance(len(counts), n)
    found = segment(z, grid, counts, r, neighbours)
    pairs = neighbours_by_loop(grid, neighbours)
    for sample, count in enumerate(counts):
        assert_segments(found[sample], pairs, count)


def test_late_rounds_follow_every_best_edge(monkeypatch):
    grid = (6, 7)
    z = make_field(grid)
    monkeypatch.setattr(contraction, "MATCHING_ROUNDS", 0)
    for count in (1, 5, 21, 41):
        found = segment(z, grid, count, make_reluctance(3, 42))
        for sample in range(3):
            assert_segments(found[sample], neighbours_by_loop(grid, 4), count)


@pytest.mark.parametrize("kind", ["flat", "ramp"])
def test_rounds_are_few_where_costs_tie_or_rise_steadily(kind, monkeypatch):
    turns = []
    merge = contraction.Regions.merge

    def count_turns(self, cost, turn, matching):
        turns.append(turn)
        merge(self, cost, turn, matching)

    monkeypatch.setattr(contraction.Regions, "merge", count_turns)
    n = 300
    z = torch.zeros(1, n, 2)
    if kind == "ramp":  # each gap is larger than the one before: one pair a round
        z[0, :, 0] = (torch.arange(n).float() ** 2) / 100
    found = segment(z, (1, n), 3)
    assert len(set(found[0].tolist())) == 3
    assert max(turns) < contraction.MATCHING_ROUNDS + 10


def test_a_cut_of_fewer_segments_joins_those_of_a_finer_one():
    grid = (6, 8)
    tree = contract_edges(make_field(grid), make_reluctance(3, 48), grid, 4, torch.ones(3).long())
    coarser = None
    for count in range(1, 49):
        found = tree.cut(torch.full((3,), count))
        if coarser is not None:
            for sample in range(3):
                pairs = set(zip(found[sample].tolist(), coarser[sample].tolist(), strict=True))
                assert len(pairs) == count  # each finer segment lies in one coarser one
        coarser = found


def test_a_limit_counts_the_merges_below_it():
    z = torch.tensor([0.0, 0.1, 0.2, 5.0, 5.1, 9.0])[None, :, None].repeat(2, 1, 1)
    z[1] *= 0.01
    tree = contract_edges(z, torch.ones(2, 6), (1, 6), 4, torch.tensor([6, 6]), limit=0.1)
    assert tree.count_below(0.1).tolist() == [3, 1]
    assert members_of(tree.cut(torch.tensor([3, 1]))[0]) == [[0, 1, 2], [3, 4], [5]]


def test_a_sample_is_cut_as_if_it_were_alone():
    grid = (7, 9)
    z, r = make_field(grid), make_reluctance(3, 63)
    counts = torch.tensor([3, 40, 17])
    together = segment(z, grid, counts, r)
    for sample in range(3):
        one = slice(sample, sample + 1)
        assert torch.equal(segment(z[one], grid, counts[one], r[one]), together[one])


def test_segments_follow_what_they_are_made_of():
    grid = (12, 12)
    generator = torch.Generator().manual_seed(0)
    areas = torch.zeros(12, 12, dtype=torch.long)
    areas[:5, 4:], areas[7:, :9] = 1, 2  # two rectangles on a ground
    x = torch.randn(3, 16, generator=generator)[areas.flatten()][None]
    x = x + 0.05 * torch.randn(x.shape, generator=generator)
    found = segment(x, grid, 3)[0]
    assert len(set(zip(found.tolist(), areas.flatten().tolist(), strict=True))) == 3


def test_less_is_lost_than_by_blocks_of_equal_size():
    grid = (16, 16)
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(1, 8, 5, 5, generator=generator)
    z = torch.nn.functional.interpolate(coarse, grid, mode="bilinear").flatten(2).mT[0]
    z = z + 0.2 * torch.randn(z.shape, generator=generator)
    blocks = (torch.arange(16)[:, None] // 2 * 8 + torch.arange(16) // 2).flatten()
    found = segment(z[None], grid, 64)[0]
    assert lost_share(z, found) < 0.75 * lost_share(z, blocks)


def test_the_operation_has_the_right_shapes_in_a_graph():
    z, counts = make_field((3, 4)), torch.tensor([3, 4, 5])
    torch.library.opcheck(run_contraction, (z, torch.ones(3, 12), [3, 4], 4, counts, -1.0))


def test_a_tree_without_merges_leaves_every_cell_alone():
    cells = torch.arange(4).expand(2, 4)
    tree = MergeTree(cells, torch.full((2, 4), math.inf), torch.zeros(2, 4, dtype=torch.long))
    assert torch.equal(tree.cut(torch.tensor([4, 4])), cells)


def test_a_sketch_keeps_distances():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 60, 700, generator=generator) * torch.tensor([1.0, 1e-3])[:, None, None]
    x[:, 30:] = 0.5 * x[:, :30] + 0.5 * x[:, 30:]
    exact, short = sketch_cells(x, 700), sketch_cells(x)
    assert short.shape == (2, 60, 32)
    ratio = torch.pdist(short[0]).square() / torch.pdist(exact[0]).square()
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.15)
    assert ratio.std().item() < 0.3
    assert short.square().sum(-1).mean(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-3)


def test_cells_that_are_alike_have_no_features():
    x = torch.cat([torch.zeros(1, 6, 40), torch.full((1, 6, 40), 0.7)])
    assert not sketch_cells(x).any()
    assert not sketch_cells(torch.randn(1, 1, 40).expand(1, 6, 40)).any()
    assert bool(sketch_cells(torch.tensor([[[1.0, math.nan], [1.0, 2.0]]])).isfinite().all())
