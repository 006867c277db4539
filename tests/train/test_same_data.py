"""A run goes on with the images that it began with, wherever they lie, and with no others."""

import shutil

import numpy as np
import pytest
from PIL import Image

from adaptok.errors import ConfigError
from adaptok.train.checkpoint import list_checkpoints
from adaptok.train.config import fit_model_to_data
from adaptok.train.trainer import train

CLASSES = ("1", "10", "2")


def fill(folder, classes=CLASSES, count=3):
    """Write a folder of small images; returns it."""
    draw = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def started(make_config, tmp_path):
    """Return a function that makes the options of a run on a folder, after two of its steps."""

    def make(data, steps):
        config = make_config(steps=steps, data=str(data), skin_variants=True)
        return fit_model_to_data(config, num_classes=len(CLASSES))

    data = fill(tmp_path / "data")
    train(make(data, 4), tmp_path / "run", stop_after=2)
    return make


def test_images_that_moved_are_the_same(started, tmp_path):
    whole = started(tmp_path / "data", 4)
    train(whole, tmp_path / "unbroken")
    shutil.move(tmp_path / "data", tmp_path / "moved")
    done = train(started(tmp_path / "moved", 4), tmp_path / "run")
    assert done.step == 4
    a, b = (list_checkpoints(tmp_path / name)[-1] for name in ("unbroken", "run"))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("classes", "count", "message"),
    [
        (("1", "10", "3"), 3, r"9 images of 3 classes \(1, 10, 2\).* \(1, 10, 3\) now"),
        (CLASSES, 4, "learned from 9 images.* holds 12 images"),
    ],
)
def test_other_images_are_refused(started, tmp_path, classes, count, message):
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    shutil.rmtree(tmp_path / "data")
    fill(tmp_path / "data", classes, count)
    with pytest.raises(ConfigError, match=message):
        train(started(tmp_path / "data", 4), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_classes_that_trade_images_are_refused(started, tmp_path):
    data = tmp_path / "data"
    (data / "1" / "0.png").rename(data / "10" / "9.png")
    with pytest.raises(ConfigError, match="whose labels are others: what a class means"):
        train(started(data, 4), tmp_path / "run")
