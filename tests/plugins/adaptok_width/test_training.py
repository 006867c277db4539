"""Training: masks, gradients, losses, and a tiny model that learns to use half its width."""

import copy

import pytest
import torch
from adaptok_width import (
    anneal_target,
    count_ratio,
    find_stage,
    full_width,
    training_losses,
    width_loss,
)
from adaptok_width.masks import draw_noise, hard_mask
from width_oracles import make_dc, make_inputs, make_research, run_oracle, wrap_width

import adaptok
from adaptok.errors import ConfigError, NotWrappedError


def test_hard_masks_are_zero_and_one_with_the_gradient_of_a_sigmoid():
    logits = torch.linspace(-9.0, 9.0, 1001, requires_grad=True)
    mask = hard_mask(logits, 5.0)
    assert set(mask.tolist()) == {0.0, 1.0}
    mask.sum().backward()
    p = (logits.detach() / 5).sigmoid()
    assert torch.allclose(logits.grad, p * (1 - p) / 5)


def test_noise_is_logistic():
    torch.manual_seed(0)
    noise = draw_noise((200_000,), torch.zeros(1))
    for logit in (-1.0, 0.0, 2.0):  # P(logit + noise > 0) is the sigmoid
        found = (logit + noise > 0).float().mean()
        assert abs(found - torch.tensor(logit).sigmoid()) < 0.01


def test_ratio_counts_products():
    width, hidden, n = 8, 32, 5
    attention = n * 4 * width * width + 2 * n * n * width
    mlp = 2 * n * width * hidden
    shares = torch.tensor([[0.5, 0.25, 0.4], [1.0, 1.0, 1.0]])
    found = count_ratio(*shares.unbind(1), count=n, width=width, hidden=hidden)
    expected = (attention * 0.5 + mlp * 0.25 * 0.4) / (attention + mlp)
    assert torch.allclose(found, torch.tensor([expected, 1.0]))


def test_loss_is_of_the_mean():
    assert width_loss(torch.tensor([0.2, 0.8]), 0.5) == 0.0
    assert width_loss(torch.tensor([1.0, 1.0]), 0.5) == pytest.approx(0.5)


def test_target_goes_down_and_stays():
    assert [anneal_target(step, 4, 0.6) for step in range(6)] == pytest.approx(
        [1.0, 0.9, 0.8, 0.7, 0.6, 0.6]
    )
    assert anneal_target(0, 0, 0.6) == 0.6
    with pytest.raises(ConfigError, match="counted from 0, got step -1"):
        anneal_target(-1, 4, 0.6)


@pytest.mark.parametrize("make", [make_dc, make_research])
def test_training_without_noise_is_eval(make, monkeypatch):
    plain = make()
    model, stage = wrap_width(copy.deepcopy(plain))
    inputs = make_inputs(model)
    expected = run_oracle(plain, stage, inputs)
    monkeypatch.setattr("adaptok_width.gates.draw_noise", lambda shape, like: torch.zeros(shape))
    stage.train()  # the host stays: it would draw classes
    with torch.no_grad():
        found = model(*inputs)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_noise_changes_the_masks_of_training():
    model, stage = wrap_width(make_dc())
    inputs = make_inputs(model)
    stage.train()
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(model(*inputs), model(*inputs))


def test_a_gradient_reaches_routers_and_host():
    model, _ = wrap_width(make_dc())
    inputs = make_inputs(model)
    model.train()
    with adaptok.collect_losses(model) as losses:
        out = model(*inputs)
    ((out**2).mean() + losses["width"]).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    step = next(p for n, p in model.named_parameters() if n.endswith("gates.step.weight"))
    assert bool((step.grad.flatten(1).abs().sum(1) > 0).all())


