"""The picture of the flow shows what a wrapped model decided."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import draw_flow

    return draw_flow


def test_what_is_drawn_was_computed(script):
    seen = script.look("parrot")
    assert seen.keep.shape == (16, 16)
    assert seen.keep.sum() == round(script.KEEP * 256)
    assert set(seen.token.flatten()) == set(range(seen.keep.sum()))
    assert seen.prob[seen.keep].min() >= seen.prob[~seen.keep].max()
    words = [text.get_text() for text in script.draw(seen).figure.texts]
    assert "77 of 256 cells" in words
    assert "the host's blocks, on 77 tokens, not 256" in words


def test_nothing_is_written_over_the_edge(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_flow.py", "--output", str(tmp_path / "flow.png")])
    assert script.main() == 0
    with Image.open(tmp_path / "flow.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 1000
    for edge in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert (edge == 255).all()
    assert (pixels < 200).any(axis=-1).mean() > 0.05
