"""Every example runs, says what it found, and draws a picture that shows something."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_LINES = 80
# small settings, the picture, and what must be said
SCRIPTS = {
    "wrap_vit": (["--size", "32", "--keep", "0.25"], "wrap_vit.png", "the same bits: True"),
    "wrap_dit_in_pipeline": (["--steps", "2"], "pipeline.png", "[128, 128, 64, 64]"),
    "router_in_ten_lines": (["--size", "32"], "router.png", "[16] of 64 cells kept"),
    "train_dcdit": (["--steps", "4", "--size", "8"], "training.png", "4 steps in"),
    "stack_methods": (["--size", "32", "--keep", "0.5"], "stack.png", "[16] of 64 tokens left"),
    "compare_budgets": (["--count", "1", "--repeats", "1"], "budgets.png", "256 -> 41 tokens"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_draws_a_picture_and_says_what_it_found(name, tmp_path, monkeypatch, capsys):
    options, picture, said = SCRIPTS[name]
    script = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--output", str(tmp_path), *options])
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 4
    assert any(said in line for line in lines), lines
    assert any(picture in line for line in lines), lines
    with Image.open(tmp_path / picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(float)
    height, width, _ = pixels.shape
    assert width >= 600
    assert height >= 200
    # something is drawn in each third of the picture, and not everywhere
    thirds = np.array_split(pixels, 3, axis=1)
    assert min(third.std() for third in thirds) > 4
    assert (pixels == 255).all(axis=-1).mean() > 0.1


def test_there_are_six_examples_and_all_are_short_and_tested():
    scripts = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert scripts == sorted(SCRIPTS)
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < MOST_LINES, path.name
        assert f"Usage: python examples/{path.name}" in text
