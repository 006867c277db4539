"""DiT and PixArt of diffusers."""

from dataclasses import replace

import pytest
import torch
from backbones.diffusers_checks import (
    call,
    change_inputs,
    change_token_inputs,
    check_oracle,
    check_oracles,
    find,
    wrap_host,
)

import adaptok
from adaptok.backbones.diffusers_dit import DiffusersDiT
from adaptok.backbones.diffusers_pixart import DiffusersPixArt
from adaptok.errors import HandOverError, HostOptionError, ProbeError

MASK = (torch.rand(3, 35, generator=torch.Generator().manual_seed(5)) < 0.7).long()


def test_facts():
    host = DiffusersDiT.match(find("dit").build())
    assert (host.width, host.depth, host.grid_axes) == (48, 4, 2)
    assert DiffusersPixArt.branches == ("uncond", "cond")


def mix_samples(call):
    inputs = {key: value.flip(0) for key, value in call.sample_inputs.items()}
    return replace(call, sample_inputs=inputs)


def forget_samples(call):
    return replace(call, sample_inputs={}, shared={**call.shared, **call.sample_inputs})


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_twin_that_mixes_samples_is_caught(name):
    host = change_inputs({"dit": DiffusersDiT, "pixart": DiffusersPixArt}[name], mix_samples)
    with pytest.raises(ProbeError, match="differs by"):
        wrap_host(name, host)


def test_twin_that_gives_all_times_to_each_group_is_caught():
    model = wrap_host("dit", change_inputs(DiffusersDiT, forget_samples))
    with pytest.raises((RuntimeError, AssertionError)):
        check_oracle("dit", model, [0.2, 0.5, 1.0])


def test_twin_with_a_turned_grid_is_caught():
    class Turned(DiffusersDiT):
        def find_numbers(self, model, given):
            numbers = super().find_numbers(model, given)
            return replace(numbers, grid=numbers.grid[::-1])

    with pytest.raises(AssertionError):
        check_oracle("dit", wrap_host("dit", Turned), 0.5)


@pytest.mark.parametrize("mask", [MASK, (1.0 - MASK[:, None]) * -10000.0], ids=["b n", "b 1 n"])
def test_mask_over_cells_is_gathered(mask):
    model = wrap_host("pixart")
    plain = call("pixart", adaptok.unwrap(wrap_host("pixart")), attention_mask=mask)
    with adaptok.budget(model, keep=1.0):
        assert torch.equal(call("pixart", model, attention_mask=mask), plain)
    assert (call("pixart", model) - call("pixart", model, attention_mask=mask)).abs().max() > 0.01
    check_oracles("pixart", model, attention_mask=mask)


def test_twin_that_takes_the_mask_of_other_cells_is_caught():
    host = change_token_inputs(DiffusersPixArt, lambda v: replace(v, value=v.value.flip(-1)))
    model = wrap_host("pixart", host)  # the example of the probe has no such mask
    with pytest.raises(AssertionError):
        check_oracle("pixart", model, 0.5, attention_mask=MASK)


@pytest.mark.parametrize("shape", [(3, 1, 1, 35), (35,), (3, 1, 34)])
def test_masks_of_other_forms_are_refused(shape):
    with pytest.raises(HostOptionError, match=r"an attention_mask over 35 cells is \(b, n\)"):
        call("pixart", wrap_host("pixart"), attention_mask=torch.zeros(shape))


def test_tensors_for_attention_are_refused():
    model = wrap_host("pixart")
    with pytest.raises(HostOptionError, match=r"cross_attention_kwargs=\{'gligen'"):
        call("pixart", model, cross_attention_kwargs={"gligen": {"boxes": torch.zeros(1)}})


def test_other_latents_are_refused():
    model = wrap_host("dit")
    with pytest.raises(HandOverError, match=r"latents are \(b, c, h, w\), got the shape \(3, 36\)"):
        model(torch.zeros(3, 36), timestep=torch.zeros(3), class_labels=torch.zeros(3))


def test_arguments_by_place():
    model = wrap_host("dit")
    inputs = find("dit").inputs(model)
    args = (*inputs.args, inputs.kwargs["timestep"], inputs.kwargs["class_labels"], None, False)
    with torch.no_grad():
        assert torch.equal(model(*args)[0], call("dit", model))


def test_forward_chunking_is_refused():
    model = wrap_host("dit")
    for block in model.transformer_blocks.blocks:
        block.set_chunk_feed_forward(4, 1)
    with pytest.raises(HostOptionError, match="enable_forward_chunking"):
        call("dit", model)


def test_perturbed_attention_guidance_is_refused():
    from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0

    model = wrap_host("pixart")
    model.transformer_blocks[1].attn1.processor = PAGCFGIdentitySelfAttnProcessor2_0()
    with pytest.raises(HostOptionError, match="perturbed attention guidance"):
        call("pixart", model)


@pytest.mark.parametrize(
    "options", [{"use_additional_conditions": True}, {"caption_channels": None}]
)
def test_other_configurations(options):
    import diffusers

    model = find("pixart").build()
    sizes = {"caption_channels": 20, "use_additional_conditions": False} | options
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    other = diffusers.PixArtTransformer2DModel(**(config | sizes)).eval()
    adaptok.wrap(other, "dc", budget=0.5, backbone=DiffusersPixArt.match(other))
    assert adaptok.is_wrapped(other)  # the probe ran it on its example
