import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptok import DCDiTConfig
from adaptok.dc.config import DiTConfig
from adaptok.errors import ConfigError
from adaptok.train.config import (
    TrainConfig,
    check_fit,
    check_same_run,
    drop_at,
    ema_decay_at,
    find_latent_shape,
    fit_model_to_data,
    learning_rate_at,
    open_stream,
)
from adaptok.train.vae import LatentSource


@pytest.mark.parametrize(
    "model",
    [
        DCDiTConfig(scale="B", in_channels=12, dechunk_sigma=2.0),
        DiTConfig(hidden_size=64, num_heads=2, latent_size=(8, 12), patch_size=4),
    ],
)
def test_config_returns_from_json_with_the_kind_of_its_model(model, tmp_path):
    config = TrainConfig(model=model, objective="flow", flow_shift=2.0, drops=(0, 0.5))
    config.to_json_file(tmp_path / "c.json")
    again = TrainConfig.from_json_file(tmp_path / "c.json")
    assert again == config
    assert type(again.model) is type(model)
    kind = json.loads(config.to_json())["model"]["kind"]
    assert kind == type(model).__name__.removesuffix("Config")


def test_model_without_kind_is_dcdit():
    config = TrainConfig(model={"hidden_size": 64, "num_heads": 2})
    assert config.model == DCDiTConfig(hidden_size=64, num_heads=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": {"kind": "UNet"}}, "'UNet' is no kind of model: known are DCDiT, DiT"),
        ({"model": {"kind": "DiT", "dechunk_sigma": 1.0}}, "dechunk_sigma: this option does not"),
        ({"model": {"hidden_size": 33}}, "hidden_size=33 is no multiple"),
        ({"learning_rat": 1.0}, "learning_rat: this option does not exist"),
        ({"learning_rate": 0.0}, "learning_rate: .* got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate: .* got nan"),
        ({"steps": 0}, "steps: .* got 0"),
        ({"drops": (0.1, 1.0)}, r"drops\.1: Input should be less than 1; got 1.0"),
        ({"drops": ()}, "drops: .* at least 1 item"),
        ({"precision": "fp8"}, "precision: .* got 'fp8'"),
        ({"ema_decay": 1.0}, "ema_decay: .* got 1.0"),
        ({"batch_size": 10, "accumulation": 4}, "batch_size=10 is no multiple of accumulation=4"),
        ({"flow_shift": 3.0}, 'flow_times and flow_shift need objective="flow"'),
        ({"data": "photos", "categories": ("Food",)}, "choose emoji, but data is 'photos'"),
        ({"seed": -1}, "seed: .* got -1"),
        ({"latents": {"channels": 4, "factor": 8}}, "cells already, got space_to_depth=2: set sp"),
        ({"latents": {"channels": 0, "factor": 8}}, "channels: .* got 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 4}, "in_channels=4 where 12 is needed"),
        ({"latent_size": 16}, r"latent_size=\(16, 16\) where 8 is needed"),
        ({"num_classes": 1000}, "num_classes=1000 where 3 is needed"),
        ({"learn_sigma": False}, "learn_sigma=False where True is needed.*'hybrid'"),
    ],
)
def test_model_that_does_not_fit_its_data_is_refused_with_the_right_number(
    make_config, options, message
):
    config = make_config()
    check_fit(config, 3)
    model = DCDiTConfig(**(config.model.model_dump() | options))
    with pytest.raises(ConfigError, match=message):
        check_fit(make_config(fit=False, model=model), 3)


def test_one_class_is_refused_unless_no_class_is_dropped(make_config):
    one = fit_model_to_data(make_config(data="faces"), 1)
    with pytest.raises(ConfigError, match=r"faces has one class, and class_dropout=0.1 .*set cl"):
        check_fit(one, 1)
    check_fit(fit_model_to_data(make_config(class_dropout=0.0), 1), 1)


def test_sizes_of_latents_follow_from_their_autoencoder():
    source = LatentSource(channels=4, factor=8)
    config = TrainConfig(latents=source, space_to_depth=1, image_size=64, data="cache")
    assert find_latent_shape(config) == (4, 8, 8)
    fitted = fit_model_to_data(config, 3)
    assert (fitted.model.grid, fitted.model.in_channels) == ((8, 8), 4)
    assert fitted.latents == source
    with pytest.raises(ConfigError, match=r"latent_size=\(32, 32\) where 8.*encoder of 4 ch"):
        check_fit(config, 1000)
    with pytest.raises(ConfigError, match="image_size=60 is no multiple of the autoencoder's fact"):
        fit_model_to_data(config.model_copy(update={"image_size": 60}), 3)


