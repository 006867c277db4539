"""`adaptok sample --output FILE.npz`: many samples in one file, over several processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded_images import make_vae
from PIL import Image

from adaptok import DCDiT, DCDiTConfig
from adaptok.cli import many, terminal
from adaptok.cli.evaluating import open_pictures
from adaptok.dc.folder import ModelCard, save_model
from adaptok.train import sample_store
from adaptok.train.batches import Share
from adaptok.train.sample_store import SampleStore
from adaptok.train.vae import load_autoencoder

COUNT = 24


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A model of five classes that draws images of 4 x 4 pixels."""
    torch.manual_seed(0)
    model = DCDiT(
        DCDiTConfig(
            hidden_size=64, depth=1, num_heads=2, latent_size=4, in_channels=3, num_classes=5,
            learn_sigma=False,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model.eval(), ModelCard(objective="flow", image_size=4), folder)
    return folder


@pytest.fixture
def draw(run, tiny_folder, monkeypatch, tmp_path):
    """Draw into `x.npz` of an empty folder, which is where the test then is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal.out, "quiet", False)

    def call(*arguments, count=COUNT, output="x.npz"):
        return run("sample", "-m", tiny_folder, "-n", count, "-o", output, "--steps", 2, *arguments)

    return call


def interrupt(*arguments):
    raise KeyboardInterrupt


def read(path="x.npz"):
    with np.load(path, allow_pickle=False) as content:
        return content["arr_0"], content["arr_1"]


def test_file_and_figures(draw):
    result = draw("--batch", 7)
    assert result.exit_code == 0, result.output
    images, labels = read()
    assert (images.shape, images.dtype, labels.dtype) == ((COUNT, 4, 4, 3), np.uint8, np.int64)
    assert np.bincount(labels).tolist() == [5, 5, 5, 5, 4]
    for word in (
        "24 images of 4x4 px, 5 classes balanced; flow-euler, 2 steps, natural budget; 1 x cpu",
        "tokens a step", "ms in all", "images/s by 1 process", "x.npz (24 in arr_0",
        "image 24/24",
    ):  # fmt: skip
        assert word in result.stdout, word
    assert "FLOP" not in result.stdout
    assert list(Path().iterdir()) == [Path("x.npz")]


def test_options_arrive(draw):
    result = draw(
        "-l", "3", "-l", "none", "--classes", "drawn", "--seed", 4, "--tokens", 3,
        "--guidance", 2, "--precision", "bf16", "--batch", 12,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "2 classes drawn" in result.stdout
    assert "tokens 3, guidance 2" in result.stdout
    assert " 6.0 " in result.stdout  # three tokens, twice
    labels = read()[1]
    assert set(labels.tolist()) == {3, 5}
    assert labels.tolist() != [3, 5] * 12
    draw("-l", "3", "--seed", 4, output="y.npz")
    assert not np.array_equal(read()[0], read("y.npz")[0])


def test_a_sample_is_the_image_of_its_seed(draw, run, tiny_folder):
    assert draw("--seed", 2).exit_code == 0
    images, labels = read()
    result = run("sample", "-m", tiny_folder, "-l", labels[7], "--seed", 2_000_007, "--steps", 2)
    assert result.exit_code == 0, result.output
    with Image.open(next(Path("samples").glob("0000-*"))) as image:
        assert np.abs(np.asarray(image).astype(int) - images[7]).max() <= 1


def test_stopped_and_resumed(draw, monkeypatch):
    saved, left = sample_store.save_tensors, [2]

    def stop(*arguments):
        if not left[0]:
            interrupt()
        left[0] -= 1
        saved(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sample_store, "save_tensors", stop)
        result = draw("--batch", 5)
    assert result.exit_code == 130
    assert "10 of 24 images are drawn: run the same command again" in result.stderr
    refused = draw("--batch", 5, "--seed", 1)
    assert refused.exit_code == 2
    assert "x.npz.parts is of another run (seed 0 there, 1 now)" in refused.stderr
    resumed = draw("--batch", 5)
    assert resumed.exit_code == 0, resumed.output
    assert "output in x.npz; 10 are there" in resumed.stdout
    assert "14 images in" in resumed.stdout
    draw("--batch", 5, output="whole.npz")
    assert Path("x.npz").read_bytes() == Path("whole.npz").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "9"], "there is no class 9"),
        (["--tokens", "99"], "more than the 16 cells"),
        (["--count", "0"], "Invalid value for '--count'"),
        (["--count", "2000000"], "less than or equal to 1000000"),
        (["--drop", "2"], "drop is a fraction"),
        (["--scheduler", "ddpm"], "this model was trained for 'flow'"),
        (["--device", "toaster"], "there is no device 'toaster'"),
        (["--vae", "somewhere"], "draws pixels and no latents"),
        (["--output", "pictures", "--batch", "3"], "--batch is for many samples in one file"),
        (["--output", "pictures", "--classes", "drawn"], "--classes is for many samples"),
    ],
)
def test_wrong_input(draw, arguments, message):
    result = draw(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(Path().iterdir())


def test_output_that_exists_is_refused(draw):
    Path("x.npz").write_text("mine")
    result = draw()
    assert result.exit_code == 2
    assert "x.npz exists: remove it, or give another --output" in result.stderr


def test_place_that_cannot_be_written(draw):
    Path("file").write_text("")
    result = draw(output="file/x.npz")
    assert result.exit_code == 1
    assert "cannot make the work folder file/x.npz.parts" in result.stderr


def test_model_of_latents(run, tmp_path):
    vae = load_autoencoder(make_vae(tmp_path / "vae"))
    model = DCDiT(
        DCDiTConfig(
            hidden_size=32, depth=1, num_heads=2, latent_size=(4, 5), num_classes=2,
            learn_sigma=False,
        )
    )  # fmt: skip
    config = {"latents": vae.source.model_dump(mode="json")}
    card = ModelCard(objective="flow", image_size=8, training={"config": config})
    save_model(model.eval(), card, tmp_path / "model")
    words = ["sample", "-m", tmp_path / "model", "--steps", 1]
    result = run(*words, "-n", 5, "-o", tmp_path / "x.npz")
    assert result.exit_code == 0, result.output
    images, labels = read(tmp_path / "x.npz")
    assert (images.shape, labels.tolist()) == ((5, 8, 10, 3), [0, 1, 0, 1, 0])
    noise = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(3))
    # a new model says that nothing moves, so that one step leaves the noise as it is
    pixels = vae.decode(noise[None])[0].permute(1, 2, 0).numpy()
    assert np.abs(images[3].astype(int) - pixels).max() <= 1
    assert pixels.std() > 5
    (tmp_path / "vae").rename(tmp_path / "moved")
    lost = run(*words, "-n", 5, "-o", tmp_path / "y.npz")
    assert lost.exit_code == 2
    assert "autoencoder" in lost.stderr
    moved = run(*words, "-l", 1, "-o", tmp_path / "pngs", "--vae", tmp_path / "moved")
    assert moved.exit_code == 0, moved.output
    make_vae(tmp_path / "other", seed=1)
    other = run(*words, "-n", 5, "-o", tmp_path / "y.npz", "--vae", tmp_path / "other")
    assert "is not the one that the model was trained with" in other.stderr


def test_full_disk_is_refused(draw, monkeypatch):
    usage = type("Usage", (), {"free": 7})
    monkeypatch.setattr(sample_store.shutil, "disk_usage", lambda path: usage)
    result = draw()
    assert result.exit_code == 1
    assert "0.0 GB free, and 24 images of 4x4 px need 0.0 GB" in result.stderr


class TestSeveralProcesses:
    @pytest.fixture(autouse=True)
    def launched(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "3")

    def join(self, monkeypatch, rank, ranks=3):
        crew = many.Crew(torch.device("cpu"), Share(rank, ranks))
        monkeypatch.setattr(many, "join_crew", lambda device: crew)

    def test_only_the_first_one_speaks(self, draw, monkeypatch):
        with monkeypatch.context() as patch:
            self.join(patch, 0)
            patch.setattr(SampleStore, "save", interrupt)
            assert draw("--batch", 4).exit_code == 130  # the work folder is there
        self.join(monkeypatch, 1)
        result = draw("--batch", 4)
        assert (result.exit_code, result.output) == (0, "")
        parts = sorted(path.name for path in Path("x.npz.parts").glob("samples-*"))
        assert [part[8:16] for part in parts] == ["00000004", "00000016"]  # its share of six
        self.join(monkeypatch, 0, 1)
        assert "16 images in" in draw("--batch", 4).stdout
        assert len(read()[0]) == COUNT

    def test_idle_ones_are_told_of(self, draw, monkeypatch):
        self.join(monkeypatch, 0, 2)  # and it draws all that there is
        result = draw()
        assert "1 of 2 processes have nothing to draw in batches of 32" in result.stdout

    def test_more_than_samples_refused(self, draw, monkeypatch):
        self.join(monkeypatch, 1)
        result = draw(count=2)
        assert result.exit_code == 2
        assert "3 processes for 2 samples: start at most 2" in result.stderr

    def test_a_device_is_refused(self, draw):
        result = draw("--device", "cpu")
        assert result.exit_code == 2
        assert "get their devices from the launcher" in result.stderr

    def test_a_folder_is_refused(self, draw):
        result = draw(output="pictures")
        assert result.exit_code == 2
        assert "several processes draw into one file: give --output FILE.npz" in result.stderr


def find_workers(launcher):
    """Return the processes that a launcher started."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(word) for word in children.read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes by /proc")
