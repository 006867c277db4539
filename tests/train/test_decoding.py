import diffusers
import pytest
import torch

from adaptok import DCDiT, DCDiTConfig
from adaptok.dc.folder import ModelCard, TrainedModel
from adaptok.errors import ConfigError
from adaptok.testing.models import fill_weights
from adaptok.train.batches import make_latents
from adaptok.train.decoding import make_decoder
from adaptok.train.vae import load_autoencoder


def make_trained(channels=12, **card):
    config = DCDiTConfig(
        hidden_size=32, depth=1, num_heads=2, latent_size=(4, 6), in_channels=channels
    )
    return TrainedModel(DCDiT(config), ModelCard(**card))


def test_pixels_come_back():
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    decoder = make_decoder(make_trained(image_size=8, space_to_depth=2))
    assert torch.equal(decoder.decode(make_latents(images, 2)), images)
    assert (decoder.size((4, 6)), decoder.clip, decoder.weights) == ((8, 12), 1.0, "")
    assert decoder.guided == 12
    assert make_decoder(make_trained(space_to_depth=2)).clip is None


def test_wrong_channels():
    with pytest.raises(ConfigError, match="latents of 4 channels, and its card names no auto"):
        make_decoder(make_trained(channels=4))


def test_autoencoder_for_a_model_of_pixels_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="draws pixels and no latents"):
        make_decoder(make_trained(space_to_depth=2), vae=tmp_path)


def test_latents(tmp_path):
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5, shift_factor=0.25,
    )  # fmt: skip
    fill_weights(vae).save_pretrained(tmp_path / "vae")
    source = load_autoencoder(tmp_path / "vae").source
    run = {"config": {"latents": source.model_dump(mode="json")}}
    trained = make_trained(channels=4, image_size=8, training=run)
    latents = torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        pixels = vae.eval().decode(latents / 0.5 + 0.25).sample
    expected = ((pixels + 1) * 127.5).round().clamp(0, 255)
    (tmp_path / "vae").rename(tmp_path / "moved")
    decoder = make_decoder(trained, vae=tmp_path / "moved")
    images = decoder.decode(latents)
    assert (images.float() - expected).abs().max() <= 1
    assert images.float().std() > 1
    assert tuple(images.shape[2:]) == decoder.size((4, 6)) == (8, 12)
    assert (decoder.clip, decoder.guided, decoder.weights) == (None, 3, source.weights_hash)
