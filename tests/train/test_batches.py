import itertools

import numpy as np
import pytest
import torch

from adaptok.errors import ConfigError
from adaptok.train.batches import (
    Share,
    StepBatches,
    check_share,
    choose_images,
    draw_batch,
    load_batches,
    make_latents,
    open_training_set,
)
from adaptok.train.config import TrainConfig
from adaptok.train.data import ImageFiles


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
