import math

import pytest
import torch
from adaptok_graph.grids import repeat_edges
from adaptok_graph.router import GraphRouter, measure_difference
from adaptok_graph.similarity import sketch_cells
from graph_oracles import neighbours_by_loop

from adaptok import Context, Tokens
from adaptok.errors import ConfigError, DtypeError, ShapeError
from adaptok.testing import fill_weights


def route(router, x, grid):
    return router(Tokens(x, grid), Context()).keep_prob


@pytest.mark.parametrize("neighbours", [4, 8])
@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 2), (1, 1)])
def test_the_prior_is_the_distance_to_the_mean_of_the_neighbours(grid, neighbours):
    n = math.prod(grid)
    x = torch.randn(2, n, 20)
    found = measure_difference(x, repeat_edges(x, grid, 2, neighbours))
    z = sketch_cells(x)
    pairs = neighbours_by_loop(grid, neighbours)
    for sample in range(2):
        for i in range(n):
            around = [j for a, j in pairs if a == i]
            mean = z[sample, around].mean(0) if around else torch.zeros(20)
            e = float((z[sample, i] - mean).norm())
            assert found[sample, i].item() == pytest.approx(e / (1 + e), abs=1e-5)


@pytest.mark.parametrize("kind", ["sage", "gat", "graph"])
@pytest.mark.parametrize("grid", [(4, 6), (2, 3, 4), (1, 24)])
def test_a_fresh_one_keeps_every_cell_and_ranks_an_outlier_first(kind, grid):
    x = torch.randn(1, 1, 32) + 0.05 * torch.randn(3, 24, 32)
    x[:, 17] = torch.randn(3, 32)
    prob = route(GraphRouter(32, kind=kind), x, grid)
    assert (prob > 0.8).all()
    assert prob.argmax(1).tolist() == [17, 17, 17]
    plain = route(GraphRouter(32, kind=kind, prior=None, bias=1.5), x, grid)
    assert torch.allclose(plain, torch.full_like(plain, 1.5).sigmoid())


@pytest.mark.parametrize("kind", ["sage", "gat", "graph"])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_cell_sees_as_far_as_there_are_layers(kind, layers):
    router = fill_weights(GraphRouter(16, layers=layers, kind=kind, prior=None)).eval()
    x = torch.randn(1, 11, 16)
    changed = x.clone()
    changed[:, 0] += torch.randn(16)
    difference = (route(router, x, (1, 11)) - route(router, changed, (1, 11))).abs()[0] > 1e-7
    assert difference[: layers + 1].all()
    assert not difference[layers + 1 :].any()


def test_frames_of_a_video_see_each_other():
    router = fill_weights(GraphRouter(16, layers=1, prior=None)).eval()
    x = torch.randn(1, 12, 16)
    changed = x.clone()
    changed[:, 0] += torch.randn(16)
    difference = (route(router, x, (3, 2, 2)) - route(router, changed, (3, 2, 2))).abs()[0] > 1e-7
    # itself, its two neighbours in the frame, and its place in the next frame
    assert difference.nonzero().flatten().tolist() == [0, 1, 2, 4]


@pytest.mark.parametrize("kind", ["sage", "gat", "graph"])
def test_a_gradient_reaches_every_layer(kind):
    router = fill_weights(GraphRouter(32, layers=3, kind=kind))
    weights = torch.randn(2, 24)
    (route(router, torch.randn(2, 24, 32), (4, 6)) * weights).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_it_learns_what_only_neighbours_tell():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 24, 8, generator=generator)
    left = torch.roll(x.view(16, 4, 6, 8), 1, 2)[..., 0].flatten(1)  # of the cell to the left
    right = torch.roll(x.view(16, 4, 6, 8), -1, 2)[..., 0].flatten(1)
    wanted = (left + right > 0).float()
    router = GraphRouter(8, layers=1, prior=None, bias=0.0)
    optimiser = torch.optim.AdamW(router.parameters(), 3e-2)
    for _ in range(120):
        loss = torch.nn.functional.binary_cross_entropy(route(router, x, (4, 6)), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.6  # 0.69 is chance


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers is at least 1, got 0"),
        ({"kind": "gcn"}, "kind is one of sage, gat, graph, got 'gcn'"),
        ({"neighbours": 5}, "neighbours is 4 or 8, got 5"),
        ({"prior": "norm"}, "prior is \"neighbours\" or None, got 'norm'"),
        ({"bias": math.inf}, "bias is a finite number, got inf"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GraphRouter(16, **options)


def test_wrong_tokens_are_refused():
    router = GraphRouter(16)
    with pytest.raises(ShapeError, match="made for 16 features of a token, and 8 came"):
        route(router, torch.randn(1, 6, 8), (2, 3))
    with pytest.raises(ShapeError, match="one token for each cell of a known grid"):
        router(Tokens(torch.randn(1, 6, 16)), Context())
    with pytest.raises(ShapeError, match="without padding"):
        router(
            Tokens(torch.randn(1, 6, 16), (2, 3), valid=torch.ones(1, 6, dtype=torch.bool)),
            Context(),
        )


def test_it_stays_in_float32():
    router = GraphRouter(16).to(torch.bfloat16)
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    router.logit.weight = torch.nn.Parameter(router.logit.weight.half())
    with pytest.raises(DtypeError, match=r"float32 only, and its weights are torch\.float16"):
        route(router, torch.randn(1, 6, 16), (2, 3))
