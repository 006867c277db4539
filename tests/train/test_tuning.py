import copy

import pytest
import torch

import adaptok
from adaptok.errors import AdaptokError, ConfigError, NotWrappedError
from adaptok.hosts import HostInputs
from adaptok.testing import make_vit
from adaptok.tracing import plain
from adaptok.train.tuning import decay_at, draw_budget, find_trained, measure_distance, tune
from adaptok.train.tuning_loss import (
    choose_batch,
    give_gradients,
    measure_parts,
    rank_dropped,
    relative_distance,
)

IMAGES = [torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(s)) for s in range(3)]


def make_wrapped(**options):
    return adaptok.wrap(make_vit(), **({"chunker": "dc", "budget": 0.5} | options))


def test_plain_is_the_unwrapped_model_even_after_tuning():
    vit = make_wrapped()
    host = make_vit()
    tune(vit, IMAGES, steps=3, lr=1e-2)
    assert not torch.equal(vit(IMAGES[0]), host(IMAGES[0]))
    with plain(vit):
        assert torch.equal(vit(IMAGES[0]), host(IMAGES[0]))
    assert not torch.equal(vit(IMAGES[0]), host(IMAGES[0]))
    assert torch.equal(adaptok.unwrap(vit)(IMAGES[0]), host(IMAGES[0]))


def test_only_router_and_dechunker_change():
    vit = make_wrapped()
    vit.blocks.requires_grad_(True)
    vit.norm.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in vit.named_parameters()}
    before = copy.deepcopy(vit.state_dict())
    report = tune(vit, IMAGES, steps=8)  # some budget of these drops cells
    changed = {n for n, value in vit.state_dict().items() if not torch.equal(value, before[n])}
    assert all(".adaptok." in name for name in changed)
    assert changed == set(report.trained)
    assert any("router" in name for name in changed)
    assert any("dechunker.gate" in name for name in changed)
    assert {name: p.requires_grad for name, p in vit.named_parameters()} == flags
    assert all(p.grad is None for p in vit.parameters())
    assert not vit.training


def test_tuning_brings_outputs_nearer_to_the_teacher():
    vit = make_wrapped()
    before = [measure_distance(vit, IMAGES, keep) for keep in (0.3, 0.6)]
    tokens = mean_tokens(vit)
    report = tune(vit, IMAGES, steps=40, lr=1e-2, budgets=(0.3, 0.6))
    assert mean_tokens(vit) < 0.97 * tokens
    after = [measure_distance(vit, IMAGES, keep) for keep in (0.3, 0.6)]
    assert after[0] < 1.1 * before[0]
    assert len(report.steps) == 40


def mean_tokens(vit):
    with torch.no_grad():
        parts = [measure_parts(vit, vit, HostInputs((x,)), 0.3)["tokens"] for x in IMAGES]
    return float(torch.stack(parts).mean())


def test_training_the_host_too_learns_from_a_copy():
    vit = make_wrapped()
    host = make_vit()
    before = measure_distance(vit, IMAGES, 0.3)
    report = tune(vit, IMAGES, steps=15, lr=1e-3, budgets=(0.3,), train_host=True, host_lr=1e-3)
    assert "blocks.0.mlp.fc1.weight" in report.trained
    assert not torch.equal(vit.blocks[0].mlp.fc1.weight, host.blocks[0].mlp.fc1.weight)
    assert report.mean("output") < 0.7 * report.mean("output", first=True)
    with torch.no_grad(), adaptok.budget(vit, keep=0.3):
        now = relative_distance(vit(IMAGES[0]), host(IMAGES[0]))
    assert now < before


def test_two_tunings_are_the_same_and_another_seed_is_another_one():
    states = []
    for seed in (0, 0, 1):
        vit = make_wrapped()
        torch.manual_seed(len(states))  # nothing depends on the global seed
        tune(vit, lambda step: IMAGES[step % 3], steps=4, seed=seed)
        states.append(vit.state_dict())
    same, other = states[1], states[2]
    assert all(torch.equal(value, same[name]) for name, value in states[0].items())
    assert not all(torch.equal(value, other[name]) for name, value in states[0].items())


