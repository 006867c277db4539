import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from routers.fields import make_noise, make_waves

from adaptok import Context, Tokens
from adaptok.routers import CosineRouter
from adaptok.routers.untrained import standardise_cells


@pytest.mark.parametrize("centre", [False, True])
def test_probability_is_the_mean_over_pairs(centre):
    x = make_noise((3, 4))
    prob = CosineRouter(centre, falloff=1)(Tokens(x, (3, 4)), Context()).keep_prob
    z = standardise_cells(x) if centre else x
    for i in range(12):
        terms, weights = 0, 0
        for j in range(12):
            steps = abs(i // 4 - j // 4), abs(i % 4 - j % 4)
            if max(steps) == 1:
                weight = 1 / math.hypot(*steps)
                terms += weight * (1 - F.cosine_similarity(z[:, i], z[:, j], dim=-1)) / 2
                weights += weight
        assert torch.allclose(prob[:, i], terms / weights, atol=1e-5 if centre else 1e-6)


@given(st.sampled_from([(6, 7), (1, 12), (4, 4, 4)]), st.booleans(), st.data())
def test_an_outlier_in_a_smooth_field_comes_first(grid, centre, data):
    x = make_waves(grid)
    margin = 2 if 1 in grid else 0  # the last cell of a line has only the outlier beside it
    cell = data.draw(st.integers(margin, math.prod(grid) - 1 - margin))
    x[0, cell] *= -1
    routing = CosineRouter(centre)(Tokens(x, grid), Context())
    assert routing.keep_prob.argmax() == cell


def test_threshold_is_a_right_angle():
    opposite = torch.tensor([[1.0, 0], [-1, 0.1]])[None]
    acute = torch.tensor([[1.0, 0], [1, 2]])[None]
    for x, kept in ((opposite, True), (acute, False)):
        routing = CosineRouter(centre=False)(Tokens(x, (1, 2)), Context())
        assert routing.natural_mask.tolist() == [[kept, kept]]


def test_a_component_that_all_cells_share_does_not_count():
    x = make_noise((4, 5))
    shared = 100 * torch.randn(6)
    plain, shifted = (
        CosineRouter(centre=False)(Tokens(v, (4, 5)), Context()).keep_prob for v in (x, x + shared)
    )
    assert shifted[0].max() < 0.01 < plain[0].max()
    centred = CosineRouter()(Tokens(x + shared, (4, 5)), Context()).keep_prob
    assert centred[0].max() > 0.5


def test_cells_of_zeros_have_no_direction():
    x = torch.zeros(1, 3, 4)
    x[0, 2, 0] = 1
    prob = CosineRouter(centre=False)(Tokens(x, (1, 3)), Context()).keep_prob
    assert prob.tolist() == [[0.5, 0.5, 0.5]]
