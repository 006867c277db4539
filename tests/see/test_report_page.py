"""The report in a real browser: sliders, pointer, keys, both themes, desktop and phone."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from report_cells import GRID, make_run

from adaptok.see import write_runs

N = GRID[0] * GRID[1]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    runs = [make_run("drop 0", 12), make_run("drop 0.5 <b>", 6)]
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    return write_runs(runs, path, names=["cat </script>", "dog & co"], title="A <test>", note="x")


@pytest.fixture
def page(browser, path):
    browser.open(path)
    yield browser
    assert browser.errors() == []


def maps_of(page):
    """The pixels of all maps, one text each."""
    return page.run("return [...document.querySelectorAll('canvas')].map(one => one.toDataURL())")


def colour_at(page, canvas, row, column):
    """Colour in the middle of a cell."""
    return page.run(
        "const [c, y, x] = arguments;"
        "const at = [(x + .5) * c.width / arguments[3], (y + .5) * c.height / arguments[4]];"
        "return [...c.getContext('2d').getImageData(...at.map(Math.floor), 1, 1).data].slice(0, 3)",
        page.find_all("canvas")[canvas], row, column, GRID[1], GRID[0],
    )  # fmt: skip


def set_slider(page, name, value):
    page.run(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('input'))",
        name, value,
    )  # fmt: skip


def choose_view(page, view):
    page.find(f"input[value={view}]").click()


def test_it_says_what_it_shows_and_a_name_cannot_end_the_script(page):
    assert page.driver.title == "A <test>"
    assert page.find("h1").text == "A <test>"
    titles = [card.text for card in page.find_all(".card .title b")]
    assert titles == ["cat </script>", "dog & co"]
    assert len(page.find_all("canvas")) == 4
    assert page.find(".card .title span").text == f"12 of {N} tokens (50 %)"


def test_step_slider_moves_by_keys_and_changes_maps(page):
    before = maps_of(page)
    page.find("#step").click()
    page.press("\ue011")  # home
    page.press("\ue014", "\ue014")  # right
    assert page.find("#step-name").text == "3 of 3"
    after = maps_of(page)
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert page.find(".card .title span").text == f"14 of {N} tokens (58 %)"
    assert "14.0 tokens" not in page.find("#now").text
    assert "10.5 tokens" in page.find("#now").text  # mean of 14 and 7
    assert "0.140 GFLOPs, 1.40 ms" in page.find("#now").text


def test_budget_slider_and_table(page):
    before = maps_of(page)
    set_slider(page, "budget", 1)
    assert page.find("#budget-name").text == "drop 0.5 <b>"
    after = maps_of(page)
    assert before[1] != after[1]  # the map
    assert before[0] == after[0]  # what the model is given is the same
    rows = [row.text for row in page.find_all("#costs tbody tr")]
    assert rows[0].split()[-4:] == ["40.3", "%", "0.130", "1.30"]
    assert rows[1].startswith("drop 0.5 <b>")
    current = [row.get_attribute("aria-current") for row in page.find_all("#costs tbody tr")]
    assert current == ["false", "true"]
    page.find("#costs tbody tr button").click()
    assert maps_of(page) == before


def test_kept_cells_keep_their_colour_and_others_are_dark(page):
    clean = make_run("drop 0", 12).steps[0].clean[0]
    choose_view(page, "image")
    plain = [colour_at(page, 1, 0, 3), colour_at(page, 1, 3, 2)]
    np.testing.assert_allclose(plain[0], clean[2, 17], atol=2)
    choose_view(page, "kept")
    assert colour_at(page, 1, 0, 3) == plain[0]  # cell 3 is kept
    dark = colour_at(page, 1, 3, 2)  # cell 20 is not
    np.testing.assert_allclose(
        dark, 0.2 * np.array(plain[1]) + 0.8 * np.array([26, 32, 48]), atol=3
    )


def test_probabilities_and_tokens(page):
    choose_view(page, "prob")
    assert page.find("#scale").is_displayed()
    assert colour_at(page, 1, 0, 0) == [253, 231, 37]  # 1
    assert colour_at(page, 1, 3, 5) == [68, 1, 84]  # 0
    choose_view(page, "tokens")
    step = make_run("drop 0", 12).steps[0]
    cells = step.clean[0].reshape(GRID[0], 5, GRID[1], 5, 3).mean((1, 3)).reshape(N, 3)
    last = cells[11:].mean(0)  # cells 11 to 23 share a token
    np.testing.assert_allclose(colour_at(page, 1, 3, 2), last, atol=3)
    np.testing.assert_allclose(colour_at(page, 1, 0, 4), cells[4], atol=3)
    red, green, blue = colour_at(page, 3, 3, 5)  # hatched: grey, or a line
    assert max(red, green, blue) - min(red, green, blue) < 40


def test_hover_tells_about_a_cell(page):
    canvas = page.find_all("canvas")[1]
    before = maps_of(page)
    page.hover(canvas, 2.5 / GRID[1], 3.5 / GRID[0])
    words = page.find("#readout-0").text
    assert words.startswith("Row 4, column 3: token 11 stands for 13 cells.")
    assert "Keep probability 0.13" in words
    assert "place of this cell" not in words
    after = maps_of(page)
    assert after[0] != before[0]  # outlined in both
    assert after[1] != before[1]
    assert after[2:] == before[2:]
    page.hover(canvas, 3.5 / GRID[1], 0.5 / GRID[0])
    words = page.find("#readout-0").text
    assert words.startswith("Row 1, column 4: token 3 stands for this cell alone. It has the place")
    page.hover(page.find_all("canvas")[3], 5.5 / GRID[1], 3.5 / GRID[0])
    assert "no token stands for this cell; it was pruned" in page.find("#readout-1").text
    assert page.find("#readout-0").text == ""
    page.hover(page.find("h1"), 0.5, 0.5)
    assert maps_of(page) == before


def test_keys_walk_over_the_cells(page):
    canvas = page.find_all("canvas")[1]
    page.run("arguments[0].focus({focusVisible: true})", canvas)
    places = []
    for keys in (["\ue011"], ["\ue013"], ["\ue014"], ["\ue015"], ["\ue010"]):
        page.press(*keys)  # home, up, right, down, end
        places.append(tuple(map(int, re.findall(r"\d+", page.find("#readout-0").text)[:2])))
    (row, first), *others = places
    assert first == 1
    assert others == [(row - 1, 1), (row - 1, 2), (row, 2), (row, GRID[1])]
    page.press("\ue00c")  # escape
    assert page.find("#readout-0").text == ""


def test_everything_is_reached_by_tab(page):
    page.run("document.body.focus()")
    reached = []
    for _ in range(14):
        page.press("\ue004")
        reached.append(page.run(
            "const e = document.activeElement; return e.id || e.value || e.tagName.toLowerCase()"
        ))  # fmt: skip
    for needed in ("theme", "budget", "step", "kept", "canvas"):
        assert needed in reached, reached
    nameless = page.run(
        "return [...document.querySelectorAll('canvas, input, button, img, svg[role]')].filter("
        "e => !(e.ariaLabel || e.alt || e.textContent || (e.labels && e.labels.length))).length"
    )
    assert nameless == 0


@pytest.mark.parametrize("dark", [False, True])
def test_theme(page, dark):
    page.set_screen(1280, 1000, dark=dark)
    paper = page.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 29)" if dark else "rgb(255, 255, 255)")
    page.find("#theme").click()
    other = page.run("return getComputedStyle(document.body).backgroundColor")
    assert other != paper
    assert page.find("#theme").text == ("Dark" if dark else "Light")
    assert page.find("#theme").get_attribute("aria-pressed") == ("false" if dark else "true")


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), (1280, True), (360, False), (360, True)]
)
def test_screenshots_fit_the_screen(page, width, dark):
    page.set_screen(width, 800, dark=dark)
    assert page.run("return document.documentElement.scrollWidth") <= width
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        pixels = np.asarray(shot.convert("L"))
        assert width - 20 < shot.width <= width  # a scroll bar
        assert shot.height > 900
    assert (pixels.mean() < 128) == dark
    assert len(np.unique(pixels)) > 100


def test_nothing_is_loaded_from_elsewhere(page, path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"'{$]+""", text)
    assert "default-src 'none'" in text
    outside = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in outside if not name.startswith("data:")] == []
    assert page.run("return fetch('https://example.org/x').then(() => 'ok', () => 'refused')") == (
        "refused"
    )
    assert any("Content Security Policy" in message for message in page.errors())


def test_one_step_and_one_budget_have_no_sliders(browser, tmp_path):
    browser.open(write_runs([make_run(steps=1)], tmp_path / "one.html"))
    for name in ("budget-row", "step-row", "chart-section"):
        assert not browser.find(f"#{name}").is_displayed()
    assert browser.find("#costs tbody").text.startswith("drop 0")
    assert browser.errors() == []