def test_killed_on_two_processes_and_resumed_on_one(draw, tiny_folder):
    """One of two real processes is killed in the middle; one goes on, and no byte differs."""
    options = ["--steps", "60", "--batch", "2"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "adaptok", "sample",
         "-m", str(tiny_folder), "-n", str(COUNT), "-o", "x.npz", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    parts = Path("x.npz.parts")
    while launcher.poll() is None and len(list(parts.glob("samples-*"))) < 2:
        time.sleep(0.005)
    assert launcher.poll() is None, launcher.communicate()[0]
    os.kill(find_workers(launcher)[1], signal.SIGKILL)
    said = launcher.communicate(timeout=120)[0]
    assert launcher.returncode != 0
    assert "24 images of 4x4 px, 5 classes balanced; flow-euler, 60 steps" in said
    assert "; 2 x cpu" in said
    assert not Path("x.npz").exists()
    drawn = len(list(parts.glob("samples-*")))
    assert 2 <= drawn < COUNT // 2, said
    resumed = draw(*options)
    assert resumed.exit_code == 0, resumed.output
    assert f"{2 * drawn} are there" in resumed.stdout
    assert draw(*options, output="whole.npz").exit_code == 0
    assert Path("x.npz").read_bytes() == Path("whole.npz").read_bytes()
    assert not parts.exists()


def test_evaluate_reads_it_where_it_lies(draw):
    assert draw().exit_code == 0
    pictures = open_pictures("x.npz")
    assert pictures.describe() == "x.npz: 24 images of 4x4 px"
    images = read()[0]
    assert np.array_equal(pictures.take(5, 4).permute(1, 2, 0).numpy(), images[5])
    assert pictures.take(5, 2).shape == (3, 2, 2)