def test_a_run_goes_on_after_its_autoencoder_moved_and_with_no_other():
    source = LatentSource(channels=4, factor=8, name="here", weights_hash="a", config_hash="b")
    run = {"space_to_depth": 1, "data": "cache"}
    saved = json.loads(TrainConfig(latents=source, **run).to_json())
    moved = source.model_copy(update={"name": "there"})
    check_same_run(TrainConfig(latents=moved, **run), saved)
    for change in ({"weights_hash": "c"}, {"cache_hash": "c"}):
        other = source.model_copy(update=change)
        with pytest.raises(ConfigError, match=f"latents.{next(iter(change))}=.* and 'c' came"):
            check_same_run(TrainConfig(latents=other, **run), saved)


def test_flow_refuses_a_model_with_variance(make_config):
    config = make_config(fit=False, objective="flow", model=make_config().model)
    with pytest.raises(ConfigError, match="learn_sigma=True where False is needed"):
        check_fit(config, 3)
    check_fit(fit_model_to_data(config, 3), 3)


def test_fitting_changes_only_the_sizes_of_the_model(make_config):
    model = DiTConfig(hidden_size=64, num_heads=2, depth=3, patch_size=4)
    config = make_config(fit=False, model=model, space_to_depth=4, seed=5)
    fitted = fit_model_to_data(config, 7)
    assert isinstance(fitted.model, DiTConfig)
    assert (fitted.model.depth, fitted.model.patch_size) == (3, 4)
    assert (fitted.model.grid, fitted.model.in_channels) == ((4, 4), 48)
    assert fitted.model_dump(exclude={"model"}) == config.model_dump(exclude={"model"})


def test_images_that_cannot_be_cut_into_cells(make_config):
    with pytest.raises(ConfigError, match="image_size=16 is no multiple of space_to_depth=3"):
        make_config(space_to_depth=3)
    with pytest.raises(ConfigError, match="patch_size=3 does not divide"):
        make_config(model=DiTConfig(hidden_size=64, num_heads=2, latent_size=9, patch_size=3))


def test_drops_follow_from_seed_and_step_alone():
    config = TrainConfig(budget_warmup=10, drops=(0, 0.25, 0.5), seed=3)
    drops = [drop_at(config, step) for step in range(400)]
    assert drops[:10] == [0.0] * 10
    assert {drop: drops[10:].count(drop) > 90 for drop in config.drops} == dict.fromkeys(
        config.drops, True
    )
    assert drops == [drop_at(config, step) for step in range(400)]
    other = TrainConfig(budget_warmup=10, drops=(0, 0.25, 0.5), seed=4)
    assert drops != [drop_at(other, step) for step in range(400)]


@given(step=st.integers(0, 10**7), seed=st.integers(0, 2**63 - 1))
def test_drop_is_one_of_the_choices(step, seed):
    config = TrainConfig(budget_warmup=0, seed=seed)
    assert drop_at(config, step) in config.drops


def test_streams_never_meet():
    heads = {
        (domain, seed, index): open_stream(domain, seed, index).random(4).tobytes()
        for domain in ("order", "sample", "drop", "posterior")
        for seed in (0, 1)
        for index in (0, 1, 2)
    }
    assert len(set(heads.values())) == len(heads)


def test_schedules():
    config = TrainConfig(learning_rate=0.8, learning_rate_warmup=4)
    rates = [learning_rate_at(config, step) for step in (0, 1, 3, 4, 100)]
    assert rates == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.8])
    assert learning_rate_at(TrainConfig(learning_rate=0.8), 0) == 0.8
    assert [ema_decay_at(config, step) for step in (0, 10, 10**6)] == [0.1, 0.55, 0.9999]


def test_another_run_is_refused_and_every_difference_named(make_config):
    saved = json.loads(make_config().to_json())
    check_same_run(make_config(steps=99, workers=1, log_every=3, checkpoint_every=9), saved)
    changed = make_config(
        seed=1, model=DCDiTConfig(hidden_size=64, depth=2, num_heads=2), drops=(0.5,)
    )
    with pytest.raises(ConfigError) as caught:
        check_same_run(changed, saved)
    text = str(caught.value)
    for part in ("seed=0 was saved and 1 came", "model.hidden_size=32 was saved and 64", "drops="):
        assert part in text
    assert "num_heads" not in text


def test_options_that_a_saved_run_lacks_count_as_different(make_config):
    saved = json.loads(make_config().to_json())
    del saved["flip"]
    with pytest.raises(ConfigError, match="flip=None was saved and False came"):
        check_same_run(make_config(), saved)


def test_the_fixed_layout_is_refused_before_anything_is_made():
    model = DCDiTConfig(hidden_size=32, depth=1, num_heads=2, layout="fixed")
    with pytest.raises(
        ConfigError, match=r'layout "fixed" needs one exact count.*fit every layout'
    ):
        TrainConfig(model=model)
