"""The pictures of the pages show the groups that merges made."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("draw_tome")
    for name in ("draw_tome", "draw_prune"):
        sys.modules.pop(name, None)


def test_cells_have_the_mean_colour_of_their_token(script):
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    picture[:2, :2], picture[:2, 2:], picture[2:] = 10, 30, 200
    painted = script.paint_groups(picture, np.array([[0, 0], [1, 2]]))
    assert painted[:2].min() == painted[:2].max() == 20
    assert painted[2:].min() == painted[2:].max() == 200


@pytest.mark.parametrize("method", ["tome", "tomesd"])
def test_a_picture_of_real_weights(script, method, shared_folder, tmp_path, monkeypatch):
    target = tmp_path / "tome.png"
    weights = str(shared_folder / "weights")
    monkeypatch.setattr(
        "sys.argv", ["draw_tome.py", method, "--weights", weights, "--output", str(target)]
    )
    assert script.main() == 0
    drawn = np.asarray(Image.open(target).convert("RGB")).astype(int)
    page = Image.open(ROOT / "docs" / "pictures" / f"{method}.png").convert("RGB")
    known = np.asarray(page).astype(int)
    assert drawn.shape == known.shape
    assert np.abs(drawn - known).mean() < 2.0


def test_missing_weights(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["draw_tome.py", "tome", "--weights", str(tmp_path)])
    assert script.main() == 1
    assert "give --weights a folder" in capsys.readouterr().err
