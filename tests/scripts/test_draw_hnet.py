import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("draw_hnet", ROOT / "scripts" / "draw_hnet.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_hnet"] = module
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_page_is_what_the_script_draws(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_hnet.py", "--output", str(tmp_path / "hnet.png")])
    assert script.main() == 0
    with (
        Image.open(tmp_path / "hnet.png") as drawn,
        Image.open(ROOT / "docs" / "pictures" / "hnet.png") as shown,
    ):
        assert drawn.size == shown.size
        extrema = drawn.convert("L").getextrema()
    assert extrema[1] - extrema[0] > 200


def test_kept_cells_and_runs(script):
    picture = script.load_emoji(["tropical fish"])[0]
    plan = script.chunk_picture(picture, "hilbert", 0.1)
    assert plan.computed.tolist() == [26]
    painted = script.paint_tokens(picture, plan)
    assert painted.shape == picture.shape
    assert len({tuple(colour) for colour in painted.reshape(-1, 3)}) > 10


def test_an_unknown_name_is_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["draw_hnet.py", "--name", "grue"])
    assert script.main() == 1
    assert "no shipped emoji is called 'grue'" in capsys.readouterr().err
