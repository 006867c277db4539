"""What was fitted to data goes with an adapter: a loaded model behaves as the saved one did."""

import json

import pytest
import torch
from adaptok_cache import TeaCache

import adaptok
from adaptok.adapters import CARD, load, save
from adaptok.calibrated import read_settings
from adaptok.calibrating import calibrate
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DiTConfig
from adaptok.errors import CheckpointError
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights

STACK = ["exit", {"name": "tome", "r": 2}]
IMAGES = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(2))
STEPS = (900.0, 750.0, 600.0, 450.0, 300.0, 150.0, 50.0, 10.0)


def make_wrapped(**options):
    torch.manual_seed(0)
    return adaptok.wrap(make_vit(), **({"stack": STACK} | options))


def describe(model):
    return repr(model.blocks)


@pytest.fixture(scope="module")
def fitted():
    model = make_wrapped()
    model.blocks.adaptok["tome"].change_merging(None, 0.3)
    model.blocks.adaptok["exit"].set_threshold([0.7, 0.9])
    return model


@pytest.fixture
def folder(fitted, tmp_path):
    save(fitted, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **settings):
    card = json.loads((folder / CARD).read_text())
    card["settings"].update(settings)
    (folder / CARD).write_text(json.dumps(card))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_threshold_of_tome_goes_with_the_adapter(fitted, folder, wrapped):
    other = make_wrapped() if wrapped else make_vit()
    load(other, folder)
    with torch.no_grad():
        assert torch.equal(other(IMAGES), fitted(IMAGES))
        assert not torch.equal(make_wrapped()(IMAGES), fitted(IMAGES)), "a threshold should matter"
    assert describe(other) == describe(fitted)
    assert "threshold=0.3" in describe(other)
    assert "thresholds 0.7, 0.9" in describe(other)
    assert other.blocks.adaptok["tome"].r is None
    save(other, folder)
    assert describe(load(make_vit(), folder)) == describe(fitted)


def walk(model, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x, clean = (torch.randn(2, 4, 8, 12, generator=generator) for _ in range(2))
    outs = []
    for i, t in enumerate(STEPS):
        step = x + scale * 0.1 * i**2 * clean
        outs.append(model(step, torch.full((2,), t), torch.tensor([1, 2])))
    return outs


def make_dit():
    config = DiTConfig(hidden_size=64, depth=3, num_heads=4, latent_size=(8, 12), num_classes=5)
    return fill_weights(DiT(config)).eval()


def test_a_polynomial_of_teacache_goes_with_the_adapter(tmp_path):
    model = adaptok.wrap(make_dit(), stack=[TeaCache(0.4)])
    walks = [
        lambda m, seed=seed, scale=scale: walk(m, seed, scale) for seed, scale in enumerate((1, 2))
    ]
    calibrate(model, walks, wanted={"teacache": {"degree": 2}}).apply(model)
    save(model, tmp_path / "adapter")
    other = load(make_dit(), tmp_path / "adapter")
    stages = [some.blocks.stages[0] for some in (model, other)]
    assert stages[0].coefficients == stages[1].coefficients != TeaCache().coefficients
    assert stages[1].threshold == 0.4
    found = []
    for some in (model, other):
        with torch.no_grad(), adaptok.request(some, "one"):
            found.append(walk(some))
    assert all(map(torch.equal, *found))
    assert stages[0].reused == stages[1].reused > 0
    assert stages[0].describe() == stages[1].describe()


def test_numbers_of_tome_from_a_profile_go_with_the_adapter(tmp_path):
    model = make_wrapped(stack=STACK[1:])
    calibrate(model, [IMAGES[:2], IMAGES[2:]]).apply(model)
    assert sum(model.blocks.adaptok["tome"].r) == 6
    save(model, tmp_path / "adapter")
    other = load(make_vit(), tmp_path / "adapter")
    assert describe(other) == describe(model)
    assert other.blocks.adaptok["tome"].r == model.blocks.adaptok["tome"].r
    with torch.no_grad():
        assert torch.equal(other(IMAGES), model(IMAGES))


def test_an_adapter_without_settings_leaves_those_of_the_model(folder):
    card = json.loads((folder / CARD).read_text())
    del card["settings"]  # as an earlier adaptok wrote it
    (folder / CARD).write_text(json.dumps(card))
    other = make_wrapped()
    other.blocks.adaptok["tome"].r = 3
    assert load(other, folder).blocks.adaptok["tome"].r == 3
    assert load(make_vit(), folder).blocks.adaptok["tome"].r == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tome": {"threshold": 7.0, "r": None}}, "do not fit its wrap: threshold is a cosine"),
        ({"tome": {"r": 1}}, "settings of 'tome' are threshold, r, got r"),
        ({"evit": {"r": 1}}, "settings of the stage 'evit', and among exit, tome there is none"),
    ],
)
def test_settings_that_do_not_fit_are_refused_and_change_nothing(folder, settings, message):
    edit(folder, exit={"threshold": 0.6}, **settings)
    other, plain = make_wrapped(), make_vit()
    before = read_settings(other.blocks.adaptok)
    with pytest.raises(CheckpointError, match=f"settings of the adapter .*{message}"):
        load(other, folder)
    assert read_settings(other.blocks.adaptok) == before
    assert before["exit"] == {"threshold": None}
    with pytest.raises(CheckpointError, match=message):
        load(plain, folder)
    assert not adaptok.is_wrapped(plain)


def test_weights_that_do_not_fit_leave_the_settings_as_they_were(folder, monkeypatch):
    def fail(*args):
        raise CheckpointError("no weights")

    monkeypatch.setattr("adaptok.adapters.fill_weights", fail)
    other = make_wrapped()
    before = read_settings(other.blocks.adaptok)
    with pytest.raises(CheckpointError, match="no weights"):
        load(other, folder)
    assert read_settings(other.blocks.adaptok) == before


@pytest.mark.parametrize(
    ("stage", "name", "value", "make"),
    [
        ("evit", "keep_rate", 0.3, make_vit),
        ("teacache", "threshold", 0.4, make_dit),
        ("firstblock", "threshold", 0.3, make_dit),
    ],
)
def test_what_is_assigned_after_a_wrap_goes_with_the_adapter(tmp_path, stage, name, value, make):
    model = adaptok.wrap(make(), stack=[stage])
    before = describe(model)
    setattr(model.blocks.adaptok[stage], name, value)
    save(model, tmp_path / "adapter")
    other = load(make(), tmp_path / "adapter")
    assert getattr(other.blocks.adaptok[stage], name) == value
    assert describe(other) == describe(model) != before
    wrong = {"evit": -1.0, "teacache": -0.5, "firstblock": float("nan")}[stage]
    card = json.loads((tmp_path / "adapter" / CARD).read_text())
    card["settings"][stage][name] = wrong
    (tmp_path / "adapter" / CARD).write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="do not fit its wrap"):
        load(make(), tmp_path / "adapter")
