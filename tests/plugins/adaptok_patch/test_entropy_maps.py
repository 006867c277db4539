import copy

import adaptok_patch
import pytest
import torch
from adaptok_patch import entropy_maps, measure_entropy, quadtree
from adaptok_patch.router import AptRouter

import adaptok
from adaptok.errors import ConfigError, NotWrappedError, ShapeError
from adaptok.testing import make_vit

GRID, PATCH = (8, 9), 8


def make_pictures():
    """Pictures in [0, 1] whose left part is flat: a narrow one, half of it, nearly all."""
    images = torch.rand(3, 3, PATCH * GRID[0], PATCH * GRID[1])
    for image, edge in zip(images, (8, 32, 64), strict=True):
        image[..., :edge] = 0.4
    return images


def make_wrapped(**options):
    chunker = {"name": "apt", "layout": "packed"}
    return adaptok.wrap(make_vit(), chunker, **options)


def find_router(model):
    (router,) = (module for module in model.modules() if isinstance(module, AptRouter))
    return router


def test_patches_follow_the_pixels():
    images = make_pictures()
    maps = measure_entropy(images, PATCH, peak=1.0)
    vit = make_wrapped()
    with entropy_maps(vit, maps, (6.0, 5.0)), adaptok.trace(vit) as seen:
        vit(2 * images - 1)
    leaves = quadtree(maps, (6.0, 5.0), GRID)
    assert seen.steps[0].kept.equal(leaves.counts)
    assert leaves.counts.max() >= 2 * leaves.counts.min()
    token = seen.steps[0].provenance.token
    leaf = leaves.leaf.flatten(1)
    assert (token[:, :, None] == token[:, None]).equal(leaf[:, :, None] == leaf[:, None])


def test_an_exact_budget_is_exact_with_maps_too():
    images = make_pictures()
    vit = make_wrapped(budget=0.3)
    with entropy_maps(vit, measure_entropy(images, PATCH, peak=1.0)), adaptok.trace(vit) as seen:
        vit(images)
    assert seen.steps[0].kept.tolist() == [22, 22, 22]


def test_nothing_stays_behind():
    images = make_pictures()
    vit = make_wrapped()
    before = vit(images)
    maps = measure_entropy(images, PATCH, peak=1.0)
    with entropy_maps(vit, maps):
        outer = find_router(vit).given
        with entropy_maps(vit, maps, (1.0, 1.0)):
            assert find_router(vit).given.thresholds == (1.0, 1.0)
        assert find_router(vit).given is outer
        assert not torch.equal(vit(images), before)
    assert find_router(vit).given is None
    with pytest.raises(ShapeError, match="scale 2"), entropy_maps(vit, maps):
        vit(images[:1])
    assert find_router(vit).given is None
    assert torch.equal(vit(images), before)
    assert torch.equal(copy.deepcopy(vit)(images), before)


def test_maps_without_the_finest_scale_and_of_other_scales():
    vit = make_wrapped(router={"name": "apt", "scales": (1, 4)})
    images = make_pictures()
    with entropy_maps(vit, measure_entropy(images, PATCH, (1, 4), peak=1.0), (5.0,)):
        vit(images)
    with (
        pytest.raises(ConfigError, match=r"of the scales \(2, 4\), and the router has \(4,\)"),
        entropy_maps(vit, measure_entropy(images, PATCH, peak=1.0)),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"one for each of the scales \(4,\)"),
        entropy_maps(vit, measure_entropy(images, PATCH, (1, 4), peak=1.0)),
    ):
        pass


def test_maps_of_another_batch_or_picture_are_refused():
    images = make_pictures()
    vit = make_wrapped()
    maps = measure_entropy(images, PATCH, peak=1.0)
    with entropy_maps(vit, maps):
        with pytest.raises(ShapeError, match=r"of scale 2 needs the shape \(2, 4, 5\) .* got \(3,"):
            vit(images[:2])
        with pytest.raises(
            ShapeError, match=r"needs the shape \(3, 4, 4\) for 3 samples of 8 by 8"
        ):
            vit(images[..., :64])


def test_a_model_without_the_router_is_refused():
    maps = measure_entropy(make_pictures(), PATCH, peak=1.0)
    for model in (make_vit(), adaptok.wrap(make_vit(), "dc", router="norm", budget=0.5)):
        with pytest.raises(NotWrappedError, match='has no router "apt"'), entropy_maps(model, maps):
            pass


def test_one_graph_serves_all_maps():
    vit = adaptok.wrap(make_vit(), "apt", budget=0.5)
    images = torch.rand(2, 3, 32, 48)
    images[:, :, :, :24] = 0.5
    flipped = images.flip(-1)
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(vit, fullgraph=True, backend=count)
    with torch.no_grad():
        for source in (images, flipped, torch.rand(2, 3, 32, 48)):
            maps = measure_entropy(source, 8, peak=1.0)
            with entropy_maps(compiled, maps):
                found, expected = compiled(images), vit(images)
            assert torch.allclose(found, expected, atol=1e-5)
        assert len(graphs) == 1
        assert torch.allclose(compiled(images), vit(images), atol=1e-5)
    torch.compiler.reset()


def test_video_takes_one_map_a_frame():
    router = AptRouter()
    tokens = adaptok.Tokens(torch.randn(2, 3 * 16, 8), grid=(3, 4, 4))
    maps = {2: torch.full((6, 2, 2), 9.0), 4: torch.full((6, 1, 1), 9.0)}
    maps[4][1] = 0.0  # the second frame of the first video is flat
    router.given = adaptok_patch.given.GivenEntropy(maps, (6.0, 4.0))
    natural = router(tokens, adaptok.Context()).natural_mask.view(2, 3, 16).sum(2)
    assert natural.tolist() == [[16, 1, 16], [16, 16, 16]]


def test_unknown_names_of_the_package():
    assert "entropy_maps" in dir(adaptok_patch)
    with pytest.raises(AttributeError, match="no attribute 'entropymaps'"):
        _ = adaptok_patch.entropymaps
