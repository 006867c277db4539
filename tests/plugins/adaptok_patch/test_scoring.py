import torch
from adaptok_patch import quadtree
from adaptok_patch.blocks import lay_blocks
from adaptok_patch.merging import order_merges
from adaptok_patch.scoring import score_cells
from hypothesis import given, settings
from hypothesis import strategies as st

LEVELS = {2: 1, 4: 2, 8: 3}


def make_maps(h, w, scales, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        scale: 8 * torch.rand(2, -(-h // scale), -(-w // scale), generator=generator)
        for scale in scales
    }


def run(maps, thresholds, h, w):
    excess = {
        LEVELS[scale]: maps[scale] - limit
        for scale, limit in zip(sorted(maps), thresholds, strict=True)
    }
    prob, natural = score_cells(excess, lay_blocks(h, w))
    return prob.flatten(1), natural.flatten(1)


def group(tokens):
    """Number groups by their first cells, whatever token stands for them."""
    numbers = {}
    return [numbers.setdefault(token, len(numbers)) for token in tokens]


@given(
    st.integers(1, 13),
    st.integers(1, 13),
    st.sampled_from([(2,), (2, 4), (4,), (2, 8), (2, 4, 8)]),
    st.floats(-3, 5),
    st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_probabilities_hold_the_quadtrees_of_all_shifted_thresholds(h, w, scales, shift, seed):
    maps = make_maps(h, w, scales, seed)
    limits = [4.0, 3.5, 3.0][: len(scales)]
    prob, natural = run(maps, limits, h, w)
    assert ((prob >= 0) & (prob <= 1)).all()
    order = order_merges(prob, (1, h, w))
    shifted = [limit + shift for limit in limits]
    for moved, thresholds in ((False, limits), (True, shifted)):
        leaves = quadtree(maps, thresholds, (h, w))
        for sample in range(2):
            count = int(leaves.counts[sample])
            if not moved:
                assert natural[sample].sum() == count
                assert torch.equal(prob[sample] >= 0.5, natural[sample])
            tokens = order.find_tokens(order.places() < count)[sample].tolist()
            assert group(tokens) == group(leaves.leaf[sample].flatten().tolist())


def test_what_no_threshold_merges_comes_last_and_fine_first():
    h, w = 5, 7
    prob, natural = run(make_maps(h, w, (2, 4), 0), (-1.0, -1.0), h, w)
    assert natural.all()  # thresholds that nothing is below
    leaves_at = lay_blocks(h, w).leaves_at
    cut = torch.zeros(h, w, dtype=torch.bool)
    cut[4], cut[:, 6] = True, True
    forced = (leaves_at > 2) | cut.flatten()
    # of the blocks of four by four only the first is whole
    coarse = (leaves_at == 2) & (torch.arange(h * w) % w > 3)
    assert (prob[:, forced | coarse] > 0.9).all()
    assert (prob[:, ~(forced | coarse)] < 0.9).all()
    for level in range(1, 3):
        mine, above = leaves_at == level, leaves_at > level
        assert (prob[:, mine & forced] <= prob[:, above & (forced | coarse)].amin()).all()


def test_blocks_that_only_a_budget_merges_go_by_what_is_in_them():
    maps = {2: torch.tensor([[[1.0, 7.0, 1.0, 1.0], [1.0, 7.0, 7.0, 1.0]]])}
    prob, _ = run(maps, (8.0,), 4, 8)
    order = order_merges(prob, (1, 4, 8))
    places = (order.places() < 5)[0].view(4, 8)
    assert places[:, :4].sum() + places[:, 4:].sum() == 5
    assert places[:, 4:].sum() == 1  # the right half holds less


def test_an_infinite_entropy_never_merges_of_itself():
    maps = {2: torch.tensor([[[0.0, torch.inf]]])}
    prob, natural = run(maps, (8.0,), 2, 4)
    assert natural.int().tolist() == [[1, 0, 1, 1, 0, 0, 1, 1]]
    assert prob.isfinite().all()
