import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routers.fields import make_noise, make_waves, mean_by_loop

from adaptok import Context, Tokens
from adaptok.routers import PredictabilityRouter
from adaptok.routers.predictability import measure_surprise


def surprise_by_hand(x, grid, falloff):
    z = x.double()
    z = (z - z.mean(-1, keepdim=True)) / z.var(-1, keepdim=True, correction=0).sqrt()
    z = z - z.mean(1, keepdim=True)
    residual = (z - mean_by_loop(z, grid, falloff)).norm(dim=-1)
    return residual / (z.square().sum((1, 2)) / z.shape[1]).sqrt()[:, None]


@pytest.mark.parametrize("grid", [(4, 5), (1, 7), (2, 3, 4)])
@pytest.mark.parametrize("falloff", [0, 2, 3.5])
def test_surprise_is_its_formula(grid, falloff):
    x = make_noise(grid)
    ours = measure_surprise(x, grid, falloff).double()
    expected = surprise_by_hand(x, grid, falloff)
    assert torch.allclose(ours, expected, rtol=1e-4)
    routing = PredictabilityRouter(falloff)(Tokens(x, grid), Context())
    assert torch.allclose(routing.keep_prob.double(), expected / (1 + expected), atol=1e-5)


@given(st.sampled_from([(6, 7), (1, 12), (4, 4, 4)]), st.data())
def test_an_outlier_in_a_smooth_field_comes_first(grid, data):
    x = make_waves(grid)
    margin = 2 if 1 in grid else 0  # the last cell of a line has only the outlier beside it
    cell = data.draw(st.integers(margin, math.prod(grid) - 1 - margin))
    x[0, cell] = torch.randn(16, generator=torch.Generator().manual_seed(cell))
    routing = PredictabilityRouter()(Tokens(x, grid), Context())
    assert routing.keep_prob.argmax() == cell


def test_only_an_edge_in_a_flat_image_is_kept_of_itself():
    left, right = torch.randn(2, 8)
    x = torch.where(torch.arange(12)[:, None] < 5, left, right).repeat(6, 1)[None]
    routing = PredictabilityRouter()(Tokens(x, (6, 12)), Context())
    field = routing.keep_prob.reshape(6, 12)
    assert (field[:, [4, 5]] > 0.2).all()
    assert (field[:, [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]] == 0).all()


def test_noise_is_as_surprising_as_the_threshold_and_waves_are_less():
    grid = (12, 12)
    noise, waves = (
        PredictabilityRouter()(Tokens(x, grid), Context())
        for x in (make_noise(grid, d=64), make_waves(grid))
    )
    assert noise.keep_prob.mean().item() == pytest.approx(0.515, abs=0.01)
    assert waves.keep_prob.mean() < 0.35
    assert noise.natural_mask.float().mean() > 0.6
    assert waves.natural_mask.float().mean() < 0.1
