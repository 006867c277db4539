"""Tensors that the published implementation produced, reproduced."""

import pytest
import torch

import adaptok
from adaptok.dc.checkpoint import rename_to_reference
from adaptok.dc.dechunker import smooth_and_spread
from adaptok.losses import ratio_loss


def assert_close(ours, reference):
    limit = 1e-4 * reference.abs().max() + 1e-7
    assert (ours - reference).abs().max() <= limit


@pytest.fixture(params=["padded", "loop"])
def model(golden, request):
    config = adaptok.DCDiTConfig(
        hidden_size=128,
        depth=2,
        num_heads=4,
        latent_size=16,
        num_classes=10,
        attention=request.param,
    )
    model = adaptok.DCDiT(config)
    model.load_reference_state_dict(
        {
            name.removeprefix("weights."): value
            for name, value in golden.items()
            if name.startswith("weights.")
        }
    )
    return model


@pytest.fixture
def inputs(golden):
    return golden["in.x"], golden["in.t"], golden["in.y"]


@pytest.mark.parametrize("rho", ["0.0", "0.3", "0.6"])
def test_outputs_and_masks_by_drop(model, golden, inputs, rho):
    out, routing = model(*inputs, drop=float(rho), return_routing=True)
    assert torch.equal(routing.keep_mask, golden[f"rho{rho}.keep_mask"].bool())
    assert_close(out, golden[f"rho{rho}.out"])
    assert_close(routing.keep_prob, golden["rho0.0.keep_prob"])
    assert torch.equal(routing.natural_mask, golden["rho0.0.keep_mask"].bool())


def test_drop_per_sample(model, golden, inputs):
    out, routing = model(*inputs, drop=golden["per_sample.rho"], return_routing=True)
    assert torch.equal(routing.keep_mask, golden["per_sample.keep_mask"].bool())
    assert_close(out, golden["per_sample.out"])


def test_intermediates(model, golden, inputs):
    seen = {}
    for name in ("encoder", "chunker", "backbone", "decoder"):
        part = getattr(model, name)
        part.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    model(*inputs)
    assert_close(seen["encoder"], golden["rho0.0.encoder"])
    chunks, plan = seen["chunker"]
    reference = golden["rho0.0.chunk"]
    for sample, length in enumerate(plan.lengths):
        ours = chunks.x[plan.ptr[sample] : plan.ptr[sample + 1]]
        assert_close(ours, reference[sample, :length])
    assert_close(seen["backbone"], golden["rho0.0.backbone_packed"][0])
    spread = smooth_and_spread(chunks.with_x(seen["backbone"]), plan, 1.0)
    assert_close(spread, golden["rho0.0.dechunk"])
    assert_close(seen["decoder"], golden["rho0.0.decoder"])


def test_ratio_losses(model, golden, inputs):
    _, routing = model(*inputs, drop=0.6, return_routing=True)
    assert_close(ratio_loss(routing, 4.0), golden["rho0.0.ratio_loss_N4"])
    assert_close(ratio_loss(routing, 4.0, 2), golden["rho0.0.ratio_loss_N4_groups2"])


def test_guidance_and_lite_cfg(model, golden, inputs):
    x, t, y = inputs
    both = (x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, 10)]))
    assert_close(model.forward_with_cfg(*both, 1.5), golden["cfg1.5.out"])
    lite = model.forward_with_cfg(*both, 1.25, drop=0.0, uncond_drop=0.9)
    assert_close(lite, golden["litecfg1.25_rho0.9.out"])
    # the second half of x is not read, as in DiT
    garbage = torch.cat([x, torch.randn_like(x)])
    assert torch.equal(
        model.forward_with_cfg(garbage, *both[1:], 1.5, drop=0.0)[:4],
        model.forward_with_cfg(*both, 1.5, drop=0.0)[:4],
    )


def test_all_parameter_gradients(model, golden, inputs):
    out, routing = model(*inputs, drop=0.3, return_routing=True)
    loss = out.square().mean() + 0.03 * ratio_loss(routing, 4.0, None)
    assert_close(loss, golden["grad.rho0.3.loss"])
    loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        reference = golden.get(f"grad.rho0.3.{rename_to_reference(name)}")
        if reference is None:
            assert name == "position"
            continue
        assert_close(parameter.grad, reference)
        compared += 1
    assert compared == sum(name.startswith("grad.") for name in golden) - 1 == 90


def test_published_names_come_back(model, golden):
    names = {name.removeprefix("weights.") for name in golden if name.startswith("weights.")}
    state = model.reference_state_dict()
    assert state.keys() == names
    for name in names:
        assert torch.equal(state[name], golden[f"weights.{name}"]), name
