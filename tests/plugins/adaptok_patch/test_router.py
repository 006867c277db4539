import pytest
import torch
from adaptok_patch import quadtree
from adaptok_patch.chunker import AptChunker
from adaptok_patch.features import NOISE, default_thresholds, feature_entropy
from adaptok_patch.router import AptRouter

import adaptok
from adaptok import Budget, Context, Tokens
from adaptok.errors import ConfigError, ShapeError

GRIDS = [(4, 6), (5, 7), (1, 9), (2, 5, 6)]


def make_fields(grid, width=32, seed=0):
    """Features whose roughness grows from the first row of a frame to the last, and by sample."""
    *_, h, w = grid
    n = torch.Size(grid).numel()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, n, width, generator=generator)
    smooth = torch.randn(3, 1, width, generator=generator)
    row = torch.arange(n) % (h * w) // w
    share = (row / h)[None, :, None] ** torch.tensor([0.5, 2.0, 4.0])[:, None, None]
    return Tokens(smooth + share * noise, grid)


def entropy_by_loop(x, h, w, edge, floor):
    """Return the mean bits of the cells of each block of one frame."""
    z = x - x.mean(-1, keepdim=True)
    z = z / z.square().mean(-1, keepdim=True).sqrt()
    bits = torch.zeros(h, w)
    for y in range(h):
        for c in range(w):
            near = [(y - 1, c), (y + 1, c), (y, c - 1), (y, c + 1)]
            found = [
                (z[y * w + c] - z[r * w + k]).square().mean()
                for r, k in near
                if 0 <= r < h and 0 <= k < w
            ]
            bits[y, c] = 0.5 * torch.log2(1 + sum(found) / len(found) / floor)
    return [
        [float(bits[y : y + edge, c : c + edge].mean()) for c in range(0, w, edge)]
        for y in range(0, h, edge)
    ]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_entropy_of_features_is_that_of_loops(grid):
    tokens = make_fields(grid)
    frames, h, w = (1, *grid)[-3:]
    found = feature_entropy(tokens.x, (frames, h, w), (1, 2, 4))
    for scale in (2, 4):
        for frame in range(3 * frames):
            own = tokens.x.view(3 * frames, h * w, -1)[frame]
            expected = torch.tensor(entropy_by_loop(own, h, w, scale, NOISE))
            assert torch.allclose(found[scale][frame], expected, atol=1e-4)


def test_scale_and_offset_of_a_cell_say_nothing():
    tokens = make_fields((5, 7))
    cell = torch.rand(3, 35, 1) + 0.5
    moved = feature_entropy(7 * cell * tokens.x + 30 * cell, (1, 5, 7), (1, 2))
    assert torch.allclose(moved[2], feature_entropy(tokens.x, (1, 5, 7), (1, 2))[2], atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("thresholds", [(3.2, 2.5), (3.7, 3.3), (1.5, 3.5)])
def test_the_natural_patches_are_the_quadtree_of_the_entropies(grid, thresholds):
    tokens = make_fields(grid)
    frames, h, w = (1, *grid)[-3:]
    routing = AptRouter(thresholds=thresholds)(tokens, Context())
    entropy = feature_entropy(tokens.x, (frames, h, w), (1, 2, 4))
    leaves = quadtree(entropy, thresholds, (h, w))
    counts = leaves.counts.view(3, frames).sum(1)
    assert routing.natural_mask.sum(1).equal(counts)
    _, plan = AptChunker(32, "packed")(tokens, routing, Budget())
    assert plan.computed.equal(counts)
    token = plan.provenance.token.view(3 * frames, h * w)
    leaf = leaves.leaf.flatten(1)
    for frame in range(3 * frames):  # the same groups, whatever they are called
        same = token[frame][:, None] == token[frame]
        assert same.equal(leaf[frame][:, None] == leaf[frame])


def test_samples_keep_different_counts():
    natural = AptRouter(thresholds=(3.0, 3.0))(make_fields((8, 9)), Context()).natural_mask.sum(1)
    assert natural.max() >= 2 * natural.min()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_judged_in_float32(dtype):
    tokens = make_fields((8, 8))
    half = Tokens(tokens.x.to(dtype), (8, 8))
    again = Tokens(half.x.float(), (8, 8))
    router = AptRouter()
    assert router(half, Context()).keep_prob.equal(router(again, Context()).keep_prob)


def test_flat_samples_are_a_few_patches():
    routing = AptRouter()(Tokens(torch.ones(2, 64, 16), (8, 8)), Context())
    assert routing.natural_mask.sum(1).tolist() == [4, 4]
    assert routing.keep_prob.isfinite().all()


def test_another_chunker_keeps_the_same_cells():
    vit = adaptok.wrap(adaptok.testing.make_vit(), "dc", router="apt", budget=0.5)
    with adaptok.trace(vit) as seen:
        vit(torch.randn(2, 3, 32, 48))
    assert seen.steps[0].kept.tolist() == [12, 12]


def test_thresholds_of_further_scales():
    assert len(default_thresholds((1, 2, 4, 8, 16))) == 4
    assert default_thresholds((1, 4)) == default_thresholds((1, 2, 4))[1:]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": (1, 2, 6)}, r"powers of two from fine to coarse, .* got \(1, 2, 6\)"),
        ({"scales": (1, 4, 2)}, "powers of two"),
        ({"thresholds": (1.0,)}, r"one for each of the scales \(2, 4\)"),
        ({"thresholds": (1.0, float("nan"))}, "thresholds are numbers of bits"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        AptRouter(**options)


def test_bad_input():
    x = torch.randn(2, 24, 8)
    with pytest.raises(ShapeError, match=r"needs a grid .* got None"):
        AptRouter()(Tokens(x), Context())
    with pytest.raises(ShapeError, match="let it run before tokens are taken away"):
        AptRouter()(Tokens(x, (4, 6), valid=torch.ones(2, 24, dtype=torch.bool)), Context())
