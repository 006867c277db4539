"""Wan of diffusers: a grid of video, and timesteps per token."""

from dataclasses import dataclass, replace

import diffusers
import pytest
import torch
from backbones.diffusers_checks import (
    call,
    change_token_inputs,
    check_oracle,
    find,
    wrap_host,
)

import adaptok
from adaptok.backbones.diffusers_wan import DiffusersWan
from adaptok.calls import TokenInput
from adaptok.errors import HandOverError, HostOptionError, ProbeError
from adaptok.testing.models import fill_weights


def make_wan(**options):
    config = {k: v for k, v in find("wan").build().config.items() if not k.startswith("_")}
    return fill_weights(diffusers.WanTransformer3DModel(**(config | options))).eval()


def test_facts():
    host = DiffusersWan.match(find("wan").build())
    assert (host.width, host.depth, host.grid_axes) == (48, 4, 3)


def test_trace_has_the_grid_of_the_video():
    model = wrap_host("wan")
    with adaptok.trace(model) as trace:
        call("wan", model)
    assert trace.steps[0].grid == (2, 4, 5)


@pytest.mark.parametrize("name", ["wan", "wan2.2"])
def test_twin_with_shifted_rows_is_caught(name):
    host = change_token_inputs(DiffusersWan, lambda v: replace(v, value=v.value.roll(1, 1)))
    with pytest.raises(ProbeError, match="differs by"):
        wrap_host(name, host)


@dataclass(frozen=True, slots=True, eq=False)
class FirstRows(TokenInput):
    """Takes the rows of the first sample for all."""

    def take(self, places, n, samples):
        return super(FirstRows, self).take(places[:1].expand_as(places), n, samples)


def test_twin_with_the_rows_of_another_sample_is_caught():
    host = change_token_inputs(DiffusersWan, lambda v: FirstRows(v.value, v.axes))
    model = wrap_host("wan", host)
    check_oracle("wan", model, [0.2, 0.5, 1.0])  # groups of one sample hide it
    with pytest.raises(AssertionError):
        check_oracle("wan", model, 0.5)


@dataclass(frozen=True, slots=True, eq=False)
class FirstPlaces(TokenInput):
    """Takes the first rows, as many as are needed."""

    def take(self, places, n, samples):
        first = torch.arange(places.shape[1]).expand_as(places)
        return super(FirstPlaces, self).take(first, n, samples)


@pytest.mark.parametrize("name", ["wan", "wan2.2"])
def test_twin_that_cuts_instead_of_gathering_is_caught(name):
    host = change_token_inputs(DiffusersWan, lambda v: FirstPlaces(v.value, v.axes))
    model = wrap_host(name, host)
    with pytest.raises(AssertionError):
        check_oracle(name, model, 0.5)


def test_twin_that_takes_modulation_of_other_tokens_is_caught():
    def change(value):
        return FirstPlaces(value.value, value.axes) if value.value.shape[2] == 6 else value

    model = wrap_host("wan2.2", change_token_inputs(DiffusersWan, change))
    with pytest.raises(AssertionError):
        check_oracle("wan2.2", model, 0.5)


@pytest.mark.parametrize("frames", [None, 514], ids=["first frame", "first and last frame"])
def test_image_to_video(frames):
    """Image features stand in front of 512 text tokens; both go to every block whole."""
    model = make_wan(image_dim=24, added_kv_proj_dim=48, pos_embed_seq_len=frames)
    host = DiffusersWan.match(model)
    inputs = host.example(model)
    with torch.no_grad():
        expected = model(**inputs.kwargs).sample
        adaptok.wrap(model, "dc", budget=1.0, backbone=host)
        assert torch.equal(model(**inputs.kwargs).sample, expected)
        with adaptok.budget(model, keep=[0.2, 0.6]):
            whole = model(**inputs.kwargs).sample
        per = 1 if frames is None else 2
        for sample, keep in enumerate((0.2, 0.6)):
            one = {
                key: value[sample * (k := per if key.endswith("image") else 1) :][:k]
                for key, value in inputs.kwargs.items()
            }
            with adaptok.budget(model, keep=keep):
                alone = model(**one).sample
            torch.testing.assert_close(alone[0], whole[sample], rtol=0, atol=1e-5)


def test_patches_in_time():
    model = make_wan(patch_size=(2, 2, 2))
    adaptok.wrap(model, "dc", budget=0.5, backbone=DiffusersWan.match(model))
    with torch.no_grad(), adaptok.trace(model) as trace:
        model(torch.randn(2, 4, 4, 6, 8), torch.tensor([3.0, 9.0]), torch.randn(2, 5, 20))
    assert trace.steps[0].grid == (2, 3, 4)
    assert trace.steps[0].kept.tolist() == [12, 12]


def test_other_inputs_are_refused():
    model = wrap_host("wan")
    with pytest.raises(HandOverError, match=r"videos are \(b, c, f, h, w\), got the shape \(1, 4"):
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 5, 20))
    with pytest.raises(HostOptionError, match=r"attention_kwargs=\{'mask'"):
        call("wan", model, attention_kwargs={"mask": torch.zeros(1)})


def test_caches_are_refused_before_and_after_a_wrap():
    from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

    broadcast = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )
    for config in (FirstBlockCacheConfig(), broadcast):
        model = find("wan").build()
        model.enable_cache(config)
        with pytest.raises(HostOptionError, match="has a cache hook of diffusers"):
            DiffusersWan.match(model)
        model.disable_cache()
        assert DiffusersWan.match(model).depth == 4
    model = wrap_host("wan")
    model.enable_cache(broadcast)
    with pytest.raises(HostOptionError, match="has a cache hook of diffusers"):
        call("wan", model)
    model.disable_cache()
    call("wan", model)
    with pytest.raises(IndexError):  # diffusers looks for a ModuleList
        model.enable_cache(FirstBlockCacheConfig())
