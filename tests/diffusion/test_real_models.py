"""The two models of this library in the walks."""

import pytest
import torch

import adaptok
from adaptok.dc.baseline import DiT, DiTConfig
from adaptok.diffusion import FlowObjective, HybridObjective, denoise, sample

SIZES = {
    "hidden_size": 64, "depth": 1, "num_heads": 2, "latent_size": (6, 4), "in_channels": 5,
    "num_classes": 4,
}  # fmt: skip


def fill(model):
    """Give every parameter a value that matters: fresh models answer zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.1)
    return model


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm", "flow-euler"])
@pytest.mark.parametrize("channels", [None, 5])
def test_dcdit(scheduler, channels):
    flow = scheduler == "flow-euler"
    model = fill(adaptok.DCDiT(adaptok.DCDiTConfig(**SIZES, learn_sigma=not flow)))
    objective = FlowObjective() if flow else HybridObjective()
    options = {"objective": objective, "scheduler": scheduler, "steps": 3, "trace": True}
    samples = sample(
        model, [0, 3], drop=0.0, uncond_drop=0.9, guidance_scale=1.5, guided_channels=channels,
        **options,
    )  # fmt: skip
    assert samples.latents.shape == (2, 5, 6, 4)
    for step in samples.steps:
        assert step.grid == (6, 4)
        assert (step.uncond_kept <= step.kept).all()
    exact = sample(model, [0, 3], tokens=torch.tensor([3, 9]), **options)
    assert [step.kept.tolist() for step in exact.steps] == [[3, 9]] * 3
    alone = sample(model, [3], seed=1, tokens=9, **options)
    torch.testing.assert_close(alone.latents[0], exact.latents[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm", "flow-euler"])
def test_baseline(scheduler):
    flow = scheduler == "flow-euler"
    model = fill(DiT(DiTConfig(**SIZES, patch_size=2, learn_sigma=not flow)))
    objective = FlowObjective() if flow else HybridObjective()
    options = {"objective": objective, "scheduler": scheduler, "steps": 3, "trace": True}
    samples = sample(model, [0, 3], guidance_scale=1.5, **options)
    assert samples.latents.shape == (2, 5, 6, 4)
    assert samples.steps[0].kept is None
    back = denoise(model, samples.latents, [0, 3], start=0.4, **options)
    assert back.latents.isfinite().all()
