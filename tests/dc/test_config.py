import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptok.dc import DCDiTConfig, DiTConfig
from adaptok.dc.config import SCALES, read_model_config
from adaptok.errors import ConfigError

CONFIGS = [DCDiTConfig, DiTConfig]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("scale", "depth", "hidden_size", "num_heads"),
    [("S", 12, 384, 6), ("B", 12, 768, 12), ("L", 24, 1024, 16), ("XL", 28, 1152, 16)],
)
def test_scales_are_the_published_ones(config, scale, depth, hidden_size, num_heads):
    chosen = config(scale=scale)
    assert (chosen.depth, chosen.hidden_size, chosen.num_heads) == (depth, hidden_size, num_heads)
    assert config.from_json(chosen.to_json()) == chosen
    assert config(**chosen.model_dump(mode="json")) == chosen


def test_defaults_are_scale_s_without_the_name():
    assert DCDiTConfig(scale="S") == DCDiTConfig().model_copy(update={"scale": "S"})
    config = DCDiTConfig()
    assert (config.target, config.dechunk_sigma, config.layout) == (4.0, 1.0, "packed")
    assert (config.narrowing, config.encoder_blocks, config.decoder_blocks) == (4, 2, 2)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["depth", "hidden_size", "num_heads"])
def test_a_scale_and_another_size_contradict_each_other(config, name):
    same = dict(zip(("depth", "hidden_size", "num_heads"), SCALES["B"], strict=True))
    assert config(scale="B", **{name: same[name]}).scale == "B"
    message = f"scale 'B' means {name}={same[name]}, but {name}=96 came"
    with pytest.raises(ConfigError, match=message):
        config(scale="B", **{name: 96})


@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 8),
    latent=st.one_of(st.integers(3, 99), st.tuples(st.integers(3, 99), st.integers(3, 99))),
    sigma=st.floats(0.01, 9.0),
    target=st.floats(1.01, 99.0),
    layout=st.sampled_from(["packed", "bucketed", "fixed"]),
    attention=st.sampled_from([None, "varlen", "padded", "loop"]),
)
def test_json_is_the_same_config_again(heads, width, latent, sigma, target, layout, attention):
    config = DCDiTConfig(
        hidden_size=32 * heads * width,
        num_heads=heads,
        latent_size=latent,
        dechunk_sigma=sigma,
        target=target,
        layout=layout,
        attention=attention,
    )
    assert DCDiTConfig.from_json(config.to_json()) == config
    assert DCDiTConfig(**config.model_dump(mode="json")) == config
    assert config.grid == (latent if isinstance(latent, tuple) else (latent, latent))


def test_the_output_has_twice_the_channels_with_learned_sigma():
    assert DCDiTConfig(in_channels=16).out_channels == 32
    assert DiTConfig(in_channels=16, learn_sigma=False).out_channels == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "M"}, "scale: Input should be 'S', 'B', 'L' or 'XL'; got 'M'"),
        ({"hidden_size": 100, "num_heads": 4}, "hidden_size is a multiple of 32, got 100"),
        ({"hidden_size": 64, "num_heads": 6}, "hidden_size=64 is no multiple of num_heads=6"),
        ({"hidden_size": 0}, "hidden_size: .*; got 0"),
        ({"depth": 0}, "depth: .*; got 0"),
        ({"depth": 2.5}, "depth: .*; got 2.5"),
        ({"latent_size": 2}, "latent_size=2 is smaller than a 3 x 3 kernel"),
        ({"latent_size": (8, 1)}, r"latent_size=\(8, 1\) is smaller"),
        ({"latent_size": (8, 8, 8)}, "latent_size"),
        ({"in_channels": 0}, "in_channels: .*; got 0"),
        ({"num_classes": 0}, "num_classes: .*; got 0"),
        ({"heads": 3}, "heads: this option does not exist"),
    ],
)
@pytest.mark.parametrize("config", CONFIGS)
def test_sizes_that_do_not_fit_are_refused(config, options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"narrowing": 5}, "hidden_size=384 is no multiple of narrowing=5"),
        ({"encoder_blocks": 0}, "encoder_blocks: .*; got 0"),
        ({"decoder_blocks": 0}, "decoder_blocks: .*; got 0"),
        ({"dechunk_sigma": 0}, "dechunk_sigma: .*greater than 0; got 0"),
        ({"dechunk_sigma": float("nan")}, "dechunk_sigma: .*; got nan"),
        ({"target": 1}, "target: .*greater than 1; got 1"),
        ({"layout": "dense"}, "layout: .*; got 'dense'"),
        ({"buckets": 0}, "buckets: .*; got 0"),
        ({"attention": "flash"}, "attention: .*; got 'flash'"),
        ({"patch_size": 2}, "patch_size: this option does not exist"),
    ],
)
def test_options_of_the_reference_model_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        DCDiTConfig(**options)


def test_a_patch_divides_the_latent():
    assert DiTConfig(patch_size=4, latent_size=(8, 12)).grid == (8, 12)
    with pytest.raises(ConfigError, match=r"4 does not divide the latent size \(8, 10\)"):
        DiTConfig(patch_size=4, latent_size=(8, 10))
    with pytest.raises(ConfigError, match="layout: this option does not exist"):
        DiTConfig(layout="fixed")


def test_a_config_is_read_by_the_kind_of_its_model():
    assert read_model_config("DiT", {"patch_size": 4}) == DiTConfig(patch_size=4)
    assert read_model_config("DCDiT", {"layout": "fixed"}) == DCDiTConfig(layout="fixed")
    with pytest.raises(ConfigError, match="'UNet' is no kind of model: known are DCDiT, DiT"):
        read_model_config("UNet", {})
