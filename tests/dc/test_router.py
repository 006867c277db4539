import pytest
import torch
import torch.nn.functional as F
from conftest import randomise

from adaptok import Context, Tokens
from adaptok.dc import DCRouter
from adaptok.errors import ConfigError, ShapeError


def route_by_hand(router, x, grid):
    """Keep probabilities by functional calls on the weights, in float64."""
    w = {name: value.double() for name, value in router.state_dict().items()}
    h, width = grid
    image = x.double().transpose(1, 2).reshape(x.shape[0], -1, h, width)
    z = F.conv2d(image, w["project.weight"], w["project.bias"])
    surprise = z - F.conv2d(z, w["predict.weight"], w["predict.bias"], padding=1)
    y = F.conv2d(surprise, w["score.0.weight"], w["score.0.bias"], padding=1)
    y = F.silu(F.group_norm(y, 8, w["score.1.weight"], w["score.1.bias"], eps=1e-5))
    logit = F.conv2d(y, w["score.3.weight"], w["score.3.bias"])
    prob = logit.sigmoid().reshape(x.shape[0], -1)
    prob[:, 0] = prob[:, -1] = 1.0
    return prob


@pytest.mark.parametrize("grid", [(5, 7), (1, 9), (9, 1), (3, 3)])
def test_router_is_its_functional_form(grid):
    router = randomise(DCRouter(64), scale=0.5)
    x = torch.randn(3, grid[0] * grid[1], 64)
    routing = router(Tokens(x, grid), Context())
    expected = route_by_hand(router, x, grid)
    assert torch.allclose(routing.keep_prob.double(), expected, atol=1e-5)
    assert torch.equal(routing.natural_mask, routing.keep_prob > 0.5)
    assert routing.threshold == 0.5
    # the test can fail: the probabilities spread
    assert expected[:, 1:-1].std() > 0.05


def test_first_and_last_cell_are_always_kept():
    router = DCRouter(32, bias=-20.0)
    routing = router(Tokens(torch.randn(2, 12, 32), (3, 4)), Context())
    assert (routing.keep_prob[:, [0, -1]] == 1).all()
    assert (routing.keep_prob[:, 1:-1] < 1e-4).all()
    assert routing.natural_mask.sum(1).tolist() == [2, 2]
    pair = router(Tokens(torch.randn(1, 2, 32), (1, 2)), Context())
    assert pair.keep_prob.tolist() == [[1.0, 1.0]]


def test_the_bias_of_the_logit_sets_the_share_at_the_start():
    assert DCRouter(64).logit_bias.item() == pytest.approx(-1.1)
    assert DCRouter(64, bias=4.0).score[3].bias.tolist() == [4.0]


def test_first_and_last_cell_give_no_gradient_through_their_own_probability():
    router = DCRouter(32)
    x = torch.randn(1, 12, 32)
    prob = router(Tokens(x, (3, 4)), Context()).keep_prob
    grads = torch.autograd.grad(prob[0, 0] + prob[0, -1], router.parameters(), retain_graph=True)
    assert all((grad == 0).all() for grad in grads)
    assert torch.autograd.grad(prob[0, 1], router.logit_bias)[0].abs() > 0


def test_router_stays_in_float32_under_autocast_and_after_a_cast():
    router = randomise(DCRouter(64), scale=0.5)
    x = torch.randn(2, 30, 64).to(torch.bfloat16)
    expected = router(Tokens(x.float(), (5, 6)), Context()).keep_prob
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = router(Tokens(x, (5, 6)), Context()).keep_prob
    cast = router.to(torch.bfloat16)(Tokens(x, (5, 6)), Context()).keep_prob
    for ours in (under_autocast, cast):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, expected)


def test_samples_and_batch_mates_do_not_mix():
    router = randomise(DCRouter(32))
    x = torch.randn(3, 20, 32)
    together = router(Tokens(x, (4, 5)), Context()).keep_prob
    for sample in range(3):
        alone = router(Tokens(x[sample : sample + 1], (4, 5)), Context()).keep_prob
        assert torch.allclose(alone[0], together[sample], atol=1e-6)


@pytest.mark.parametrize("grid", [None, (12,), (2, 2, 3)])
def test_a_grid_that_is_not_two_dimensional_is_refused(grid):
    with pytest.raises(ShapeError, match=r"this router needs a grid \(h, w\), got"):
        DCRouter(32)(Tokens(torch.randn(1, 12, 32), grid), Context())


@pytest.mark.parametrize("width", [16, 48, 100])
def test_a_width_that_is_no_multiple_of_32_is_refused(width):
    with pytest.raises(ConfigError, match=f"a multiple of 32, got {width}"):
        DCRouter(width)
