"""`adaptok encode`, and a published run on what it wrote."""

import json

import pytest
from encoded_images import make_images, make_vae

from adaptok.cli import encoding
from adaptok.dc.folder import load_model
from adaptok.train.latents import open_latents
from adaptok.train.vae import open_decoder

TINY = [
    "--image-size", 64, "--hidden-size", 32, "--depth", 1, "--num-heads", 1, "--batch-size", 4,
    "--log-every", 1, "--checkpoint-every", 1,
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "birds", {"a": 3, "b": 3}, size=70)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae") / "tiny", factor=8)


def test_a_published_run_starts_and_goes_on_with_what_was_encoded(run, tmp_path, images, vae):
    cache, output = tmp_path / "cache", tmp_path / "run"
    encode = ["encode", images, "--vae", vae, "--size", 64, "-o", cache, "--shard-size", 4]
    result = run(*encode)
    assert result.exit_code == 0, result.output
    for words in ("done: 6 images of 2 classes, each also mirrored, 64 px", "2 shards (0 were",
                  f"adaptok train --data {cache}"):  # fmt: skip
        assert words in result.output
    assert "2 shards (2 were there)" in run(*encode).output

    train = ["train", "--config", "paper/S-256", "--data", cache, "-o", output, *TINY]
    result = run(*train, "--steps", 2)
    assert result.exit_code == 0, result.output
    for words in ("width 32, 1 blocks, on 8 x 8 cells of 4 channels", f"latents of {vae}",
                  "not the published setting of paper/S-256: batch_size 4 for 256, image_size 64",
                  "model.num_classes 2 for 1000", "steps 2 for 416305", "done: 2"):  # fmt: skip
        assert words in result.output
    again = run(*train, "--steps", 3)
    assert again.exit_code == 0, again.output
    assert "step 3/3" in again.output
    assert "step 1/3" not in again.output
    saved = json.loads((output / "config.json").read_text())
    assert (saved["budget_warmup"], saved["ema_decay"], saved["flip"]) == (5000, 0.9999, True)
    card = load_model(output / "model").card
    assert card.training["config"]["latents"]["name"] == str(vae)
    assert open_decoder(card).source == open_decoder(card, vae).source


def test_unreadable_images_are_counted_and_named(run, tmp_path, vae):
    folder = make_images(tmp_path / "set", {"a": 2, "b": 2}, size=16)
    (folder / "a" / "00.png").write_text("no image")
    encode = ["encode", folder, "--vae", vae, "--size", 16, "-o", tmp_path / "c", "--no-mirror"]
    result = run(*encode)
    assert result.exit_code == 2
    assert "1 of 4 image files in" in result.stderr
    assert "a/00.png" in result.stderr
    result = run(*encode, "--skip-unreadable", "--dtype", "float32")
    assert "made in another way (dtype float16 where float32 is asked for)" in result.stderr
    result = run(*encode, "--skip-unreadable")
    assert result.exit_code == 0, result.output
    assert "done: 3 images of 2 classes, 16 px" in result.output
    assert "1 image file that cannot be read is left out: a/00.png" in result.stderr
    assert len(open_latents(tmp_path / "c")) == 3


def test_interrupted(run, tmp_path, images, vae, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding, "encode_folder", stop)
    result = run("encode", images, "--vae", vae, "--size", 64, "-o", tmp_path / "c")
    assert result.exit_code == 130
    assert "stopped: run the same command again to go on; whole shards are kept" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}", "--vae", "{vae}"], "holds no image: put images"),
        (["nowhere", "--vae", "{vae}"], "nowhere is no folder: give a folder of images"),
        (["{images}", "--vae", "./none"], "there is no folder ./none of an autoencoder"),
        (["{images}", "--vae", "nosuchvae"], "there is no folder 'nosuchvae' of an autoencoder"),
        (["{images}", "--vae", "a b/c!"], "and it is no name of the hub: give a folder that"),
        (
            ["{images}", "--vae", "{vae}", "--size", "60"],
            "one cell of 8 x 8 pixels, so give a",
        ),
        (["{images}", "--vae", "{vae}", "--device", "warp"], "there is no device 'warp'"),
    ],
)
def test_bad_input(run, tmp_path, images, vae, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "images": images, "vae": vae}
    filled = [argument.format(**places) for argument in arguments]
    result = run("encode", *filled, "-o", tmp_path / "cache")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "cache").exists()


def test_one_class_is_refused_unless_no_class_is_dropped(run, tmp_path, vae):
    folder = make_images(tmp_path / "faces", {"face": 4}, size=64)
    encoded = run("encode", folder, "--vae", vae, "--size", 64, "-o", tmp_path / "c")
    assert "done: 4 images of 1 class," in encoded.output
    train = ["train", "--config", "paper/S-256", "--data", tmp_path / "c", "-o", tmp_path / "run"]
    result = run(*train, *TINY, "--steps", 1)
    assert result.exit_code == 2
    assert "has one class, and --class-dropout=0.1" in result.stderr
    assert not (tmp_path / "run").exists()
    result = run(*train, *TINY, "--steps", 1, "--class-dropout", 0)
    assert result.exit_code == 0, result.output


def test_another_resolution_than_the_published_one_is_refused(run, tmp_path, images, vae):
    assert run("encode", images, "--vae", vae, "--size", 64, "-o", tmp_path / "c").exit_code == 0
    result = run("train", "--config", "paper/S-256", "--data", tmp_path / "c", "-o", tmp_path / "r")
    assert result.exit_code == 2
    assert "are of images of 64 px and --image-size is 256: encode with --size 256" in result.stderr


def test_another_autoencoder_than_the_run_began_with_is_refused(run, tmp_path, images, vae):
    encode = ["encode", images, "--size", 64, "-o", tmp_path / "c", "--vae"]
    assert run(*encode, vae).exit_code == 0
    train = ["train", "--data", tmp_path / "c", "-o", tmp_path / "run", *TINY]
    assert run(*train, "--steps", 1).exit_code == 0
    for file in (tmp_path / "c").iterdir():
        file.unlink()
    assert run(*encode, make_vae(tmp_path / "other", factor=8, seed=1)).exit_code == 0
    result = run(*train, "--steps", 2)
    assert result.exit_code == 2
    assert "this is another run than the saved one: latents.cache_hash=" in result.stderr
    assert "latents.weights_hash=" in result.stderr
