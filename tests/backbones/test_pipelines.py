"""Real pipelines before, during and after a wrap of their transformer."""

import copy
import math

import diffusers
import pytest
import torch
from backbones.diffusers_checks import HOSTS, find
from backbones.pipelines import PIPELINES, STEPS, draw, make_pipeline
from peft import LoraConfig, inject_adapter_in_model

import adaptok
from adaptok.errors import BudgetError, FullBudgetWarning

every_pipeline = pytest.mark.parametrize("name", PIPELINES)
FEW = ["Dit", "StableDiffusion3", "Flux"]  # one call of either order, and two calls


def host_of(name, transformer):
    return HOSTS[PIPELINES[name].case].match(transformer)


def wrap(name, pipe, **options):
    options = {"budget": 0.5} | options
    host = host_of(name, pipe.transformer)
    pipe.transformer = adaptok.wrap(pipe.transformer, "dc", backbone=host, **options)
    return pipe.transformer


def trace_draw(name, pipe, **options):
    with adaptok.trace(pipe.transformer) as trace:
        images = draw(name, pipe, **options)
    return images, [step.kept.tolist() for step in trace.steps]


def differ(a, b):
    return float((a - b).abs().max()) > 1e-3


@every_pipeline
def test_before_during_and_after_a_wrap(name):
    pipe = make_pipeline(name)
    before = draw(name, pipe)
    model = wrap(name, pipe)
    assert pipe.transformer is model
    assert pipe.components["transformer"] is model
    with adaptok.budget(model, keep=1.0):
        assert torch.equal(draw(name, pipe), before)
    with adaptok.trace(model) as trace:
        halved = draw(name, pipe)
    grids, kept = {step.grid for step in trace.steps}, [s.kept.tolist() for s in trace.steps]
    grid = math.prod(grids.pop())
    assert not grids
    assert len(kept) == STEPS * PIPELINES[name].calls
    assert all(count == (grid + 1) // 2 for step in kept for count in step)
    assert halved.isfinite().all()
    assert differ(halved, before)
    adaptok.unwrap(model)
    assert torch.equal(draw(name, pipe), before)


@every_pipeline
def test_branches_of_guidance_have_their_own_budgets(name):
    pipe, kind = make_pipeline(name), PIPELINES[name]
    before = draw(name, pipe)
    model = wrap(name, pipe, budget=1.0)
    _, kept = trace_draw(name, pipe)
    full = kept[0][0]
    with adaptok.budget(model, drop=0.0, uncond_drop=0.9):
        images, kept = trace_draw(name, pipe)
    assert differ(images, before)
    halves = {"cond": [], "uncond": []}
    for i, step in enumerate(kept):
        middle = len(step) // 2
        parts = (step[:middle], step[middle:])
        if kind.calls == 2:  # one branch per call
            halves[kind.order[i % 2]] += step
        else:
            for branch, counts in zip(kind.order, parts, strict=True):
                halves[branch] += counts
    assert set(halves["cond"]) == {full}
    assert max(halves["uncond"]) <= 0.25 * full
    assert torch.equal(draw(name, pipe), before)  # the budget ends with its block


@every_pipeline
def test_without_guidance_no_branch_is_needed(name):
    pipe = make_pipeline(name)
    before = draw(name, pipe, guided=False)
    model = wrap(name, pipe)
    _, kept = trace_draw(name, pipe, guided=False)
    assert len(kept) == STEPS
    adaptok.unwrap(model)
    assert torch.equal(draw(name, pipe, guided=False), before)


@pytest.mark.parametrize("name", ["Dit", "StableDiffusion3", "ZImage"])
def test_two_prompts_without_guidance_are_no_branches(name):
    pipe = make_pipeline(name)
    model = wrap(name, pipe)
    apart = pytest.raises(BudgetError, match="which of the 2 samples are unconditional")
    with adaptok.budget(model, drop=0.0, uncond_drop=0.9), apart:
        draw(name, pipe, guided=False)


def test_truncated_guidance_of_z_image():
    """Later steps have the conditional branch only, of as many samples: refused, not mistaken."""
    pipe = make_pipeline("ZImage")
    model = wrap("ZImage", pipe)
    draw("ZImage", pipe, cfg_truncation=0.3)
    apart = pytest.raises(BudgetError, match="which of the 2 samples are unconditional")
    with adaptok.budget(model, drop=0.0, uncond_drop=0.9), apart:
        draw("ZImage", pipe, cfg_truncation=0.3)


def test_skip_layer_guidance_is_refused():
    pipe = make_pipeline("StableDiffusion3")
    wrap("StableDiffusion3", pipe)
    with pytest.raises(adaptok.errors.HostOptionError, match="skip_layers reaches into"):
        draw("StableDiffusion3", pipe, skip_guidance_layers=[1], skip_layer_guidance_stop=1.0)


@every_pipeline
def test_offload_of_whole_models(name):
    """With the CPU as the device to compute on; the hooks are those of a GPU."""
    pipe = make_pipeline(name)
    before = draw(name, pipe)
    model = wrap(name, pipe)
    expected = draw(name, pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(model, "_hf_hook")
    assert torch.equal(draw(name, pipe), expected)
    pipe.remove_all_hooks()
    adaptok.unwrap(model)
    assert torch.equal(draw(name, pipe), before)


@pytest.mark.parametrize("name", FEW)
def test_wrap_of_an_offloaded_model(name):
    """Its probe waits for the first call."""
    pipe = make_pipeline(name)
    before = draw(name, pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    model = wrap(name, pipe, budget=1.0)
    assert torch.equal(draw(name, pipe), before)
    with adaptok.budget(model, keep=0.5):
        assert differ(draw(name, pipe), before)
    adaptok.unwrap(model)
    assert torch.equal(draw(name, pipe), before)


@every_pipeline
def test_half_precision(name):
    pipe = make_pipeline(name)
    model = wrap(name, pipe)
    pipe.to(torch.bfloat16)
    own = {key: p.dtype for key, p in model.named_parameters() if ".adaptok." in key}
    assert own
    assert set(own.values()) == {torch.float32}
    assert model.dtype == torch.bfloat16
    arguments = PIPELINES[name].arguments(guided=True)
    halved = {key: halve(value) for key, value in arguments.items()}
    images, kept = trace_draw(name, pipe, **halved)
    assert images.isfinite().all()
    with adaptok.budget(model, drop=0.0, uncond_drop=0.9):
        draw(name, pipe, **halved)
    full = adaptok.unwrap(model)
    before = draw(name, pipe, **halved)
    wrap(name, pipe, budget=1.0)
    assert torch.equal(draw(name, pipe, **halved), before)
    assert full is model
    assert len(kept) == STEPS * PIPELINES[name].calls


def halve(value):
    if isinstance(value, list):
        return [halve(part) for part in value]
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.bfloat16() if floating else value


@every_pipeline
def test_saved_transformer_is_the_hosts(name, tmp_path):
    pipe = make_pipeline(name)
    weights = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    model = wrap(name, pipe)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not adaptok.is_wrapped(loaded)
    state = loaded.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    expected = draw(name, pipe)
    pipe.transformer = loaded.eval()
    wrap(name, pipe)
    # a fresh wrap has the same prior; loaded weights lie elsewhere in memory, and round otherwise
    torch.testing.assert_close(draw(name, pipe), expected, rtol=0, atol=1e-5)


def add_lora(model, config):
    if hasattr(model, "add_adapter"):
        model.add_adapter(config)
    else:  # DiT and PixArt have no such method
        inject_adapter_in_model(config, model)


@every_pipeline
def test_lora_after_a_wrap_stays(name):
    pipe = make_pipeline(name)
    plain = copy.deepcopy(pipe.transformer)
    model = wrap(name, pipe)
    without = draw(name, pipe)
    layers = ["to_q", "to_k"] if name != "Flux" else ["to_q", "proj_mlp"]
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    torch.manual_seed(3)
    add_lora(model, config)
    assert differ(draw(name, pipe), without)
    with adaptok.budget(model, keep=1.0):
        full = draw(name, pipe)
    adaptok.unwrap(model)
    assert any("lora_A" in key for key in model.state_dict())
    assert torch.equal(draw(name, pipe), full)
    torch.manual_seed(3)
    add_lora(plain, config)  # the same LoRA without a wrap
    pipe.transformer = plain
    assert torch.equal(draw(name, pipe), full)


def test_lora_scale_reaches_the_layers():
    pipe = make_pipeline("Flux")
    model = wrap("Flux", pipe)
    without = draw("Flux", pipe)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    images = [
        draw("Flux", pipe, joint_attention_kwargs={"scale": scale}) for scale in (0.0, 0.5, 1.0)
    ]
    assert torch.equal(images[0], without)
    assert differ(images[1], images[2])


def test_wan_with_two_transformers():
    """High and low noise have a transformer each: each is wrapped by itself."""
    pipe = make_pipeline("Wan")
    other = find("wan").build()
    pipe.register_modules(transformer_2=other)
    pipe.register_to_config(boundary_ratio=0.9)
    model = wrap("Wan", pipe)
    adaptok.wrap(other, "dc", budget=0.5, backbone=host_of("Wan", other))
    with (
        adaptok.budget(model, drop=0.0, uncond_drop=0.9),
        adaptok.budget(other, drop=0.0, uncond_drop=0.5),
        adaptok.trace(model) as high,
        adaptok.trace(other) as low,
    ):
        draw("Wan", pipe, num_inference_steps=4)
    assert len(high.steps) + len(low.steps) == 8
    assert len(high.steps) > 0
    assert len(low.steps) > 0


def test_a_pipeline_itself_is_refused():
    pipe = make_pipeline("Dit")
    with pytest.raises(adaptok.errors.UnsupportedModelError, match="pass its transformer"):
        adaptok.wrap(pipe, "dc")
    with pytest.warns(FullBudgetWarning, match="keeps every cell"):
        wrap("Dit", pipe, budget=None)
    assert isinstance(pipe, diffusers.DiTPipeline)
