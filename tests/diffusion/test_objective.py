"""Objectives, held against brute force: distributions of torch, and numerical integration."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from adaptok.diffusion.objective import (
    FlowObjective,
    HybridObjective,
    Objective,
    make_objective,
)
from adaptok.errors import ConfigError, DtypeError, ShapeError

TIMES = torch.tensor([999, 0, 1, 500, 37])


def make_batch(t, c=3, h=5, w=7, seed=0, error=0.3):
    """Grey values with both ends, and a prediction that is neither right nor far off."""
    generator = torch.Generator().manual_seed(seed)
    b = len(t)
    x0 = torch.randint(0, 256, (b, c, h, w), generator=generator) / 127.5 - 1
    x0[:, :, 0, :2] = torch.tensor([-1.0, 1.0])
    noise = torch.randn(b, c, h, w, generator=generator)
    epsilon = noise + error * torch.randn(b, c, h, w, generator=generator)
    place = torch.rand(b, c, h, w, generator=generator) * 2 - 1
    return x0, noise, torch.cat([epsilon, place], dim=1)


def brute_force_bound(x0, noise, prediction, t, num_steps=1000):
    """The variational term of one sample in bits per dimension, through the noisy image."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert num_steps == len(betas)
    bar = (1 - betas).cumprod(0)
    x0, noise, prediction = x0.double(), noise.double(), prediction.double()
    epsilon, place = prediction.chunk(2, dim=0)
    xt = bar[t].sqrt() * x0 + (1 - bar[t]).sqrt() * noise
    guess = (xt - (1 - bar[t]).sqrt() * epsilon) / bar[t].sqrt()
    before = bar[t - 1] if t > 0 else torch.tensor(1.0, dtype=torch.float64)

    def posterior_mean(image):
        first = before.sqrt() * betas[t] / (1 - bar[t])
        second = (1 - betas[t]).sqrt() * (1 - before) / (1 - bar[t])
        return first * image + second * xt

    smallest = betas[max(t, 1)] * (1 - bar[max(t, 1) - 1]) / (1 - bar[max(t, 1)])
    fraction = (place + 1) / 2
    std = (fraction * betas[t].log() + (1 - fraction) * smallest.log()).mul(0.5).exp()
    if t > 0:
        nats = kl_divergence(
            Normal(posterior_mean(x0), smallest.sqrt()), Normal(posterior_mean(guess), std)
        )
    else:
        nats = -integrate_bins(x0, guess, std).clamp(min=1e-12).log()
    return nats.mean() / math.log(2)


def integrate_bins(x0, mean, std, points=4001):
    """Probability of each grey value, summed up from the density by Simpson's rule."""
    low = torch.where(x0 < -0.999, mean - 12 * std, x0 - 1 / 255)
    high = torch.where(x0 > 0.999, mean + 12 * std, x0 + 1 / 255)
    low, high = torch.minimum(low, high), high
    grid = torch.linspace(0, 1, points, dtype=torch.float64)
    weights = torch.full((points,), 2.0, dtype=torch.float64)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    x = low[..., None] + (high - low)[..., None] * grid
    density = Normal(mean[..., None], std[..., None]).log_prob(x).exp()
    return (density * weights).sum(-1) * (high - low) / (3 * (points - 1))


def test_hybrid_loss_is_the_brute_force():
    objective = HybridObjective()
    x0, noise, prediction = make_batch(TIMES)
    loss = objective.loss(prediction, x0, noise, TIMES)
    for i, t in enumerate(TIMES.tolist()):
        mse = (prediction[i, :3] - noise[i]).double().square().mean()
        vb = brute_force_bound(x0[i], noise[i], prediction[i], t)
        assert loss.parts["mse"][i].item() == pytest.approx(mse.item(), rel=1e-5)
        assert loss.parts["vb"][i].item() == pytest.approx(vb.item(), rel=2e-4, abs=1e-7)
        assert loss.total[i].item() == pytest.approx((mse + vb).item(), rel=2e-4)
    assert loss.parts["vb"][1] > 1, "step 0 is a likelihood of grey values, bits per value"
    assert set(loss.parts) == {"mse", "vb"}


@given(t=st.integers(0, 999), seed=st.integers(0, 1000), error=st.sampled_from([0.0, 0.05, 1.0]))
@settings(deadline=None, max_examples=30)
def test_bound_of_any_step(t, seed, error):
    x0, noise, prediction = make_batch([t], c=1, h=3, w=4, seed=seed, error=error)
    loss = HybridObjective().loss(prediction, x0, noise, torch.tensor([t]))
    expected = brute_force_bound(x0[0], noise[0], prediction[0], t).item()
    assert loss.parts["vb"].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_bound_is_zero_for_the_true_posterior():
    t = torch.tensor([700, 20])
    x0, noise, prediction = make_batch(t)
    prediction = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)
    loss = HybridObjective().loss(prediction, x0, noise, t)
    assert loss.total.abs().max() < 1e-6


