"""`adaptok evaluate`, with a tiny extractor of the person's own."""

import json

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from adaptok.cli import evaluating, terminal
from adaptok.cli.evaluate import evaluate
from adaptok.cli.evaluating import open_pictures
from adaptok.cli.terminal import SpeakingGroup
from adaptok.errors import DataError

MODULE = """
import torch
torch.manual_seed(0)
weight = torch.randn(12, 4)
def tiny(images):
    assert images.dtype == torch.uint8
    cells = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2)
    return cells.flatten(1) @ weight
def spoilt(images):
    return tiny(images) / (images[:, :1, 0, 0] != 7)
number = 3
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    app = typer.Typer(cls=SpeakingGroup)
    app.callback()(lambda: None)
    app.command()(evaluate)
    for console in (terminal.out, terminal.err):
        monkeypatch.setattr(console, "_width", 200)
    (tmp_path / "own_features.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def call(*arguments, extractor="own_features:tiny"):
        words = ["evaluate", "--frechet-resamples", 5, "--device", "cpu", *arguments]
        if extractor is not None:
            words += ["--extractor", extractor]
        return CliRunner().invoke(app, [str(word) for word in words])

    return call


def write_images(folder, n, seed=0, size=(16, 16), shift=0):
    folder.mkdir(exist_ok=True, parents=True)
    generator = np.random.default_rng(seed)
    for place in range(n):
        colour = generator.integers(0, 200, (1, 1, 3)) + shift
        pixels = colour + generator.integers(0, 30, (size[1], size[0], 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{place:03d}.png")
    return folder


@pytest.fixture
def folders(tmp_path):
    return write_images(tmp_path / "samples", 24), write_images(tmp_path / "real", 30, seed=1)


class TestCommand:
    def test_table(self, run, folders):
        done = run(*folders)
        assert done.exit_code == 0, done.output
        for word in (
            "KID-tiny", "FD-tiny", "24 against 30", "floor: real halves", "15 against 15",
            "24 images of 16x16 px", "intervals: 95%", "1000 for KID, 5 for FD",
        ):  # fmt: skip
            assert word in done.stdout, word
        assert "FID" not in done.stdout
        assert "brought to" not in done.stdout
        assert "held-out" not in done.stdout

    def test_json(self, run, folders, tmp_path):
        path = tmp_path / "found.json"
        done = run(*folders, "--json", path, "--seed", 3, "--level", 0.9)
        assert done.exit_code == 0, done.output
        assert "found.json" in done.stdout
        found = json.loads(path.read_text())
        assert (found["version"], found["extractor"], found["size"]) == (1, "tiny", 16)
        assert (found["seed"], found["level"], found["held_out"]) == (3, 0.9, None)
        for name in ("samples", "floor"):
            for kind in ("kid", "frechet"):
                figure = found[name][kind]
                assert figure["low"] <= figure["value"] <= figure["high"], (name, kind)
        alone = run(*folders, "--json", "-", "--seed", 3, "--level", 0.9)
        assert json.loads(alone.stdout) == found

    def test_damage_and_held_out(self, run, folders, tmp_path):
        bright = write_images(tmp_path / "bright", 24, seed=2, shift=120)
        done = run(bright, folders[1], "--held-out", folders[0], "--json", "-")
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["samples"]["kid"]["low"] > found["held_out"]["kid"]["high"]
        assert found["samples"]["frechet"]["value"] > 3 * found["floor"]["frechet"]["value"]
        assert "held-out images" in run(bright, folders[1], "--held-out", folders[0]).stdout

    def test_batches_do_not_matter(self, run, folders):
        one, other = (
            json.loads(run(*folders, "--json", "-", "--batch", batch).stdout) for batch in (5, 64)
        )
        assert one["samples"]["kid"]["value"] == pytest.approx(other["samples"]["kid"]["value"])

    def test_sizes_are_made_equal_and_said(self, run, folders, tmp_path):
        write_images(folders[0] / "tall", 3, seed=5, size=(12, 20))
        done = run(*folders)
        assert done.exit_code == 0, done.output
        assert "27 images of 16x16, 12x20 px" in done.stdout
        assert "all brought to 12x12 px: centre square, Lanczos" in done.stdout
        assert "all brought to 8x8 px" in run(*folders, "--size", 8).stdout

    def test_npz_as_folder(self, run, folders, tmp_path):
        pixels = np.stack([np.asarray(Image.open(p)) for p in sorted(folders[0].glob("*.png"))])
        np.savez(tmp_path / "last.npz", pixels)
        np.savez(tmp_path / "second.npz", images=pixels.transpose(0, 3, 1, 2))
        by_file = [
            json.loads(run(path, folders[1], "--json", "-").stdout)["samples"]
            for path in (folders[0], tmp_path / "last.npz", tmp_path / "second.npz")
        ]
        assert by_file[0] == by_file[1] == by_file[2]

    def test_grid_of_sample_is_passed_over(self, folders):
        Image.new("RGB", (99, 99)).save(folders[0] / "grid.png")
        pictures = open_pictures(str(folders[0]))
        assert len(pictures.names) == 24
        assert pictures.smallest == 16

    def test_emoji(self, monkeypatch):
        pictures = open_pictures("emoji")
        assert pictures.describe() == f"emoji: {len(pictures.names)} images of 64x64 px"
        assert pictures.take(0, 32).shape == (3, 32, 32)

    def test_no_fid_without_inception(self, run, folders):
        done = run(*folders, extractor="inception")
        assert done.exit_code == 2
        assert "FID belongs to the weights of one Inception-v3" in done.stderr


class TestErrors:
    @pytest.mark.parametrize(
        ("count", "message"),
        [(0, "holds no image"), (1, "holds 1 image: distances"), (3, "holds 3 images: distances")],
    )
    def test_too_few(self, run, folders, tmp_path, count, message):
        few = write_images(tmp_path / "few", count)
        for pair in ((few, folders[1]), (folders[0], few)):
            done = run(*pair)
            assert done.exit_code == 2
            assert message in done.stderr
            assert "few" in done.stderr

    def test_half_readable(self, run, folders):
        for place in (3, 4, 5, 6):
            (folders[0] / f"{place:03d}.png").write_bytes(b"no image")
        done = run(*folders)
        assert done.exit_code == 2
        assert "4 of 24 images in" in done.stderr
        assert "(003.png, 004.png, 005.png, ...)" in done.stderr

    def test_truncated(self, run, folders):
        path = folders[1] / "007.png"
        path.write_bytes(path.read_bytes()[:300])
        done = run(*folders)
        assert done.exit_code == 2
        assert "007.png" in done.stderr
        assert "repair, replace or remove" in done.stderr

    def test_not_finite(self, run, folders):
        Image.new("RGB", (16, 16), (7, 7, 7)).save(folders[0] / "011.png")
        done = run(*folders, extractor="own_features:spoilt")
        assert done.exit_code == 2
        assert "011.png are NaN or infinite" in done.stderr

    @pytest.mark.parametrize(
        ("extractor", "message"),
        [
            (None, "efficientnet-lite0 needs weights"),
            ("resnet", "there is no extractor 'resnet'"),
            ("own_features:none", "cannot be imported"),
            ("no_such_module:tiny", "put the folder of the module into PYTHONPATH"),
            (":tiny", "cannot be imported"),
            ("own_features:number", "a int is no extractor"),
        ],
    )
    def test_extractor(self, run, folders, extractor, message):
        done = run(*folders, extractor=extractor)
        assert done.exit_code == 2, done.output
        assert message in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--level", "2"], "between 0 and 1, got 2.0"),
            (["--weights", "x.safetensors"], "were given beside an extractor of your own"),
            (["--held-out", "nowhere"], "'nowhere' is not found"),
            (["--device", "toaster"], "there is no device 'toaster'"),
        ],
    )
    def test_options(self, run, folders, arguments, message):
        done = run(*folders, *arguments)
        assert done.exit_code == 2, done.output
        assert message in done.stderr

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"pixels": np.zeros((5, 8, 8, 3), np.uint8)}, "no array images or arr_0"),
            ({"images": np.zeros((5, 8, 8, 3), np.float32)}, "are float32 of shape"),
            ({"images": np.zeros((5, 8, 8, 4), np.uint8)}, r"give uint8 of \(n, h, w, 3\)"),
            ({"images": np.zeros((5, 3), np.uint8)}, r"shape \(5, 3\)"),
            ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "at least one"),
        ],
    )
    def test_npz(self, tmp_path, arrays, message):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(DataError, match=message):
            open_pictures(str(tmp_path / "x.npz"))

    def test_what_is_no_set(self, tmp_path):
        (tmp_path / "x.npz").write_bytes(b"PK broken")
        with pytest.raises(DataError, match="cannot read"):
            open_pictures(str(tmp_path / "x.npz"))
        (tmp_path / "x.txt").write_text("text")
        with pytest.raises(DataError, match="neither a folder nor an"):
            open_pictures(str(tmp_path / "x.txt"))

    def test_nothing_is_computed_before_all_folders_are_read(self, run, folders, monkeypatch):
        monkeypatch.setattr(evaluating, "extract_features", pytest.fail)
        assert run(folders[0], "nowhere").exit_code == 2


@pytest.mark.slow
def test_real_weights(run, shared_folder, tmp_path):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    samples = write_images(tmp_path / "samples", 12)
    real = write_images(tmp_path / "real", 16, seed=1)
    weights = shared_folder / "weights/efficientnet_lite0.safetensors"
    done = run(samples, real, "--weights", weights, extractor="efficientnet-lite0")
    assert done.exit_code == 0, done.output
    assert "KID-EffLite0" in done.stdout
    assert "efficientnet_lite0.safetensors, sha256" in done.stdout