def test_eval_with_gradients_reaches_the_host_through_cut_weights():
    plain = make_dc()
    model, stage = wrap_width(copy.deepcopy(plain))
    inputs = make_inputs(model, times=(420.0,))
    stage.tabulate(inputs[1])
    for _ in range(2):  # nothing that was cut with a gradient is kept
        model.zero_grad()
        (model(*inputs) ** 2).sum().backward()
    weight = next(p for n, p in model.named_parameters() if n.endswith("0.mlp.fc1.weight"))
    groups = stage.read_masks(inputs[1].tolist()).groups[:, 0].any(0)
    used = weight.grad.abs().sum(1).unflatten(0, (len(groups), -1)).sum(1) > 0
    assert torch.equal(used, groups)
    assert not bool(groups.all())


def test_checkpointing_gives_the_same_gradients():
    def gradients(checkpointing):
        model, _ = wrap_width(make_dc())
        model.config = model.config.model_copy(update={"gradient_checkpointing": checkpointing})
        model.train()
        runs = []
        model.get_submodule("blocks.0.norm1").register_forward_pre_hook(lambda *_: runs.append(1))
        torch.manual_seed(5)
        with adaptok.collect_losses(model) as losses:
            out = model(*make_inputs(model))
            total = (out**2).mean() + losses["width"]
            total.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, runs, losses

    plain, once, loss = gradients(False)
    found, twice, same = gradients(True)
    assert (len(once), len(twice)) == (1, 2)
    assert torch.equal(loss["width"], same["width"])
    for name, gradient in plain.items():
        assert torch.allclose(found[name], gradient, atol=1e-6), name


def test_the_loss_is_what_masks_say():
    model, stage = wrap_width(make_dc(), gate_tokens=False, target=0.3)
    inputs = make_inputs(model)
    with torch.no_grad(), adaptok.collect_losses(model) as losses:
        model(*inputs)
    masks = stage.read_masks(inputs[1].tolist())
    heads, groups = (x.float().mean(2) for x in (masks.heads, masks.groups))
    ratio = count_ratio(heads, groups, torch.tensor(1.0), count=16, width=96, hidden=384)
    assert float(losses["width"]) == pytest.approx(2 * (float(ratio.mean()) - 0.3) ** 2, rel=1e-4)


def test_full_width_is_the_host():
    plain = make_dc()
    model, stage = wrap_width(copy.deepcopy(plain))
    inputs = make_inputs(model)
    with torch.no_grad(), full_width(model), adaptok.collect_losses(model) as losses:
        found, expected = model(*inputs), plain(*inputs)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert not losses
    assert not stage.complete


def test_helpers_need_the_stage():
    with pytest.raises(NotWrappedError, match="DiT has no width stage"):
        find_stage(make_dc())


def test_a_tiny_model_learns_to_use_half_its_width():
    model = make_dc()
    torch.manual_seed(0)
    adaptok.wrap(model, stack=[{"name": "width", "target": 0.5}])
    stage = find_stage(model)
    x, t, y = make_inputs(model, b=8, times=(900.0, 650.0, 420.0, 30.0))
    with torch.no_grad():
        goal = model(x, t, y).clone()

    def compute():
        return ((model(x, t, y) - goal) ** 2).mean()

    model.train()
    optimizer = torch.optim.Adam(stage.parameters(), lr=0.1)
    for step in range(100):
        stage.anneal(step, 30)
        losses = training_losses(model, compute)
        assert sorted(losses) == ["complete", "dynamic", "width"]
        optimizer.zero_grad()
        (losses["dynamic"] + losses["complete"] + 4 * losses["width"]).backward()
        optimizer.step()
    assert stage.current_target == 0.5
    found = {}
    stage.current_target = 0.0  # the loss is 2 ratio^2
    for mode in (True, False):  # drawn, and decided
        model.train(mode)
        with torch.no_grad(), adaptok.collect_losses(model) as losses:
            model(x, t, y)
        found[mode] = (float(losses["width"]) / 2) ** 0.5
    assert abs(found[True] - 0.5) < 0.1
    assert abs(found[False] - 0.5) < 0.2
