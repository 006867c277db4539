"""Which autoencoder made latents, and which ones are refused."""

import json
import re

import pytest
import torch
from encoded_images import make_vae

from adaptok.errors import CheckpointError, UnsupportedModelError
from adaptok.train.vae import LatentSource, identify_autoencoder, load_autoencoder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return load_autoencoder(
        make_vae(tmp_path_factory.mktemp("vae") / "tiny", scaling_factor=0.5, shift_factor=0.25)
    )


def test_identity_does_not_hang_on_file_or_name(tmp_path, vae):
    again = identify_autoencoder(vae.model, "another name")
    assert not vae.source.describe_differences(again)
    vae.model.save_pretrained(tmp_path / "pipeline" / "vae")
    assert not vae.source.describe_differences(load_autoencoder(tmp_path / "pipeline").source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights_hash": "f" * 64}, "weights_hash ffffffffffff where [0-9a-f]{12} is asked"),
        ({"scaling_factor": 0.25}, "scaling_factor 0.25 where 0.5 is asked for"),
        ({"channels": 16}, "channels 16 where 4 is asked for"),
    ],
)
def test_differences_are_named(vae, change, message):
    (found,) = vae.source.describe_differences(vae.source.model_copy(update=change))
    assert re.match(message, found)


def test_any_autoencoder_of_the_right_shape_will_do_where_none_is_named(vae):
    assert not LatentSource(channels=4, factor=2).describe_differences(vae.source)
    wrong = LatentSource(channels=16, factor=8).describe_differences(vae.source)
    assert wrong == ["channels 4 where 16 is asked for", "factor 2 where 8 is asked for"]


def test_options_that_change_the_numbers_change_the_identity(tmp_path, vae):
    other = load_autoencoder(make_vae(tmp_path / "a", act_fn="relu"))
    plain = load_autoencoder(make_vae(tmp_path / "b", force_upcast=False))
    usual = load_autoencoder(make_vae(tmp_path / "c"))
    assert other.source.weights_hash == usual.source.weights_hash
    assert other.source.config_hash != usual.source.config_hash
    assert plain.source.config_hash == usual.source.config_hash


def test_a_missing_or_damaged_one_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        load_autoencoder(tmp_path / "none")
    folder = make_vae(tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"cannot load the autoencoder .* give a folder"):
        load_autoencoder(folder)
    weights.unlink()
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no file named diffusion_pytorch_model.safet"):
        load_autoencoder(folder)


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    file = make_vae(tmp_path / "vae") / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["quant_conv.weight"]
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"lack 1 tensors, such as quant_conv.weight"):
        load_autoencoder(tmp_path / "vae")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "is an AutoencoderTiny: an AutoencoderKL"),
        ({"latents_mean": [0.0] * 4}, "has latents_mean and latents_std, one per channel"),
    ],
)
def test_another_kind_is_refused(tmp_path, options, message):
    file = make_vae(tmp_path / "vae") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))
    with pytest.raises(UnsupportedModelError, match=message):
        load_autoencoder(tmp_path / "vae")


def test_grey_images_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="has 1 channels in and 3 out"):
        load_autoencoder(make_vae(tmp_path / "vae", in_channels=1))
