import itertools
import shutil

import numpy as np
import pytest
import torch
from encoded_images import make_images, make_vae

from adaptok import DCDiTConfig
from adaptok.dc.folder import ModelCard, load_model
from adaptok.errors import ConfigError, DataError
from adaptok.train.batches import (
    Share,
    StepBatches,
    check_share,
    choose_images,
    draw_batch,
    fit_run_to_data,
    load_batches,
    make_latents,
    open_training_set,
)
from adaptok.train.config import TrainConfig, open_stream
from adaptok.train.data import ImageFiles
from adaptok.train.encoding import encode_folder
from adaptok.train.latents import INDEX_FILE, read_cache_index
from adaptok.train.shards import EncodeOptions
from adaptok.train.trainer import train
from adaptok.train.vae import LatentSource, load_autoencoder, open_decoder, read_latent_source


@pytest.fixture(scope="module")
def images(make_config):
    return open_training_set(make_config())


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


def join(batches):
    return [torch.cat(parts) for parts in zip(*(b.tensors for b in batches), strict=True)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_shares_of_all_ranks_are_the_batch_of_one(make_config, images, ranks):
    config = make_config(flip=True, class_dropout=0.4)
    for step in (0, 3):
        whole = draw_batch(config, images, step, Share())
        shares = [draw_batch(config, images, step, Share(rank, ranks)) for rank in range(ranks)]
        for part, joined in zip(whole.tensors, join(shares), strict=True):
            assert torch.equal(part, joined)


def test_micro_batches_are_the_batch(make_config, images):
    batch = draw_batch(make_config(), images, 1, Share())
    pieces = list(batch.split(4))
    assert [len(piece.labels) for piece in pieces] == [2] * 4
    for part, joined in zip(batch.tensors, join(pieces), strict=True):
        assert torch.equal(part, joined)


def test_batches_differ_by_step_and_seed_and_repeat_exactly(make_config, images):
    batches = [
        draw_batch(make_config(seed=seed), images, step, Share())
        for seed, step in itertools.product((0, 1), (0, 1))
    ]
    for a, b in itertools.combinations(batches, 2):
        assert not torch.equal(a.noise, b.noise)
        assert not torch.equal(a.u, b.u)
        assert not torch.equal(a.images, b.images)
    assert same(batches[1], draw_batch(make_config(), images, 1, Share()))
    noise = batches[0].noise
    assert len({row.numpy().tobytes() for row in noise}) == len(noise)


def test_random_numbers_are_what_they_are_called(make_config, images):
    config = make_config(batch_size=256, class_dropout=0.25)
    batch = draw_batch(config, images, 0, Share())
    assert batch.noise.dtype == torch.float32
    assert batch.noise.shape == (256, 12, 8, 8)
    assert abs(batch.noise.mean()) < 0.01
    assert abs(batch.noise.std() - 1) < 0.01
    assert ((batch.u >= 0) & (batch.u < 1)).all()
    assert abs(batch.u.mean() - 0.5) < 0.1
    unlabelled = (batch.labels == config.model.num_classes).float().mean()
    assert 0.15 < unlabelled < 0.35


def test_labels_belong_to_their_images(make_config, images):
    batch = draw_batch(make_config(class_dropout=0.0), images, 2, Share())
    for image, label in zip(batch.images, batch.labels, strict=True):
        found = [i for i in range(len(images)) if torch.equal(images[i], image)]
        assert [int(images.labels[i]) for i in found] == [int(label)]
    dropped = draw_batch(make_config(class_dropout=1.0), images, 2, Share())
    assert (dropped.labels == 3).all()


def test_flip_mirrors_some_images_left_to_right(make_config, images):
    plain = draw_batch(make_config(batch_size=24), images, 0, Share())
    flipped = draw_batch(make_config(batch_size=24, flip=True), images, 0, Share())
    kinds = []
    for before, after in zip(plain.images, flipped.images, strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(-1))
        kinds.append(torch.equal(after, before))
    assert 4 < sum(kinds) < 20
    assert torch.equal(plain.noise, flipped.noise)


def test_each_epoch_has_each_image_once_in_an_order_of_its_own():
    seen = choose_images(7, range(30), size=10)
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert seen[13:17] == choose_images(7, range(13, 17), size=10)
    assert seen != choose_images(8, range(30), size=10)


def test_a_batch_may_hold_many_epochs(make_config, images):
    batch = draw_batch(make_config(batch_size=60), images, 0, Share())
    assert len(batch.images) == 60
    assert len({image.numpy().tobytes() for image in batch.images}) == 12


# A worker is forked from a process that runs torch's threads, of which Python 3.12 warns.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_draw_the_same_batches_in_order(make_config, images):
    config = make_config(workers=2)
    plain = load_batches(StepBatches(make_config(), images, Share()), range(2, 6), False)
    ahead = load_batches(StepBatches(config, images, Share()), range(2, 6), False)
    count = 0
    for a, b in zip(plain, ahead, strict=True):
        assert same(a, b)
        count += 1
    assert count == 4


def test_latents_hold_each_square_of_pixels_in_a_cell(images):
    latents = make_latents(images.take([0, 5]), 2)
    assert latents.shape == (2, 12, 8, 8)
    assert -1 <= latents.min() < latents.max() <= 1
    square = images[5][:, 6:8, 2:4].float() / 127.5 - 1
    assert sorted(latents[1, :, 3, 1].tolist()) == pytest.approx(sorted(square.flatten().tolist()))


def test_uneven_shares_are_refused(make_config):
    check_share(make_config(accumulation=2), 4)
    with pytest.raises(ConfigError, match=r"no multiple of 3 processes times accumulation=1"):
        check_share(make_config(), 3)
    with pytest.raises(ConfigError, match="make it one of 16"):
        check_share(make_config(accumulation=4), 4)


def test_small_folders_are_decoded_once(make_config, tmp_path):
    from PIL import Image

    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for number in range(2):
            pixels = np.full((20, 20, 3), 50 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    images = open_training_set(make_config(data=str(tmp_path)))
    assert not isinstance(images.images, ImageFiles)
    assert images.class_names == ("a", "b")
    assert images[1].unique().tolist() == [50]


def test_emoji_can_be_chosen_by_category():
    chosen = {"categories": ("Food & Drink", "Activities"), "skin_variants": False}
    images = open_training_set(TrainConfig(image_size=16, **chosen))
    assert images.class_names == ("Activities", "Food & Drink")
    assert images.image_size == (16, 16)


def test_images_that_are_not_square_are_refused(make_config, tmp_path, monkeypatch):
    from adaptok.train import batches
    from adaptok.train.data import ImageSet

    wide = ImageSet(
        torch.zeros(2, 3, 16, 20, dtype=torch.uint8), torch.zeros(2).long(), ("a",), "w"
    )
    monkeypatch.setattr(batches, "open_image_set", lambda spec, size: wide)
    with pytest.raises(ConfigError, match=r"\(16, 20\) px and image_size is 16"):
        open_training_set(make_config())


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return load_autoencoder(make_vae(tmp_path_factory.mktemp("v") / "tiny", scaling_factor=0.5))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, vae):
    folder = tmp_path_factory.mktemp("latents")
    encode_folder(
        make_images(folder / "images", {"a": 5, "b": 4, "c": 3}),
        folder / "cache",
        vae,
        EncodeOptions(size=16, shard_size=5, dtype="float32"),
    )
    return folder / "cache"


@pytest.fixture(scope="module")
def make_run(make_config, cache):
    def make(**options):
        config = make_config(fit=False, data=str(cache), space_to_depth=1, **options)
        return fit_run_to_data(config)

    return make


class TestLatents:
    """Batches of a cache of latents; the autoencoder makes one cell of 2 x 2 pixels."""

    def test_sizes_follow_from_the_cache(self, cache, vae):
        config = fit_run_to_data(
            TrainConfig(model=DCDiTConfig(hidden_size=32, num_heads=2), data=str(cache))
        )
        assert (config.image_size, config.space_to_depth) == (16, 1)
        assert (config.model.grid, config.model.in_channels) == ((8, 8), 4)
        assert config.model.num_classes == 3
        assert config.latents.weights_hash == vae.source.weights_hash
        assert fit_run_to_data(config) == config
        assert TrainConfig.from_json(config.to_json()) == config

    def test_each_sample_of_the_run_has_a_draw_of_its_own(self, make_run, vae):
        config = make_run(batch_size=24, class_dropout=0.0)
        stored = open_training_set(config)
        batch = draw_batch(config, stored, 1, Share())
        posterior = stored.take(choose_images(config.seed, range(24, 48), 12))
        noise = torch.stack(
            [
                torch.from_numpy(
                    open_stream("posterior", config.seed, sample)
                    .standard_normal(4 * 8 * 8, dtype=np.float32)
                    .reshape(4, 8, 8)
                )
                for sample in range(24, 48)
            ]
        )
        wanted = (posterior.mean + posterior.std * noise) * 0.5
        torch.testing.assert_close(batch.images, wanted)
        assert batch.noise.shape == (24, 4, 8, 8)
        assert make_latents(batch.images, 1) is batch.images
        seen = {}
        for latent, place in zip(
            batch.images, choose_images(config.seed, range(24, 48), 12), strict=True
        ):
            seen.setdefault(place, []).append(latent)
        assert all(not torch.equal(*twice) for twice in seen.values())

    def test_flip_takes_the_mirrored_images(self, make_run):
        stored = open_training_set(make_run())
        plain = draw_batch(make_run(batch_size=24), stored, 0, Share())
        flipped = draw_batch(make_run(batch_size=24, flip=True), stored, 0, Share())
        same_rows = [torch.equal(a, b) for a, b in zip(plain.images, flipped.images, strict=True)]
        assert 4 < sum(same_rows) < 20
        for row, same_row in enumerate(same_rows):
            place = choose_images(0, range(24), 12)[row]
            both = stored.take([place, place], torch.tensor([False, True]))
            noise = (plain.images[row] / 0.5 - both.mean[0]) / both.std[0]
            view = 0 if same_row else 1  # the draw is the same, mean and deviation are the mirror's
            wanted = (both.mean[view] + both.std[view] * noise) * 0.5
            torch.testing.assert_close(flipped.images[row], wanted, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("ranks", [2, 4])
    def test_shares_of_all_ranks_are_the_batch_of_one(self, make_run, ranks):
        config = make_run(flip=True)
        stored = open_training_set(config)
        whole = draw_batch(config, stored, 2, Share())
        shares = [draw_batch(config, stored, 2, Share(rank, ranks)) for rank in range(ranks)]
        for part, joined in zip(whole.tensors, join(shares), strict=True):
            assert torch.equal(part, joined)

    # A worker is forked from a process that runs torch's threads, of which Python 3.12 warns.
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_workers_read_the_same(self, make_run):
        config = make_run(workers=2)
        stored = open_training_set(config)
        plain = load_batches(StepBatches(make_run(), stored, Share()), range(3), False)
        ahead = load_batches(StepBatches(config, stored, Share()), range(3), False)
        assert [same(a, b) for a, b in zip(plain, ahead, strict=True)] == [True] * 3

    def test_a_stopped_run_goes_on_and_its_card_names_the_autoencoder(
        self, make_run, vae, cache, tmp_path
    ):
        config = make_run(steps=4, flip=True)
        train(config, tmp_path / "whole")
        assert train(config, tmp_path / "cut", stop_after=2).step == 2
        assert train(config, tmp_path / "cut").step == 4
        whole, cut = (load_model(tmp_path / name / "model") for name in ("whole", "cut"))
        for name, weight in whole.model.state_dict().items():
            assert torch.equal(weight, cut.model.state_dict()[name]), name
        assert whole.card.training["data"] == "images"
        assert read_latent_source(whole.card) == config.latents
        decoder = open_decoder(whole.card)
        latents = torch.randn(2, 4, 8, 8)
        assert torch.equal(decoder.decode(latents), vae.decode(latents))
        with pytest.raises(ConfigError, match="not the one that the model was trained with"):
            open_decoder(whole.card, make_vae(tmp_path / "other", seed=3, scaling_factor=0.5))
        with pytest.raises(ConfigError, match="this model draws pixels and no latents"):
            open_decoder(ModelCard())

    def test_another_autoencoder_or_size_than_asked_for_is_refused(self, make_run, cache):
        config = make_run()
        other = config.latents.model_copy(update={"weights_hash": "0" * 64})
        with pytest.raises(ConfigError, match=r"of another autoencoder .*weights_hash"):
            open_training_set(config.model_copy(update={"latents": other}))
        any_other = LatentSource(channels=16, factor=8)
        with pytest.raises(ConfigError, match=r"channels 4 where 16 .*, factor 2 where 8"):
            fit_run_to_data(
                TrainConfig(data=str(cache), latents=any_other, space_to_depth=1, image_size=16)
            )
        with pytest.raises(ConfigError, match="images of 16 px and image_size is 32: encode with"):
            fit_run_to_data(TrainConfig(data=str(cache), image_size=32))
        with pytest.raises(ConfigError, match="the run does not say of which autoencoder"):
            open_training_set(TrainConfig(data=str(cache)))

    def test_other_images_than_the_run_was_made_for_are_refused(self, make_run):
        config = make_run()
        other = config.latents.model_copy(update={"cache_hash": "0" * 64})
        with pytest.raises(ConfigError, match="are of other images than this run was made for"):
            open_training_set(config.model_copy(update={"latents": other}))

    def test_flip_without_mirrored_images_is_refused(self, cache, vae, tmp_path):
        images = make_images(tmp_path / "images", {"a": 2, "b": 2})
        encode_folder(images, tmp_path / "c", vae, EncodeOptions(size=16, mirrored=False))
        with pytest.raises(ConfigError, match=r"flip asks for mirrored images.*--mirror"):
            fit_run_to_data(TrainConfig(data=str(tmp_path / "c"), flip=True))

    @pytest.mark.parametrize("data", ["emoji", "nowhere", "."])
    def test_a_run_on_latents_refuses_what_holds_none(self, make_run, data):
        config = make_run().model_copy(update={"data": data})
        with pytest.raises(ConfigError, match=r"is no folder of latents: make one with `adap"):
            open_training_set(config)

    def test_a_cache_that_is_not_whole_is_refused(self, cache, tmp_path):
        shutil.copytree(cache, tmp_path / "c")
        index = read_cache_index(tmp_path / "c").model_copy(update={"complete": False})
        index.to_json_file(tmp_path / "c" / INDEX_FILE)
        with pytest.raises(DataError, match=r"are not complete \(3 shards are there\)"):
            fit_run_to_data(TrainConfig(data=str(tmp_path / "c")))
