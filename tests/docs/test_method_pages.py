"""Each method has a page with the same parts, and each part of the wheel has a page."""

import re
from pathlib import Path

import pytest

from adaptok.discovery import HOST, available

FOLDER = Path(__file__).parents[2] / "docs" / "methods"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "index.md")
HEADINGS = ("## Formula", "## When it helps, and when not", "## Cost", "## Cite")
NAV = (FOLDER.parents[1] / "mkdocs.yml").read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_has_all_parts(path):
    text = path.read_text()
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    assert len(lines[2]) > 60, "the idea comes first"
    top = text[: text.index("\n## ")]
    assert re.search(r"^!\[[^\]]+\]\(\.\./pictures/[\w-]+\.png\)", top, re.MULTILINE)
    assert "```python\n" in top
    for heading in HEADINGS:
        assert heading in lines, heading
        after = text.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]
        assert len(after.strip()) > 60, f"{heading} says nothing"
    assert re.search(r"arXiv|\b(19|20)\d\d\b", text.split("\n## Cite\n")[1]), "no paper, no year"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_is_on_the_overview_and_in_the_menu(path):
    assert f"]({path.name})" in (FOLDER / "index.md").read_text()
    assert f"methods/{path.name}" in NAV


def registered():
    """Return the names of what ships with adaptok, without adapters of hosts."""
    packages = (
        "adaptok.",
        *(f"{path.name}." for path in FOLDER.parents[1].glob("plugins/adaptok_*")),
    )
    return sorted(
        {
            name
            for kind in ("router", "chunker", "dechunker", "stage")
            for name in available(f"{kind}s")
            if HOST.registry.find(kind, name).load().__module__.startswith(packages)
        }
    )


@pytest.mark.parametrize("name", registered())
def test_method_has_a_page(name):
    assert any(f'"{name}"' in path.read_text() or f"`{name}`" in path.read_text() for path in PAGES)
