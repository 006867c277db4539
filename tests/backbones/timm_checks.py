"""What every timm host must pass beside `host_checks`, and blocks run by hand."""

import copy
import dataclasses

import pytest
import torch
from backbones.host_checks import check_loop_oracle, find_case, run
from torch import nn

import adaptok
from adaptok.backbones.timm_beit import TimmBeit
from adaptok.backbones.timm_eva import TimmEva
from adaptok.backbones.timm_naflex import TimmNaFlex
from adaptok.backbones.timm_relpos import TimmRelPos
from adaptok.backbones.timm_vit import TimmViT
from adaptok.calls import TokenInput
from adaptok.errors import HostOptionError, ProbeError
from benchmarks.architectures import CASES
from benchmarks.architectures.case import build_quietly

HOSTS = {
    "VisionTransformer": TimmViT,
    "VisionTransformerDistilled": TimmViT,
    "Eva": TimmEva,
    "Beit": TimmBeit,
    "VisionTransformerRelPos": TimmRelPos,
    "NaFlexVit": TimmNaFlex,
}


def host_of(model):
    return HOSTS[type(model).__name__].match(model)


EVA = [
    "eva_giant_patch14_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch16_clip_224",
    "eva02_enormous_patch14_clip_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_lingbot",
    "vit_base_patch16_sapiens2",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_base_patch16_rope_reg1_gap_256",
    "vit_pe_core_tiny_patch16_384",
    "vit_pe_spatial_tiny_patch16_512",
]
BIASED = [
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "vit_relpos_small_patch16_224",
    "vit_srelpos_small_patch16_224",
]
NAFLEX = [
    "naflexvit_base_patch16_gap",
    "naflexvit_base_patch16_siglip",
    "naflexvit_base_patch16_parfac_gap",
]
ALL = [case.name.removeprefix("timm/") for case in CASES if case.family == "timm"]
VIT = [name for name in ALL if name not in EVA + BIASED + NAFLEX and ", " not in name]


def make_case(name, make, **changes):
    """A case of the catalogue with another model of the same kind in it."""
    return dataclasses.replace(find_case(name), build=build_quietly(make), **changes)


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def check_near_identity(case):
    """At full budget within 1e-5 of the host, with every part run; unwrap gives it back exactly."""
    model = case.build()
    inputs = case.inputs(model)
    expected = run(case, model, inputs)
    adaptok.wrap(model, "dc", budget=1.0, backbone=host_of(model))
    with adaptok.trace(model) as seen:
        found = run(case, model, inputs)
    assert seen.steps[0].kept.tolist() == [seen.steps[0].plans[0].keep_mask.shape[1]] * len(found)
    assert relative(found, expected) <= 1e-5
    assert torch.equal(run(case, adaptok.unwrap(model), inputs), expected)


def check_checkpointing(case):
    """Gradients with the host's checkpointing are those without it, at half the budget."""
    model = case.build()
    inputs = case.inputs(model)
    adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
    model.train()
    grads = []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        torch.manual_seed(0)
        case.run(model, inputs).square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    moved = [name for name, grad in grads[0].items() if grad.abs().max() > 0]
    assert {name.split(".")[1] for name in moved if name.startswith("blocks.")} >= {"0", "3"}
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def check_ways_in_and_refusals(case):
    """`forward_features` works; whoever wants single blocks is told, and the model still works."""
    model = case.build()
    inputs = case.inputs(model)
    with torch.no_grad():
        expected = model.forward_features(*inputs.args)
        out = case.run(model, inputs)
    adaptok.wrap(model, "dc", budget=1.0, backbone=host_of(model))
    with torch.no_grad():
        assert relative(model.forward_features(*inputs.args), expected) <= 1e-5
    calls = [
        lambda: model.forward_intermediates(*inputs.args, indices=1),
        lambda: model.forward_intermediates(*inputs.args, indices=1, stop_early=True),
        lambda: model.prune_intermediate_layers(1),
    ]
    if hasattr(model, "get_intermediate_layers"):
        calls.append(lambda: model.get_intermediate_layers(*inputs.args, n=2))
    for call in calls:
        with pytest.raises(HostOptionError, match=r"single blocks.*unwrap"):
            call()
    assert relative(run(case, model, inputs), out) <= 1e-5


