"""The pictures of the pages are what their script draws."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adaptok
from adaptok.errors import DataError
from adaptok.reductions import ReduceEvent

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("draw_prune", ROOT / "scripts" / "draw_prune.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_prune"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["draw_prune"]


def test_the_picture_of_evit(script, shared_folder, tmp_path, monkeypatch):
    target = tmp_path / "evit.png"
    arguments = ["--weights", str(shared_folder / "weights"), "--output", str(target)]
    monkeypatch.setattr(sys, "argv", ["draw_prune.py", "evit", *arguments])
    assert script.main() == 0
    with Image.open(target) as drawn, Image.open(ROOT / "docs/pictures/evit.png") as shown:
        assert drawn.size == shown.size
        difference = np.abs(np.asarray(drawn.convert("L"), float) - np.asarray(shown.convert("L")))
    assert difference.mean() < 2.0


def test_cells_without_a_token_of_their_own_are_faded(script):
    picture = np.zeros((4, 4, 3), np.uint8)
    painted = script.paint(picture, np.array([[True, False], [False, False]]))
    assert (painted[:2, :2] == 0).all()
    assert (painted[2:] > 150).all()
    # token 0 stands for one cell, token 1 for two, and one cell has none
    event = ReduceEvent("evit", adaptok.Site(3, "between"), torch.tensor([[0, 1, 1, -1]]), (2,))
    canvas = script.make_canvas(400, 400)
    script.draw_site(canvas, 10, 10, picture, event)


def test_weights_that_are_not_there(script, tmp_path):
    with pytest.raises(DataError, match=r"give --weights a folder that holds clip_vit_b16"):
        script.load_clip(tmp_path)