def test_bound_does_not_train_the_noise():
    x0, noise, prediction = make_batch(TIMES)
    prediction.requires_grad_()
    loss = HybridObjective().loss(prediction, x0, noise, TIMES)
    (by_bound,) = torch.autograd.grad(loss.parts["vb"].sum(), prediction, retain_graph=True)
    assert by_bound[:, :3].abs().max() == 0
    assert (by_bound[:, 3:].abs().amax(dim=(1, 2, 3)) > 0).all()
    (by_mse,) = torch.autograd.grad(loss.parts["mse"].sum(), prediction, retain_graph=True)
    assert by_mse[:, 3:].abs().max() == 0
    (by_total,) = torch.autograd.grad(loss.total.sum(), prediction)
    torch.testing.assert_close(by_total, by_bound + by_mse)


@pytest.mark.parametrize("t", [0, 1, 400])
def test_bound_pulls_the_variance_to_the_size_of_the_error(t):
    """A mean that is right wants the smallest variance, one that is off a larger one."""
    slopes = []
    for error in (0.0, 3.0):
        x0, noise, _ = make_batch([t])
        place = torch.zeros_like(noise, requires_grad=True)
        prediction = torch.cat([noise + error, place], dim=1)
        HybridObjective().loss(prediction, x0, noise, torch.tensor([t])).total.sum().backward()
        slopes.append(place.grad.sum().item())
    assert slopes[0] > 0 > slopes[1]


def test_loss_of_a_sample_does_not_depend_on_its_mates():
    objective = HybridObjective()
    x0, noise, prediction = make_batch(TIMES)
    together = objective.loss(prediction, x0, noise, TIMES).total
    for i in range(len(TIMES)):
        one = slice(i, i + 1)
        alone = objective.loss(prediction[one], x0[one], noise[one], TIMES[one]).total
        torch.testing.assert_close(alone, together[one])


def test_half_precision_is_computed_in_float32():
    x0, noise, prediction = make_batch(TIMES)
    prediction = prediction.bfloat16()
    loss = HybridObjective().loss(prediction, x0, noise, TIMES)
    assert loss.total.dtype == torch.float32
    wide = HybridObjective().loss(prediction.float(), x0, noise, TIMES)
    assert torch.equal(loss.total, wide.total)


@given(u=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=9))
@settings(deadline=None)
def test_hybrid_times(u):
    for num_steps in (1000, 77):
        objective = HybridObjective(num_steps)
        t = objective.times(torch.tensor(u, dtype=torch.float32))
        assert t.dtype == torch.int64
        for value, step in zip(u, t.tolist(), strict=True):
            assert 0 <= step < num_steps
            assert abs(step - (value * num_steps - 0.5)) <= 0.5 + 1e-4
        assert objective.model_time(t).dtype == torch.float32
        torch.testing.assert_close(
            objective.model_time(t), t.float() * 1000 / num_steps, rtol=1e-6, atol=1e-6
        )


def test_every_step_is_equally_likely():
    t = HybridObjective().times(torch.arange(5000) / 5000 + 1e-4)
    assert torch.equal(torch.bincount(t, minlength=1000), torch.full((1000,), 5))


def test_hybrid_noise():
    objective = HybridObjective()
    x0, noise, _ = make_batch(TIMES)
    noisy = objective.noisy(x0, noise, TIMES)
    bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    for i, t in enumerate(TIMES.tolist()):
        expected = bar[t].sqrt() * x0[i] + (1 - bar[t]).sqrt() * noise[i]
        torch.testing.assert_close(noisy[i], expected.float(), rtol=1e-5, atol=1e-6)


