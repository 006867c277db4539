"""Stable Diffusion 3 and 3.5 of diffusers."""

from dataclasses import replace

import pytest
import torch
from backbones.diffusers_checks import call, change_inputs, check_oracle, find, wrap_host

import adaptok
from adaptok.backbones.diffusers_sd3 import DiffusersSD3
from adaptok.errors import HandOverError, HostOptionError, ProbeError


def test_last_block_gives_no_text():
    model = wrap_host("sd3")
    seen = []
    model.transformer_blocks.register_forward_hook(lambda *args: seen.append(args[-1]))
    call("sd3", model)
    text, x = seen[0]
    assert text is None
    assert x.shape == (3, 35, 48)


def test_text_of_a_span_reaches_the_blocks_behind_it():
    """Text is changed by the blocks inside the span, in groups, and goes on in order."""
    model = wrap_host("sd3", span=(0, 2), budget=[0.2, 0.5, 1.0])
    blocks, seen = model.transformer_blocks.blocks, []
    blocks[2].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    call("sd3", model)
    case = find("sd3")
    for sample, keep in enumerate((0.2, 0.5, 1.0)):
        with adaptok.budget(model, keep=keep), torch.no_grad():
            case.run(model, case.one(case.inputs(model), sample))
    together, *alone = seen
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-5)


def test_twin_that_mixes_times_is_caught():
    def mix(call):
        return replace(call, sample_inputs={"temb": call.sample_inputs["temb"].flip(0)})

    with pytest.raises(ProbeError, match="differs by"):
        wrap_host("sd3", change_inputs(DiffusersSD3, mix))


def test_twin_that_keeps_old_text_is_caught():
    class Stale(DiffusersSD3):
        def run_block(self, block, call):
            return replace(super().run_block(block, call), streams=call.streams)

    with pytest.raises(ProbeError, match="differs by"):
        wrap_host("sd3", Stale)


def test_twin_that_chunks_the_text_is_caught():
    class Swapped(DiffusersSD3):
        def read(self, numbers, args, kwargs):
            call = super().read(numbers, args, kwargs)
            return replace(call, x=call.streams["text"], streams={"text": call.x})

    with pytest.raises(HandOverError, match="the blocks got 5 tokens"):
        wrap_host("sd3", Swapped)


def test_twin_with_the_text_of_another_sample_is_caught():
    def turn(call):
        return replace(call, streams={"text": call.streams["text"].roll(1, 0)})

    with pytest.raises(ProbeError, match="differs by"):
        wrap_host("sd3", change_inputs(DiffusersSD3, turn))
    model = wrap_host("sd3", change_inputs(DiffusersSD3, turn), verify=False)
    with pytest.raises(AssertionError):
        check_oracle("sd3", model, 0.5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("skip_layers", [1]),
        ("skip_layers", [0]),
        ("block_controlnet_hidden_states", [torch.zeros(3, 35, 48)]),
    ],
)
def test_options_into_blocks_are_refused(option, value):
    model = wrap_host("sd3")
    with pytest.raises(HostOptionError, match=f"{option} reaches into single blocks"):
        call("sd3", model, **{option: value})
    call("sd3", model)  # and the next call runs


def test_ip_adapters_are_refused():
    model = wrap_host("sd3")
    images = {"ip_adapter_image_embeds": [torch.zeros(3, 1, 4)]}
    with pytest.raises(HostOptionError, match=r"'ip_adapter_image_embeds': .* hands tensors"):
        call("sd3", model, joint_attention_kwargs=images)


def test_plain_attention_options_are_handed_on():
    model, seen = wrap_host("sd3"), []
    model.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["joint_attention_kwargs"]), with_kwargs=True
    )
    out = call("sd3", model)
    assert torch.equal(call("sd3", model, joint_attention_kwargs={}), out)
    assert seen == [None, {}]


def test_one_time_for_the_whole_batch():
    """A condition with one row is the same for all samples, also in groups of them."""
    model = wrap_host("sd3", budget=[0.2, 0.5, 1.0])
    case = find("sd3")
    kwargs = dict(case.inputs(model).kwargs)
    kwargs["timestep"] = kwargs["timestep"][1:2]
    kwargs["pooled_projections"] = kwargs["pooled_projections"][1:2]
    with torch.no_grad():
        whole = case.output(model(**kwargs))
        full = {
            "timestep": kwargs["timestep"].expand(3),
            "pooled_projections": kwargs["pooled_projections"].expand(3, -1),
        }
        spread = case.output(model(**(kwargs | full)))
    torch.testing.assert_close(whole, spread, rtol=0, atol=1e-5)
