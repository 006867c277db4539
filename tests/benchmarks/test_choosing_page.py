"""The figures of the page on choosing a method are those of the result files."""

import json
import re
import sys

import pytest

from benchmarks import choosing_page
from benchmarks.choosing_page import (
    PAGE,
    README,
    RESULTS,
    TEMPLATE,
    insert_figures,
    render,
    render_figures,
    show_points,
)


def test_the_page_is_what_the_result_files_say():
    assert PAGE.read_text(encoding="utf-8") == render(), "run python benchmarks/choosing_page.py"


def test_the_figures_of_the_readme_are_those_of_the_result_files():
    text = README.read_text(encoding="utf-8")
    assert text == insert_figures(text), "run python benchmarks/choosing_page.py"
    overall = json.loads((RESULTS / "tome-speed-vits-cpu.json").read_text(encoding="utf-8"))["ms"]
    (line,) = [line for line in text.splitlines() if "`tome`, r=13" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3:] == [
        f"{overall['plain']:,.0f}",
        f"{overall['r=13']:,.0f}",
        f"{overall['r=13'] / overall['plain']:.2f}",
    ]


def test_the_readme_shows_what_loses_too():
    times = [float(line.split("|")[-2]) for line in render_figures().splitlines()[2:]]
    assert min(times) < 1 < max(times)


def test_a_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="needs the lines"):
        insert_figures("# adaptok")


def test_a_measured_figure_is_in_the_page_with_its_milliseconds():
    methods = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))
    row = methods["models"]["vit-s"]["settings"]["dc keep=0.5"]
    (line,) = [line for line in render().splitlines() if line.startswith("| `dc` |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:5] == [
        f"{row['tokens']:.0f}",
        f"{row['flops_ratio']:.2f}",
        f"{row['ms']:.0f}",
        f"{row['time_ratio']:.2f}",
    ]
    assert cells[5] == show_points(row["lost"])


def test_flops_never_stand_without_time():
    for line in render().splitlines():
        if "of the FLOPs" in line and line.startswith("|"):
            assert re.search(r"\d+ of \d+ ms", line), line


def test_the_template_holds_no_measured_figure_of_its_own():
    text = re.sub(r"```python\n.*?```", "", TEMPLATE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert re.findall(r"\d*\.\d+", text) == ["0.5"]  # keep=0.5
    assert "{{" not in render()


def test_a_setting_that_was_not_measured_has_a_dash():
    methods = {"models": {"vit-s": {"name": "a model (a remark)", "settings": {}}}}
    assert choosing_page.show_setting(methods, "dc keep=0.5") == (choosing_page.NOTHING,) * 2


def test_a_page_that_differs_is_noticed(tmp_path, monkeypatch):
    changed = tmp_path / "choosing.md"
    changed.write_text(render().replace("ms", "s"), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(choosing_page, "PAGE", changed)
    monkeypatch.setattr(choosing_page, "README", readme)
    monkeypatch.setattr(sys, "argv", ["choosing_page.py", "--check"])
    assert choosing_page.main() == 1
    monkeypatch.setattr(sys, "argv", ["choosing_page.py"])
    assert choosing_page.main() == 0
    assert changed.read_text(encoding="utf-8") == render()
    assert readme.read_text(encoding="utf-8") == README.read_text(encoding="utf-8")


@pytest.mark.parametrize("mean", [0.0357, -0.002])
def test_points_have_a_sign(mean):
    shown = show_points({"mean": mean, "low": mean - 0.01, "high": mean + 0.01})
    assert shown.startswith("+" if mean > 0 else "-")