def test_flow_by_definition():
    objective = FlowObjective()
    x0, noise, _ = make_batch([0] * 4)
    t = torch.tensor([0.0, 0.25, 0.9, 1.0])
    noisy = objective.noisy(x0, noise, t)
    assert torch.equal(noisy[0], x0[0])
    assert torch.equal(noisy[3], noise[3])
    torch.testing.assert_close(noisy[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert torch.equal(objective.model_time(t), torch.tensor([0.0, 250.0, 900.0, 1000.0]))
    velocity = (objective.noisy(x0, noise, t + 0.0) - x0)[2] / 0.9
    torch.testing.assert_close(velocity, (noise - x0)[2], rtol=1e-4, atol=1e-4)
    prediction = noise - x0
    assert objective.loss(prediction, x0, noise, t).total.abs().max() == 0
    prediction[2] += 0.5
    loss = objective.loss(prediction, x0, noise, t)
    torch.testing.assert_close(loss.total, torch.tensor([0.0, 0.0, 0.25, 0.0]))
    assert torch.equal(loss.parts["mse"], loss.total)


def test_flow_times():
    u = (torch.arange(4000) + 0.5) / 4000
    assert torch.equal(FlowObjective().times(u), u)
    s = FlowObjective("logit-normal").times(u)
    logits = s.double().logit()
    assert abs(logits.mean().item()) < 1e-3
    assert logits.std().item() == pytest.approx(1.0, abs=5e-3)
    shifted = FlowObjective(shift=3.0).times(u)
    torch.testing.assert_close(shifted, 3 * u / (1 + 2 * u))
    assert (shifted >= u).all()


@given(u=st.floats(0, 1, exclude_max=True, width=32), shift=st.floats(0.01, 100))
@settings(deadline=None)
def test_flow_times_stay_in_range(u, shift):
    for distribution in ("uniform", "logit-normal"):
        t = FlowObjective(distribution, shift).times(torch.tensor([u], dtype=torch.float32))
        assert 0 <= t.item() <= 1
        x = torch.ones(1, 1, 2, 2)
        assert FlowObjective().noisy(x, x, t).isfinite().all()


@pytest.mark.parametrize("objective", [HybridObjective(), HybridObjective(100), FlowObjective()])
def test_clean_image_and_prediction_are_inverse(objective):
    t = objective.times(torch.tensor([0.03, 0.4, 0.97]))
    x0, noise, _ = make_batch([0] * 3, c=4)
    x = objective.noisy(x0, noise, t)
    right = noise if objective.name == "hybrid" else noise - x0
    torch.testing.assert_close(objective.predict_from_x0(x0, x, t), right, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(objective.predict_x0(right, x, t), x0, rtol=1e-3, atol=1e-3)
    assert objective.out_channels(4) == (8 if objective.name == "hybrid" else 4)


@pytest.mark.parametrize("objective", [HybridObjective(500), FlowObjective("logit-normal", 2.0)])
def test_objectives_are_values(objective):
    assert isinstance(objective, Objective)
    assert objective == copy.deepcopy(objective) == pickle.loads(pickle.dumps(objective))
    assert hash(objective) == hash(copy.copy(objective))
    options = dataclasses.asdict(objective)
    assert make_objective(objective.name, **options) == objective
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(objective, next(iter(options)), None)


def test_make_objective_refuses():
    with pytest.raises(ConfigError, match="no objective 'edm': choose one of hybrid, flow"):
        make_objective("edm")
    with pytest.raises(ConfigError, match="'hybrid' has no option shift: it takes num_steps"):
        make_objective("hybrid", shift=3.0)
    with pytest.raises(ConfigError, match="one of uniform, logit-normal, got 'cosine'"):
        make_objective("flow", time_distribution="cosine")
    for shift in (0.0, -1.0, math.inf, math.nan, "3"):
        with pytest.raises(ConfigError, match="shift needs a positive number"):
            make_objective("flow", shift=shift)
    with pytest.raises(ConfigError, match="at least 21, got 20"):
        HybridObjective(20)


@pytest.mark.parametrize("objective", [HybridObjective(), FlowObjective()])
class TestBadInput:
    def test_random_numbers(self, objective):
        with pytest.raises(ShapeError, match=r"one random number per sample .*\(2, 1\)"):
            objective.times(torch.rand(2, 1))
        with pytest.raises(DtypeError, match=r"floating-point random numbers, got torch.int64"):
            objective.times(torch.tensor([0]))
        with pytest.raises(ConfigError, match=r"u needs values from 0 to 1, got 1\.5"):
            objective.times(torch.tensor([0.2, 1.5]))
        with pytest.raises(ConfigError, match="u needs values from 0 to 1, got nan"):
            objective.times(torch.tensor([math.nan]))

    def test_shapes(self, objective):
        x = torch.zeros(2, 3, 4, 5)
        t = objective.times(torch.tensor([0.1, 0.9]))
        good = torch.zeros(2, objective.out_channels(3), 4, 5)
        with pytest.raises(ShapeError, match=r"the same shape .*\(2, 3, 4, 5\) and \(2, 3, 4, 4\)"):
            objective.loss(good, x, x[..., 1:], t)
        with pytest.raises(ShapeError, match=r"one time per sample, \(2,\), got \(1,\)"):
            objective.noisy(x, x, t[:1])
        with pytest.raises(ShapeError, match=r"needs a prediction of shape .*set learn_sigma"):
            objective.loss(torch.zeros(2, 9, 4, 5), x, x, t)

    def test_dtypes(self, objective):
        x = torch.zeros(2, 3, 4, 5)
        t = objective.times(torch.tensor([0.1, 0.9]))
        with pytest.raises(DtypeError, match=r"got torch.uint8 and torch.float32: scale images"):
            objective.noisy(x.to(torch.uint8), x, t)
        other = t.float() if objective.name == "hybrid" else t.long()
        with pytest.raises(DtypeError, match=r"t needs .*use times\(u\)"):
            objective.noisy(x, x, other)
        with pytest.raises(DtypeError, match="prediction needs floating-point"):
            objective.loss(torch.zeros(2, objective.out_channels(3), 4, 5).long(), x, x, t)

    def test_times_out_of_range(self, objective):
        x = torch.zeros(2, 3, 4, 5)
        high = 1000 if objective.name == "hybrid" else 1.25
        good = torch.zeros(2, objective.out_channels(3), 4, 5)
        for wrong in (-1, high):
            t = objective.times(torch.tensor([0.1, 0.9])).clone()
            t[1] = wrong
            for call in (
                lambda t=t: objective.noisy(x, x, t),
                lambda t=t: objective.loss(good, x, x, t),
            ):
                with pytest.raises(ConfigError, match=f"t needs values from 0 to .* got {wrong}"):
                    call()