def test_a_dit_is_tuned_from_arguments_by_place_and_by_name():
    dit = adaptok.dc.DiT(
        adaptok.dc.DiTConfig(hidden_size=64, depth=2, num_heads=2, latent_size=8, num_classes=3)
    )
    adaptok.testing.models.fill_weights(dit)
    adaptok.wrap(dit, chunker="dc", budget=0.5)
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 600, 990]), torch.arange(4)

    def draw(step):
        return (x, t, y) if step % 2 else {"x": x, "t": t, "y": y}

    before = measure_distance(dit, [(x, t, y)], 0.3)
    report = tune(dit, draw, steps=15, lr=2e-2, budgets=(0.3,))
    assert {"output", "tokens", "ratio", "ranking"} == report.steps[0].parts.keys()
    assert measure_distance(dit, [(x, t, y)], 0.3) < 0.95 * before


def test_routers_without_weights_leave_the_dechunker_to_learn():
    vit = make_wrapped(router="random")
    report = tune(vit, IMAGES, steps=2)
    assert all("dechunker" in name for name in report.trained)


def test_routers_learn_from_ranking_and_the_rest_from_distances():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    parts = {
        "output": (a * b).sum(),
        "ranking": 10 * (a * b).sum(),
        "ratio": 100 * (a * b).sum(),
        "other": 1000 * (a * b).sum(),
    }
    loss = give_gradients(parts, {"ratio": 0.5}, {"a": a, "b": b}, {"a": a})
    assert a.grad.tolist() == [1060.0] * 2
    assert b.grad.tolist() == [1001.0] * 2
    assert float(loss) == 2122.0


def test_ranking_is_lowest_where_wrong_cells_are_wanted_most():
    wrong = torch.tensor([[0.1, 0.4, 0.2, 0.9, 5.0]])
    dropped = torch.tensor([[True, True, True, True, False]])
    logit = wrong.log().clone()
    logit[0, 4] = -9.0  # kept: what is said of it does not count
    good = rank_dropped(logit.sigmoid(), dropped, wrong)
    assert good == pytest.approx(0.0, abs=1e-3)
    assert rank_dropped((-logit).sigmoid(), dropped, wrong) == pytest.approx(2.0, abs=1e-3)
    assert rank_dropped(torch.full((1, 5), 0.3), dropped, wrong) == pytest.approx(1.0, abs=1e-3)


def test_relative_distance():
    target = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    assert relative_distance(target, target) == 0
    assert relative_distance(target.mean(0).expand(2, 2), target) == 1
    assert relative_distance(torch.zeros(1, 2), torch.ones(1, 2)) == 1


def test_budgets_and_learning_rate_follow_from_the_step():
    drawn = [draw_budget((0.3, 0.7), 5, step) for step in range(40)]
    assert drawn == [draw_budget((0.3, 0.7), 5, step) for step in range(40)]
    assert 8 < drawn.count(0.3) < 32
    assert decay_at(0, 10) == 1.0
    assert decay_at(5, 10) == pytest.approx(0.5)


def test_a_failed_tuning_leaves_the_weights_as_they_were():
    vit = make_wrapped()
    before = copy.deepcopy(vit.state_dict())
    bad = [IMAGES[0], torch.full((4, 3, 32, 48), float("nan"))]
    with pytest.raises(AdaptokError, match=r"no number|not a finite number at step 2"):
        tune(vit, bad, steps=4, lr=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert all(p.grad is None for p in vit.parameters())


def test_refusals():
    with pytest.raises(NotWrappedError, match="not wrapped"):
        tune(make_vit(), IMAGES, steps=1)
    vit = make_wrapped()
    with pytest.raises(ConfigError, match="steps is at least 1, got 0"):
        tune(vit, IMAGES, steps=0)
    with pytest.raises(ConfigError, match=r"budgets are fractions .* got \[0.5, 1.2\]"):
        tune(vit, IMAGES, steps=1, budgets=(0.5, 1.2))
    with pytest.raises(ConfigError, match="lr is a positive number"):
        tune(vit, IMAGES, steps=1, lr=0.0)
    with pytest.raises(ConfigError, match="no batch to learn from"):
        tune(vit, [], steps=1)
    with pytest.raises(ConfigError, match=r"a batch is a tensor.* got a str"):
        choose_batch(["image"], 0, vit)
    with pytest.raises(ConfigError, match="at least one batch"):
        measure_distance(vit, [], 0.5)
    for stage in vit.blocks.stages:
        stage.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        find_trained(vit, train_host=False)
