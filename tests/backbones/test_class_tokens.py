"""Whether the first token is a class token, against the weights that make it."""

from dataclasses import replace

import pytest
import torch
from backbones.diffusers_checks import HOSTS
from backbones.host_checks import find_case

import adaptok
from adaptok import ListBackbone
from adaptok.backbones.timm_vit import TimmViT
from adaptok.calls import Observer
from adaptok.errors import ConfigError, UnsupportedModelError
from adaptok.testing import make_vit
from adaptok.tracing import observe
from adaptok.wrapping import resolve_backbone
from benchmarks.architectures import CASES

TOWERS = [case.name for case in CASES if case.family in ("timm", "transformers")]
DITS = [f"diffusers/{name}" for name in HOSTS] + ["facebook/dit", "facebook/sit"]
CLASS = ("cls_token", "class_embedding")


class Entry(Observer):
    """Keeps what entered the block list."""

    call = None

    def note_entry(self, call):
        self.call = call


def watch(model, host):
    """Run the adapter's own example and return the call that entered the blocks."""
    entry, inputs = Entry(), host.example(model)
    with observe(model, entry), torch.no_grad():
        model(*inputs.args, **inputs.kwargs)
    return entry.call


def check_class(name, backbone="auto"):
    """has_class is true where moving the class token's weights moves row 0 and no other."""
    model = find_case(name).build()
    host = resolve_backbone(model, backbone)
    adaptok.wrap(model, "dc", budget=0.5, backbone=host, verify=False)
    call = watch(model, host)
    weights = [w for key, w in model.named_parameters() if key.split(".")[-1] in CLASS]
    moved = []
    if weights:
        with torch.no_grad():
            for weight in weights:  # not evenly: a norm before the blocks would take it out
                weight += torch.linspace(0.0, 3.0, weight.numel()).view_as(weight)
        change = (watch(model, host).x - call.x).abs().amax(dim=(0, 2))
        moved = (change > 1e-3).nonzero().flatten().tolist()
    assert moved == ([0] if call.has_class else [])
    assert call.start > 0 or not call.has_class
    assert call.timestep is None
    return call


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_says_whether_it_has_a_class_token(name):
    try:
        check_class(name)
    except UnsupportedModelError:
        # windows or a hierarchy instead of one grid: there are no blocks to hand a class token to
        pytest.skip("this host is refused by wrap, with its reason (docs/hosts.md)")


@pytest.mark.parametrize(
    ("name", "start", "has_class"),
    [
        ("timm/vit_medium_patch16_reg4_gap_256", 4, False),
        ("timm/naflexvit_base_patch16_gap", 4, False),
        ("timm/vit_small_patch14_reg4_dinov2", 5, True),
        ("timm/deit_tiny_distilled_patch16_224", 2, True),
        ("timm/vit_base_patch16_siglip_224", 0, False),
        ("transformers/dinov3", 5, True),
        ("transformers/siglip", 0, False),
        ("transformers/ijepa", 0, False),
    ],
)
def test_tokens_in_front_do_not_say_so(name, start, has_class):
    call = check_class(name)
    assert (call.start, call.has_class) == (start, has_class)


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("timm/vit_medium_patch16_reg4_gap_256", lambda call: call.start > 0),
        ("timm/vit_small_patch14_reg4_dinov2", lambda call: call.start == 1),
        ("timm/vit_wee_patch16_reg1_gap_256", lambda call: call.start == 1),
    ],
)
def test_an_adapter_that_guesses_by_the_prefix_is_caught(name, guess):
    class Guess(TimmViT):
        def read(self, *given):
            call = super().read(*given)
            return replace(call, has_class=guess(call))

    model = find_case(name).build()
    with pytest.raises(AssertionError):
        check_class(name, Guess.match(model))


@pytest.mark.parametrize("name", DITS)
def test_no_diffusion_transformer_has_one(name):
    model = find_case(name).build()
    host = resolve_backbone(model, "auto")
    adaptok.wrap(model, "dc", budget=0.5, backbone=host, verify=False)
    assert not watch(model, host).has_class


def test_fewer_tokens_keep_it():
    model = make_vit()
    host = resolve_backbone(model, "auto")
    seen, run = [], host.run
    host.run = lambda block, index, call: seen.append(call) or run(block, index, call)
    adaptok.wrap(model, "dc", budget=[0.25, 0.5], backbone=host, verify=False)
    watch(model, host)
    assert {call.num_cells for call in seen} == {6, 12}
    assert all(call.has_class and call.timestep is None for call in seen)


@pytest.mark.parametrize("has_class", [True, False])
def test_a_described_model_says_so_itself(has_class):
    model = make_vit()
    host = ListBackbone(blocks="blocks", grid=(4, 6), prefix=1, has_class=has_class)
    adaptok.wrap(model, "dc", budget=0.5, backbone=host)
    entry = Entry()
    with observe(model, entry), torch.no_grad():
        model(torch.randn(2, 3, 32, 48))
    assert entry.call.has_class is has_class


def test_a_class_token_needs_a_token_in_front():
    with pytest.raises(ConfigError, match="prefix is 0"):
        ListBackbone(blocks="blocks", grid=(4, 6), has_class=True)