def record_host(model, inputs):
    """Run a bare host; return what it gives each block by name."""
    seen = []
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
        )
        for block in model.blocks.children()
    ]
    with torch.no_grad():
        model(*inputs.args, **inputs.kwargs)
    for handle in handles:
        handle.remove()
    return seen


def run_rows(prefix, recorded):
    """Blocks by hand on some rows of one sample, with those rows of tables and pairs of masks."""

    def by_hand(blocks, args, kwargs, rows):
        x = args[0][:, rows]
        for block, given in zip(blocks, recorded, strict=True):
            taken = {}
            for name in ("shared_rel_pos", "shared_rel_pos_bias"):
                if given.get(name) is not None:
                    taken[name] = given[name][..., rows, :][..., rows]
            if given.get("rope") is not None:
                taken["rope"] = given["rope"][..., rows[prefix:] - prefix, :]
            x = run_with_own_bias(block, x, rows, taken)
        return x

    return by_hand


def run_with_own_bias(block, x, rows, taken):
    """Run a block itself, on the rows of the bias that it makes."""
    attn = getattr(block, "attn", None)
    block = copy.deepcopy(block)
    if getattr(attn, "relative_position_bias_table", None) is not None:
        bias = attn._get_rel_pos_bias()[:, :, rows][..., rows]
        block.attn._get_rel_pos_bias = lambda: bias
    if getattr(attn, "rel_pos", None) is not None:
        bias = attn.rel_pos.get_bias()[:, :, rows][..., rows]
        block.attn.rel_pos = Fixed(bias)
    return block(x, **taken)


class Fixed(nn.Module):
    """A bias of relative positions that is given."""

    def __init__(self, bias):
        super().__init__()
        self.bias = bias

    def get_bias(self):
        return self.bias


class FirstRows(TokenInput):
    """A wrong input: the first rows instead of those of the kept cells."""

    def take(self, places, n, samples):
        first = torch.arange(places.shape[1]).expand_as(places)
        return super().take(first, n, samples)


def with_first_rows(inputs):
    """Return per-token inputs that give the first rows to few tokens."""
    return {name: FirstRows(given.value, given.axes, given.start) for name, given in inputs.items()}


def check_twin_is_caught_by_oracle(case, twin):
    """A wrong adapter passes the identity, and fails against the blocks by hand."""
    model = case.build()
    inputs = case.inputs(model)
    recorded = record_host(model, inputs)
    adaptok.wrap(model, "dc", router="norm", budget=0.5, backbone=twin.match(model))
    with pytest.raises(AssertionError):
        check_loop_oracle(case, model, inputs, run_rows(case.prefix, recorded))


def check_twin_is_caught_by_probe(case, twin):
    """A wrong adapter does not get past a wrap, and leaves the model alone."""
    model = case.build()
    with pytest.raises(ProbeError, match="every cell kept"):
        adaptok.wrap(model, "dc", budget=0.5, backbone=twin.match(model))
    assert not adaptok.is_wrapped(model)


def check_oracle(case):
    """Each sample's kept tokens are those of the host's own blocks on it alone."""
    model = case.build()
    inputs = case.inputs(model)
    recorded = record_host(model, inputs)
    adaptok.wrap(model, "dc", router="norm", budget=0.5, backbone=host_of(model))
    check_loop_oracle(case, model, inputs, run_rows(case.prefix, recorded))


def check_dropped_patches(model, images):
    """Training with patch dropout is refused, eval mode runs."""
    adaptok.wrap(model.train(), "dc", budget=0.5, backbone=host_of(model))
    assert model.training
    with pytest.raises(HostOptionError, match=r"tokens, and .* make .*patch_drop_rate=0"):
        model(images)
    assert model.eval()(images).shape[0] == len(images)
