"""Folders of images as latents: what is stored, what is read, and what stands in the way."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded_images import make_images, make_vae

from adaptok.errors import (
    ConfigError,
    DataError,
    StorageError,
)
from adaptok.train.data import load_image_folder, open_image_set
from adaptok.train.encoding import encode_folder
from adaptok.train.latents import INDEX_FILE, is_latent_cache, open_latents, read_cache_index
from adaptok.train.pixels import to_latent
from adaptok.train.shards import EncodeOptions
from adaptok.train.vae import Autoencoder, load_autoencoder

OPTIONS = EncodeOptions(size=16, batch_size=2, shard_size=3, dtype="float32")
COUNTS = {"ants": 4, "bees": 3, "cats": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "set", COUNTS)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return load_autoencoder(
        make_vae(tmp_path_factory.mktemp("vae") / "tiny", scaling_factor=0.5, shift_factor=0.25)
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory, images, vae):
    folder = tmp_path_factory.mktemp("cache") / "latents"
    encode_folder(images, folder, vae, OPTIONS)
    return folder


class Stopping:
    """The module of an autoencoder that stops the process after so many batches."""

    def __init__(self, model, batches, error=KeyboardInterrupt):
        self.model, self.left, self.error = model, batches, error
        self.config, self.parameters = model.config, model.parameters

    def encode(self, x):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.model.encode(x)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class TestWhatIsStored:
    def test_what_the_autoencoder_says_of_each_image_and_its_mirror(self, cache, images, vae):
        stored, pixels = open_latents(cache), load_image_folder(images, size=16)
        assert stored.class_names == tuple(COUNTS)
        assert stored.labels.tolist() == [0] * 4 + [1] * 3 + [2]
        assert stored.index.class_counts == (4, 3, 1)
        order = [6, 0, 3, 2]
        for mirrored in (False, True):
            found = stored.take(order, torch.full((4,), mirrored))
            for row, place in enumerate(order):
                image = pixels[place].flip(-1) if mirrored else pixels[place]
                said = vae.model.encode(to_latent(image[None])).latent_dist
                torch.testing.assert_close(found.mean[row], said.mean[0], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(found.std[row], said.std[0], atol=1e-5, rtol=1e-5)
        plain = stored.take(order)
        assert torch.equal(plain.mean, stored.take(order, torch.zeros(4, dtype=torch.bool)).mean)
        assert (plain.mean - found.mean).abs().mean() > 0.1
        assert stored.take([]).mean.shape == (0, 4, 8, 8)

    def test_the_index_says_how(self, cache, vae):
        index = read_cache_index(cache)
        assert index.source.model_copy(update={"cache_hash": ""}) == vae.source
        assert (index.source.scaling_factor, index.source.shift_factor) == (0.5, 0.25)
        assert (index.source.channels, index.source.factor) == (4, 2)
        assert (index.image_size, index.mirrored, index.name) == (16, True, "set")
        assert [shard.images for shard in index.shards] == [3, 3, 2]
        assert is_latent_cache(cache)

    def test_half_precision_rounds_and_no_more(self, tmp_path, cache, images, vae):
        encode_folder(images, tmp_path / "c", vae, replace(OPTIONS, dtype="float16"))
        half, full = open_latents(tmp_path / "c").take(range(8)), open_latents(cache).take(range(8))
        assert half.mean.dtype == torch.float32
        assert not torch.equal(half.mean, full.mean)
        torch.testing.assert_close(half.mean, full.mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(half.std, full.std, rtol=1e-3, atol=1e-4)

    def test_too_large_for_half_precision_is_refused(self, tmp_path, images, vae):
        vae = load_autoencoder(make_vae(tmp_path / "vae"))
        vae.model.quant_conv.bias[:4] += 1e6
        with pytest.raises(DataError, match="too large for float16: store it with --dtype float32"):
            encode_folder(images, tmp_path / "c", vae, replace(OPTIONS, dtype="float16"))
        vae.model.quant_conv.bias[:4] = torch.nan
        with pytest.raises(DataError, match="makes numbers of an image that are not finite"):
            encode_folder(images, tmp_path / "d", vae, OPTIONS)

    @pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are Linux's")
    def test_shards_are_mapped_and_not_loaded(self, cache):
        from adaptok.train.latents import map_shard

        stored = open_latents(cache)
        for shard in stored.index.shards:
            place = map_shard(stored.folder / shard.file, shard.fingerprint)["mean"].data_ptr()
            files = []
            for line in Path("/proc/self/maps").read_text().splitlines():
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                if start <= place < end:
                    files.append(line.split()[-1])
            assert [Path(file).name for file in files] == [shard.file]

    def test_without_mirrored_images_none_can_be_taken(self, tmp_path, images, vae):
        encode_folder(images, tmp_path / "c", vae, replace(OPTIONS, mirrored=False))
        stored = open_latents(tmp_path / "c")
        assert stored.take([1, 2]).mean.shape == (2, 4, 8, 8)
        with pytest.raises(DataError, match="holds no mirrored images: encode with --mirror"):
            stored.take([1], torch.tensor([True]))

    # A worker is forked from a process that runs torch's threads, of which Python 3.12 warns.
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_workers_decode_the_same(self, tmp_path, cache, images, vae):
        encode_folder(images, tmp_path / "c", vae, replace(OPTIONS, workers=2))
        assert contents(tmp_path / "c") == contents(cache)

    def test_decoding_undoes_the_scaling(self, vae):
        latents = torch.randn(2, 4, 6, 8)
        with torch.no_grad():
            wanted = vae.model.decode(latents / 0.5 + 0.25).sample
        found = vae.decode(latents)
        assert (found.shape, found.dtype) == ((2, 3, 12, 16), torch.uint8)
        assert torch.equal(found, ((wanted + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
        assert found.float().std() > 5


class TestStopsAndGoesOn:
    @pytest.mark.parametrize("batches", [0, 1, 5, 9])
    def test_a_stopped_run_goes_on_to_the_same_files(self, tmp_path, cache, images, vae, batches):
        stopping = Autoencoder(Stopping(vae.model, batches), vae.source)
        with pytest.raises(KeyboardInterrupt):
            encode_folder(images, tmp_path / "c", stopping, OPTIONS)
        (tmp_path / "c" / ".shard-00002.safetensors.unfinished-7").write_bytes(b"half")
        with pytest.raises(DataError, match=r"are not complete .* run the same `adaptok encode`"):
            open_latents(tmp_path / "c")
        summary = encode_folder(images, tmp_path / "c", vae, OPTIONS)
        assert summary.kept_shards == batches // 4  # two batches, each also mirrored, make a shard
        assert contents(tmp_path / "c") == contents(cache)

    @pytest.mark.parametrize("left", [0, 20, 1000, -4])
    def test_a_shard_that_is_cut_short_is_never_counted(self, tmp_path, cache, images, vae, left):
        encode_folder(images, tmp_path / "c", vae, OPTIONS)
        shard = tmp_path / "c" / "shard-00001.safetensors"
        shard.write_bytes(shard.read_bytes()[:left])
        with pytest.raises(DataError, match=r"cannot read the latents .*shard-00001.*which keeps"):
            open_latents(tmp_path / "c")
        summary = encode_folder(images, tmp_path / "c", vae, OPTIONS)
        assert summary.kept_shards == 2
        assert contents(tmp_path / "c") == contents(cache)

    def test_a_missing_or_foreign_shard_is_refused(self, tmp_path, images, vae):
        encode_folder(images, tmp_path / "c", vae, OPTIONS)
        first, second = (tmp_path / "c" / f"shard-0000{i}.safetensors" for i in (0, 1))
        first.write_bytes(second.read_bytes())
        with pytest.raises(DataError, match=r"shard-00000\S* was made of other images than its"):
            open_latents(tmp_path / "c")
        first.unlink()
        with pytest.raises(DataError, match=r"cannot read the latents \S*shard-00000"):
            open_latents(tmp_path / "c")

    def test_a_full_disk_keeps_earlier_shards(self, tmp_path, cache, images, vae, monkeypatch):
        from adaptok import storage

        write, written = storage.save_file, []

        def fill_up(tensors, path, metadata):
            if len(written) == 2:
                Path(path).write_bytes(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(path)
            write(tensors, path, metadata)

        monkeypatch.setattr(storage, "save_file", fill_up)
        with pytest.raises(StorageError, match=r"cannot write \S*shard-00002.*No space left.*Free"):
            encode_folder(images, tmp_path / "c", vae, OPTIONS)
        names = sorted(path.name for path in (tmp_path / "c").iterdir())
        assert names == [INDEX_FILE, "shard-00000.safetensors", "shard-00001.safetensors"]
        monkeypatch.undo()
        assert encode_folder(images, tmp_path / "c", vae, OPTIONS).kept_shards == 2
        assert contents(tmp_path / "c") == contents(cache)

    def test_new_images_are_encoded_and_the_rest_is_kept(self, tmp_path, vae):
        folder = make_images(tmp_path / "set", COUNTS)
        before = encode_folder(folder, tmp_path / "c", vae, OPTIONS).index
        make_images(tmp_path / "more", {"dogs": 5}, seed=1)
        (tmp_path / "more" / "dogs").rename(folder / "dogs")
        summary = encode_folder(folder, tmp_path / "c", vae, OPTIONS)
        assert summary.kept_shards == 2
        assert summary.index.class_counts == (4, 3, 1, 5)
        assert summary.index.source.cache_hash != before.source.cache_hash
        assert open_latents(tmp_path / "c").labels.tolist() == [0] * 4 + [1] * 3 + [2] + [3] * 5
        for file in (folder / "dogs").iterdir():
            file.unlink()
        (folder / "dogs").rmdir()
        assert encode_folder(folder, tmp_path / "c", vae, OPTIONS).index == before
        assert len(list((tmp_path / "c").glob("shard-*"))) == 3

    def test_progress_counts_the_images_of_kept_shards(self, tmp_path, images, vae):
        stopping, seen = Autoencoder(Stopping(vae.model, 4), vae.source), []
        with pytest.raises(KeyboardInterrupt):
            encode_folder(images, tmp_path / "c", stopping, OPTIONS)
        encode_folder(images, tmp_path / "c", vae, OPTIONS, lambda *now: seen.append(now))
        assert seen == [(5, 8), (6, 8), (8, 8)]


class TestBadInput:
    def test_unreadable_images_are_named_and_refused_or_counted(self, tmp_path, cache, vae):
        folder = make_images(tmp_path / "set", COUNTS)
        whole = (folder / "bees" / "01.png").read_bytes()
        (folder / "bees" / "01.png").write_bytes(whole[: len(whole) // 2])
        (folder / "ants" / "04.jpg").write_text("no image at all")
        with pytest.raises(
            DataError, match=r"2 of 9 image files in .*: ants/04.jpg, bees/01.png.*skip-unreadable"
        ):
            encode_folder(folder, tmp_path / "c", vae, OPTIONS)
        assert [path.name for path in (tmp_path / "c").glob("shard-*")] == [
            "shard-00000.safetensors"
        ]
        with pytest.raises(DataError, match="are not complete"):
            open_latents(tmp_path / "c")
        summary = encode_folder(folder, tmp_path / "c", vae, replace(OPTIONS, skip_unreadable=True))
        assert (summary.images, summary.kept_shards) == (7, 1)
        assert summary.index.unreadable == ("ants/04.jpg", "bees/01.png")
        stored, full = open_latents(tmp_path / "c"), open_latents(cache)
        assert stored.labels.tolist() == [0] * 4 + [1] * 2 + [2]
        kept = [0, 1, 2, 3, 4, 6, 7]
        torch.testing.assert_close(stored.take(range(7)).mean, full.take(kept).mean)
        with pytest.raises(DataError, match="2 of 9 image files"):  # asked strictly again
            encode_folder(folder, tmp_path / "c", vae, OPTIONS)
        (folder / "ants" / "04.jpg").unlink()
        (folder / "bees" / "01.png").write_bytes(whole)
        repaired = encode_folder(folder, tmp_path / "c", vae, OPTIONS)
        assert (repaired.images, repaired.index.unreadable) == (8, ())

    def test_a_class_of_which_nothing_can_be_read_is_refused(self, tmp_path, vae):
        folder = make_images(tmp_path / "set", COUNTS)
        (folder / "cats" / "00.png").write_bytes(b"")
        with pytest.raises(DataError, match="of 1 classes no image can be read, such as cats"):
            encode_folder(folder, tmp_path / "c", vae, replace(OPTIONS, skip_unreadable=True))

    def test_many_unreadable_images_are_not_all_named(self, tmp_path, vae):
        (tmp_path / "set" / "a").mkdir(parents=True)
        for number in range(7):
            (tmp_path / "set" / "a" / f"{number}.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"7 of 7 .*: a/0.png, .*, a/4.png, \.\.\.\. Repair"):
            encode_folder(tmp_path / "set", tmp_path / "c", vae, OPTIONS)

    def test_an_empty_folder_is_refused_before_anything_is_written(self, tmp_path, vae):
        (tmp_path / "set").mkdir()
        with pytest.raises(DataError, match="holds no image: put images"):
            encode_folder(tmp_path / "set", tmp_path / "c", vae, OPTIONS)
        with pytest.raises(DataError, match="is no folder"):
            encode_folder(tmp_path / "none", tmp_path / "c", vae, OPTIONS)
        assert not (tmp_path / "c").exists()

    def test_places_that_lie_in_each_other(self, images, vae):
        for place in (images, images / "out", images.parent):
            with pytest.raises(ConfigError, match="lie in each other"):
                encode_folder(images, place, vae, OPTIONS)

    def test_a_folder_with_other_files_is_no_place(self, tmp_path, images, vae):
        (tmp_path / "precious.txt").write_text("mine")
        with pytest.raises(StorageError, match="holds other files: give a new folder"):
            encode_folder(images, tmp_path, vae, OPTIONS)
        assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"size": 32}, "image_size 16 where 32 is asked for"),
            ({"mirrored": False}, "mirrored True where False"),
            ({"dtype": "float16"}, "dtype float32 where float16"),
            ({"shard_size": 4}, "shard_size 3 where 4"),
        ],
    )
    def test_other_settings_never_go_into_the_same_cache(self, cache, images, vae, change, message):
        before = contents(cache)
        with pytest.raises(DataError, match=f"made in another way .*{message}"):
            encode_folder(images, cache, vae, replace(OPTIONS, **change))
        assert contents(cache) == before

    def test_another_autoencoder_never_goes_into_the_same_cache(self, tmp_path, cache, images):
        other = load_autoencoder(
            make_vae(tmp_path / "vae", seed=1, scaling_factor=0.5, shift_factor=0.25)
        )
        with pytest.raises(DataError, match=r"made in another way .*weights_hash"):
            encode_folder(images, cache, other, OPTIONS)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"size": 15}, "images of 15 px cannot be encoded.*a multiple of 2"),
            ({"size": 0}, "size is 0: at least 1"),
            ({"batch_size": 0}, "batch_size is 0: at least 1"),
        ],
    )
    def test_wrong_numbers(self, tmp_path, images, vae, change, message):
        with pytest.raises(ConfigError, match=message):
            encode_folder(images, tmp_path / "c", vae, replace(OPTIONS, **change))

    @pytest.mark.parametrize("text", ["{", "[]", '{"kind": "adaptok-latents"}', '{"version": 2}'])
    def test_a_damaged_index(self, tmp_path, text):
        (tmp_path / INDEX_FILE).write_text(text)
        with pytest.raises(DataError, match=r"the index of the latents in .* is damaged"):
            open_latents(tmp_path)

    def test_an_index_that_does_not_fit_its_shards(self, tmp_path, images, vae):
        encode_folder(images, tmp_path / "c", vae, OPTIONS)
        content = json.loads((tmp_path / "c" / INDEX_FILE).read_text())
        content["shards"][1]["images"] = 2
        (tmp_path / "c" / INDEX_FILE).write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"shape \(3, 2, 4, 8, 8\), and its index says \(2,"):
            open_latents(tmp_path / "c")

    def test_latents_are_no_images(self, cache):
        with pytest.raises(DataError, match="holds latents of images, and the images themselves"):
            open_image_set(str(cache), 16)


def test_noise_of_zero_and_one_moves_by_one_deviation(cache, vae):
    posterior = open_latents(cache).take([0, 5])
    low = posterior.draw(torch.zeros_like(posterior.mean), vae.source)
    high = posterior.draw(torch.ones_like(posterior.mean), vae.source)
    np.testing.assert_allclose(low, (posterior.mean - 0.25) * 0.5, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(high - low, posterior.std * 0.5, rtol=1e-4, atol=1e-6)
