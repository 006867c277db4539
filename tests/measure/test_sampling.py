"""Sampling with its price."""

import pytest
import torch

import adaptok
from adaptok.dc import DiT, DiTConfig
from adaptok.diffusion import FlowObjective, sample
from adaptok.measure import count_flops, measure_sampling

FLOW = {"objective": FlowObjective(), "scheduler": "flow-euler", "steps": 3, "seed": 5}


@pytest.fixture
def model():
    config = adaptok.DCDiTConfig(
        hidden_size=64, depth=1, num_heads=2, latent_size=(8, 12), num_classes=4, learn_sigma=False
    )
    model = adaptok.DCDiT(config)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_images_are_those_of_sample(model):
    measured = measure_sampling(model, [0, 3], **FLOW, keep=0.5)
    assert torch.equal(measured.samples.latents, sample(model, [0, 3], **FLOW, keep=0.5).latents)


def test_cost_of_an_exact_budget(model):
    cost = measure_sampling(model, [0, 3], **FLOW, tokens=20).cost
    assert cost.tokens == (20.0, 20.0)
    assert cost.gflops == pytest.approx(count_flops(model.config, (8, 12), [20]) / 1e9)
    assert cost.ms > 0


def test_guidance_counts_both_runs(model):
    options = {**FLOW, "guidance_scale": 2.0, "guided_channels": 4}
    cost = measure_sampling(model, [0, 3], **options, tokens=20).cost
    assert cost.tokens == (40.0, 40.0)
    assert cost.gflops == pytest.approx(2 * count_flops(model.config, (8, 12), [20]) / 1e9)


def test_lite_guidance_costs_less(model):
    options = {**FLOW, "guidance_scale": 2.0, "guided_channels": 4, "drop": 0.0}
    plain = measure_sampling(model, [0, 3], **options).cost
    lite = measure_sampling(model, [0, 3], **options, uncond_drop=0.9).cost
    assert lite.mean_tokens < plain.mean_tokens
    assert lite.gflops < plain.gflops


def test_bucketed_layout_counts_what_runs(model):
    config = model.config.model_copy(update={"layout": "bucketed", "buckets": 4})
    bucketed = adaptok.DCDiT(config).eval()
    bucketed.load_state_dict(model.state_dict())
    assert measure_sampling(bucketed, [0], **FLOW, tokens=25).cost.tokens == (48.0,)


def test_fixed_patches():
    config = DiTConfig(
        hidden_size=64, depth=1, num_heads=2, latent_size=8, num_classes=4, learn_sigma=False
    )
    assert measure_sampling(DiT(config), [0, 1], **FLOW).cost.tokens == (16.0, 16.0)
    guided = measure_sampling(DiT(config), [0, 1], **FLOW, guidance_scale=2.0)
    assert guided.cost.tokens == (32.0, 32.0)


def test_progress_is_passed_on(model):
    seen = []
    measure_sampling(model, [0], **FLOW, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
