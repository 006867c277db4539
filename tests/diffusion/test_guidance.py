"""Classifier-free guidance, held against sums written out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptok import DCDiT, DCDiTConfig
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DiTConfig
from adaptok.diffusion.guidance import combine_halves, guide
from adaptok.errors import AdaptokError, ConfigError, ShapeError


@given(
    b=st.integers(1, 3),
    c=st.integers(1, 8),
    scale=st.floats(-2, 8),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_each_channel_is_guided_or_left_alone(b, c, scale, data):
    channels = data.draw(st.one_of(st.none(), st.integers(1, c)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    out = torch.randn(2 * b, c, 3, 5, generator=generator)
    result = combine_halves(out, scale, channels)
    for i in range(b):
        for k in range(c):
            cond, uncond = out[i, k], out[b + i, k]
            if channels is None or k < channels:
                expected = ((1 - scale) * uncond + scale * cond,) * 2
            else:
                expected = (cond, uncond)
            torch.testing.assert_close(result[i, k], expected[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(result[b + i, k], expected[1], rtol=1e-4, atol=1e-4)


def test_three_channels_are_guided_by_default():
    cond, uncond = torch.randn(2, 1, 8, 2, 3)
    guided, other = guide(cond, uncond, scale=4.0)
    assert torch.equal(guided[:, 3:], cond[:, 3:])
    assert torch.equal(other[:, 3:], uncond[:, 3:])
    assert torch.equal(guided[:, :3], other[:, :3])
    assert (guided[:, :3] - cond[:, :3]).abs().max() > 0.1


def test_scale_one_is_the_conditional_prediction_and_zero_the_other():
    out = torch.randn(4, 4, 3, 2)
    torch.testing.assert_close(combine_halves(out, 1.0)[:2], out[:2])
    torch.testing.assert_close(combine_halves(out, 0.0, None)[:2], out[2:])


@pytest.mark.parametrize("channels", [5, 0, -1])
def test_channels_that_are_not_there(channels):
    with pytest.raises(ShapeError, match=rf"cannot guide {channels} channels .* that has 4"):
        combine_halves(torch.zeros(2, 4, 2, 2), 1.5, channels)


@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (0, 4, 2, 2), (4, 2, 2)])
def test_no_two_halves(shape):
    with pytest.raises(ShapeError, match="a conditional and an unconditional half"):
        combine_halves(torch.zeros(shape), 1.5)


def test_halves_of_different_shapes():
    with pytest.raises(AdaptokError, match=r"same shape .*\(1, 4, 2, 2\) and \(1, 4, 2, 3\)"):
        guide(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 3), 1.5)


def test_gradient_reaches_both_halves():
    out = torch.randn(2, 4, 2, 2, requires_grad=True)
    combine_halves(out, 1.5)[:1].sum().backward()
    assert out.grad is not None
    assert torch.equal(out.grad[0, :3], torch.full((3, 2, 2), 1.5))
    assert torch.equal(out.grad[1, :3], torch.full((3, 2, 2), -0.5))


@pytest.mark.parametrize(("kind", "config"), [(DCDiT, DCDiTConfig), (DiT, DiTConfig)])
def test_models_guide_no_variance_and_by_no_nan(kind, config):
    sizes = {"hidden_size": 64, "depth": 1, "num_heads": 2, "latent_size": 8, "num_classes": 4}
    model = kind(config(**sizes, in_channels=4))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 4])
    assert model.forward_with_cfg(x, t, y, 2.0, guided_channels=4).shape == (2, 8, 8, 8)
    for wrong in (0, 5, 9):
        with pytest.raises(ShapeError, match=f"guided_channels is 1 to 4.*, got {wrong}"):
            model.forward_with_cfg(x, t, y, 2.0, guided_channels=wrong)
    for scale in (float("nan"), float("inf"), "2", None):
        with pytest.raises(ConfigError, match="cfg_scale is a finite number"):
            model.forward_with_cfg(x, t, y, scale)
