"""The linear schedule, held against diffusers and against the definitions."""

import diffusers
import pytest
import torch

from adaptok.diffusion.schedule import linear_betas, linear_schedule
from adaptok.errors import ConfigError


@pytest.mark.parametrize("num_steps", [1000, 250])
def test_the_same_as_diffusers(num_steps):
    scale = 1000 / num_steps
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=num_steps, beta_start=1e-4 * scale, beta_end=0.02 * scale
    )
    schedule = linear_schedule(num_steps)
    torch.testing.assert_close(
        schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=2e-5, atol=0
    )
    squares = schedule.signal**2 + schedule.noise**2
    torch.testing.assert_close(squares, torch.ones(num_steps))


@pytest.mark.parametrize("num_steps", [21, 37, 1000])
def test_constants_follow_from_a_loop(num_steps):
    schedule = linear_schedule(num_steps)
    left = 1.0
    variances = []
    for t, beta in enumerate(linear_betas(num_steps).tolist()):
        before, left = left, left * (1 - beta)
        variances.append(beta * (1 - before) / (1 - left))
        assert schedule.alphas_cumprod[t].item() == pytest.approx(left, rel=1e-10)
        assert schedule.signal[t].item() == pytest.approx(left**0.5, rel=1e-6)
        assert schedule.max_log_variance[t].exp().item() == pytest.approx(beta, rel=1e-5)
    variances[0] = variances[1]
    torch.testing.assert_close(
        schedule.min_log_variance.exp(), torch.tensor(variances), rtol=1e-5, atol=0
    )
    assert (schedule.min_log_variance <= schedule.max_log_variance).all()


def test_other_lengths_add_about_the_same_noise():
    for num_steps in (250, 500, 4000):
        ends = linear_schedule(num_steps).alphas_cumprod[-1].log()
        assert ends.item() == pytest.approx(
            linear_schedule(1000).alphas_cumprod[-1].log().item(), rel=0.05
        )


@pytest.mark.parametrize("num_steps", [20, 0, -5, 2.5, True, "1000"])
def test_impossible_lengths(num_steps):
    with pytest.raises(ConfigError, match="num_steps needs a whole number of at least 21"):
        linear_betas(num_steps)


def test_a_schedule_that_inference_made_can_train():
    linear_schedule.cache_clear()
    with torch.inference_mode():
        schedule = linear_schedule(123)
    weight = torch.ones(123, requires_grad=True)
    (weight * schedule.signal).sum().backward()
    assert torch.equal(weight.grad, schedule.signal)
