"""The script that draws the picture of docs/methods/caches.md."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from adaptok_cache import TaylorSeer
from PIL import Image

from adaptok.dc import DCDiT, DCDiTConfig
from adaptok.testing.models import fill_weights

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("draw_caches", ROOT / "scripts/draw_caches.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_caches"] = module
    spec.loader.exec_module(module)
    return module


def make_draw(script, title):
    computed = np.arange(30 * 4).reshape(30, 4) % 3 == 0
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    return script.Draw(title, images, computed, 1.0, 2.0)


def test_the_picture_of_the_page_has_the_form_that_is_drawn(script, tmp_path):
    draws = [make_draw(script, title) for title in "abcd"]
    canvas = script.draw_all(draws, ["name"] * 4)
    script.save_figure(canvas.figure, tmp_path / "caches.png")
    with (
        Image.open(tmp_path / "caches.png") as drawn,
        Image.open(ROOT / "docs" / "pictures" / "caches.png") as shown,
    ):
        assert drawn.size == shown.size
        assert np.asarray(shown.convert("L")).std() > 20


def test_decisions_are_those_of_the_stage(script):
    sizes = {"hidden_size": 64, "depth": 2, "num_heads": 4, "latent_size": 32}
    config = DCDiTConfig(**sizes, in_channels=3, num_classes=8, learn_sigma=False, layout="fixed")
    stage = TaylorSeer(interval=2, warmup=1)
    model = script.wrap_dense(fill_weights(DCDiT(config)).eval(), stage)
    found = script.run(model, stage, "seer", 6, cached=True)
    assert found.computed[:, 0].tolist() == [True, False, True, False, True, True]
    assert found.images.shape == (4, 32, 32, 3)
