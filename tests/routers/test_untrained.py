"""What each of the routers without weights promises."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routers.fields import ROUTER_GRIDS, make_noise

from adaptok import Budget, Context, Router, Tokens
from adaptok.budgets import apply_budget, rank_cells
from adaptok.errors import BudgetError, ConfigError, ShapeError
from adaptok.routers import (
    CosineRouter,
    EntropyRouter,
    NormRouter,
    PredictabilityRouter,
    RandomRouter,
)
from adaptok.routers.untrained import find_directions, standardise_cells
from adaptok.tokens import pack

MAKERS = {
    "predictability": PredictabilityRouter,
    "cosine": CosineRouter,
    "cosine as is": lambda: CosineRouter(centre=False),
    "entropy": EntropyRouter,
    "norm": NormRouter,
    "smallest norm": lambda: NormRouter(smallest=True),
    "random": lambda: RandomRouter(seed=5),
    "random anew": RandomRouter,
}
READERS = [name for name in MAKERS if "random" not in name]  # those that look at the features
each_router = pytest.mark.parametrize("name", MAKERS)
each_reader = pytest.mark.parametrize("name", READERS)


def route(name, x, grid):
    return MAKERS[name]()(Tokens(x, grid), Context())


@each_router
@pytest.mark.parametrize("grid", ROUTER_GRIDS)
def test_cells_get_spread_probabilities_and_a_budget_keeps_the_best(name, grid):
    routing = route(name, make_noise(grid), grid)
    prob = routing.keep_prob
    assert prob.shape == (3, math.prod(grid))
    assert prob.dtype == torch.float32
    assert ((prob >= 0) & (prob <= 1)).all()
    assert (prob.std(1) > 1e-4).all()
    mask = apply_budget(routing, Budget(keep=0.5)).keep_mask
    for sample in range(3):
        assert prob[sample][mask[sample]].min() >= prob[sample][~mask[sample]].max()


@each_router
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2**20))
def test_any_grid_gives_a_valid_ranking(name, grid, seed):
    n = math.prod(grid)
    prob = route(name, make_noise(tuple(grid), seed=seed), tuple(grid)).keep_prob
    assert ((prob >= 0) & (prob <= 1)).all()
    assert rank_cells(prob).sort(1).values.tolist() == [list(range(n))] * 3


@pytest.mark.parametrize("name", [*READERS, "random"])
@pytest.mark.parametrize("grid", ROUTER_GRIDS)
def test_a_sample_does_not_depend_on_its_batch_mates(name, grid):
    x = make_noise(grid, b=4)
    together = route(name, x, grid).keep_prob
    for sample in range(4):
        alone = route(name, x[sample : sample + 1], grid).keep_prob
        assert torch.allclose(alone[0], together[sample], rtol=0, atol=1e-6)
        assert torch.equal(rank_cells(alone)[0], rank_cells(together)[sample])
    if name != "random":
        assert (together[0] - together[1]).abs().max() > 0.01  # the samples do differ


@each_router
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-30, 1e4])
def test_cells_that_are_all_equal_get_a_valid_ranking(name, value):
    x = torch.full((2, 35, 8), value)
    x[1] *= torch.arange(1.0, 9.0)
    prob = route(name, x, (5, 7)).keep_prob
    assert ((prob >= 0) & (prob <= 1)).all()
    if "random" not in name:
        assert torch.allclose(prob, prob[:, :1].expand_as(prob), rtol=0, atol=1e-6)
    if name in ("predictability", "norm", "smallest norm"):
        assert rank_cells(prob).tolist() == [list(range(35))] * 2  # ties go by index


@each_reader
def test_remainders_of_rounding_are_no_content(name):
    flat = torch.randn(1, 1, 16).expand(1, 60, 16)
    x = flat * (1 + 1e-7 * torch.randn(1, 60, 16))
    assert not torch.equal(x, flat)
    routing = route(name, x, (6, 10))
    assert routing.keep_prob.std() < 0.02
    assert routing.natural_mask is None or not routing.natural_mask.any()


@each_reader
def test_channels_that_are_all_equal_say_nothing(name):
    x = torch.rand(1, 60, 1).mul(100).expand(1, 60, 7)
    prob = route(name, x, (6, 10)).keep_prob
    if "norm" in name:
        assert prob.std() > 0.05
    else:
        assert prob.std() < 0.05


@each_router
def test_one_cell_is_kept(name):
    routing = route(name, make_noise((1, 1)), (1, 1))
    assert torch.isfinite(routing.keep_prob).all()
    assert apply_budget(routing, Budget(keep=0.3)).kept.tolist() == [1, 1, 1]


@each_reader
def test_half_precision_is_computed_in_float32(name):
    x = make_noise((5, 7)).bfloat16()
    expected = route(name, x.float(), (5, 7)).keep_prob
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = route(name, x, (5, 7)).keep_prob
    for ours in (route(name, x, (5, 7)).keep_prob, under_autocast):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


@each_router
@pytest.mark.parametrize("grid", [(3, 5), (2, 3, 4)])
def test_a_router_compiles_to_one_graph(name, grid):
    torch.compiler.reset()
    router, x = MAKERS[name](), make_noise(grid)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    routing = compiled(Tokens(x, grid), Context())
    torch.manual_seed(1)
    expected = router(Tokens(x, grid), Context())
    assert torch.allclose(routing.keep_prob, expected.keep_prob, rtol=0, atol=1e-6)
    assert (routing.natural_mask is None) == (expected.natural_mask is None)


@each_reader
def test_gradients_are_numbers_even_where_all_cells_are_equal(name):
    noise = make_noise((3, 4))
    for x in (noise, torch.zeros(1, 12, 4), torch.ones(1, 12, 4)):
        x = x.clone().requires_grad_()
        prob = route(name, x, (3, 4)).keep_prob
        prob[:, ::2].sum().backward()
        assert torch.isfinite(x.grad).all()
        if len(x) == 3:
            assert (x.grad.abs().amax((1, 2)) > 0).all()


@each_router
def test_a_router_has_no_weights_and_can_be_copied(name):
    router = MAKERS[name]()
    assert isinstance(router, Router)
    assert not list(router.parameters())
    assert not router.state_dict()
    assert router.compilable
    assert repr(copy.deepcopy(router)) == repr(router)


@each_router
def test_routers_that_only_rank_need_a_budget(name):
    routing = route(name, make_noise((3, 4)), (3, 4))
    only_ranks = "norm" in name or "random" in name
    assert MAKERS[name]().needs_budget == only_ranks
    assert routing.threshold == (None if only_ranks else 0.5)
    if only_ranks:
        with pytest.raises(BudgetError, match="only ranks cells"):
            apply_budget(routing, Budget())
    else:
        assert torch.equal(routing.natural_mask, routing.keep_prob > 0.5)


@each_router
def test_tokens_that_are_not_the_cells_of_a_grid_are_refused(name):
    router, x = MAKERS[name](), torch.randn(2, 6, 8)
    owner = type(router).__name__
    cells = torch.arange(6).expand(2, 6)
    for tokens, message in (
        (Tokens(x), "needs a grid, got tokens without one"),
        (pack(Tokens(x, (2, 3))), "needs dense tokens .* unpack"),
        (Tokens(x, (2, 3), valid=torch.ones(2, 6, dtype=torch.bool)), "got tokens with valid"),
        (Tokens(x, (4, 4), cells=cells), "got tokens with cells"),
    ):
        with pytest.raises(ShapeError, match=f"{owner} {message}|{owner} .*{message}"):
            router(tokens, Context())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PredictabilityRouter(falloff=-1), "falloff is a finite number of at least 0"),
        (lambda: PredictabilityRouter(falloff="2"), "falloff .* got '2'"),
        (lambda: CosineRouter(falloff=math.inf), "falloff .* got inf"),
        (lambda: CosineRouter(falloff=True), "falloff .* got True"),
        (lambda: CosineRouter(centre=1), "centre is True or False, got 1"),
        (lambda: EntropyRouter(temperature=0.0), "temperature .* at least 0.001, got 0.0"),
        (lambda: EntropyRouter(temperature=math.nan), "temperature .* got nan"),
        (lambda: NormRouter(smallest="yes"), "smallest is True or False, got 'yes'"),
        (lambda: RandomRouter(seed=0.5), "seed is a whole number or None, got 0.5"),
        (lambda: RandomRouter(seed=True), "seed is a whole number or None, got True"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_options_are_shown():
    assert "falloff=0.5" in repr(PredictabilityRouter(falloff=0.5))
    assert "centre=False, falloff=2" in repr(CosineRouter(centre=False))
    assert "temperature=0.2" in repr(EntropyRouter(0.2))
    assert "smallest=True" in repr(NormRouter(smallest=True))
    assert "seed=3" in repr(RandomRouter(3))


def test_directions_have_the_cosines_of_standardised_cells():
    x = make_noise((3, 4))
    unit, z = find_directions(x), standardise_cells(x)
    assert torch.allclose(unit.norm(dim=-1), torch.ones(3, 12))
    cosines = torch.nn.functional.cosine_similarity(z[:, None], z[:, :, None], dim=-1)
    assert torch.allclose(unit @ unit.mT, cosines, atol=1e-4)
    flat = find_directions(torch.ones(1, 12, 6))
    assert torch.allclose(flat @ flat.mT, torch.ones(1, 12, 12))


def test_standardised_cells_forget_scale_offset_and_the_mean_cell():
    x = make_noise((3, 4))
    z = standardise_cells(x)
    assert z.mean(1).abs().max() < 1e-6
    assert z.mean(2).abs().max() < 1e-6
    by_hand = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=0)
    assert torch.allclose(z, by_hand - by_hand.mean(1, keepdim=True), atol=1e-5)
    changed = standardise_cells(x * torch.rand(3, 12, 1).add(0.1) + torch.randn(3, 12, 1))
    assert torch.allclose(z, changed, atol=1e-4)
