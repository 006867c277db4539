import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("draw_apt", ROOT / "scripts" / "draw_apt.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_apt"] = module
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_page_is_what_the_script_draws(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_apt.py", "--output", str(tmp_path / "apt.png")])
    assert script.main() == 0
    with (
        Image.open(tmp_path / "apt.png") as drawn,
        Image.open(ROOT / "docs" / "pictures" / "apt.png") as shown,
    ):
        assert drawn.size == shown.size
        extrema = drawn.convert("L").getextrema()
    assert extrema[1] - extrema[0] > 200


def test_sizes_tile_the_picture(script):
    picture = np.full((script.SIZE, script.SIZE, 3), 255, np.uint8)
    picture[:48, :48] = np.random.default_rng(0).integers(0, 256, (48, 48, 3))
    leaves = script.find_patches(picture, (6.0, 4.0))
    sizes = script.count_sizes(leaves)
    assert sum(count * edge**2 for edge, count in sizes.items()) == 32 * 32
    assert sum(sizes.values()) == int(leaves.counts)
    # three by three noisy cells: a block half or a quarter full of noise is below 6 bits
    assert sizes == {1: 4, 2: 3, 4: 63}


def test_an_unknown_emoji_is_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["draw_apt.py", "--name", "nobody"])
    assert script.main() == 1
    assert "no shipped emoji is called 'nobody'" in capsys.readouterr().err
