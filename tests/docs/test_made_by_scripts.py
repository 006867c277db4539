"""What a script made is up to date, or at least has a script that says so."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PICTURES = sorted((ROOT / "docs" / "pictures").iterdir())
SOURCES = [
    *sorted((ROOT / "scripts").glob("draw_*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "examples").glob("*.py")),
    ROOT / "adaptok" / "cli" / "gallery.py",  # adaptok gallery
]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *ROOT.glob("adaptok/zoo/*/*.md"),
]
# scripts whose usage says SUBJECT.png: the words that it stands for
SUBJECTS = {
    "draw_dc.py": ("dc", "routers"),
    "draw_prune.py": ("evit", "dynamicvit"),
    "draw_tome.py": ("tome", "tomesd"),
}


def names_of(path):
    """Return the pictures that a script says it makes."""
    names = set(re.findall(r"([\w-]+\.(?:png|svg))", path.read_text()))
    return names | {f"{subject}.png" for subject in SUBJECTS.get(path.name, ())}


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_picture_has_a_script(picture):
    assert [path.name for path in SOURCES if picture.name in names_of(path)]


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_picture_is_shown(picture):
    assert any(f"pictures/{picture.name}" in path.read_text() for path in DOCUMENTS)


@pytest.mark.parametrize("name", SUBJECTS)
def test_subjects_are_those_of_the_script(name):
    text = (ROOT / "scripts" / name).read_text()
    for subject in SUBJECTS[name]:
        assert re.search(rf'^    "{subject}":', text, re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_pictures_say_what_they_show(path):
    """Readers who see no picture get words."""
    for words, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", path.read_text()):
        assert len(words) > 10, target


def test_page_of_commands_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import write_cli_docs

    sys.modules.pop("write_cli_docs")
    page = write_cli_docs.write_page()
    assert page == write_cli_docs.write_page()
    assert write_cli_docs.PAGE.read_text() == page, "run python scripts/write_cli_docs.py"


def test_page_of_commands_has_all_of_them():
    from adaptok.cli import app

    text = (ROOT / "docs" / "api" / "command-line.md").read_text()
    for command in app.registered_commands:
        word = command.name or command.callback.__name__.replace("_", "-")
        if not command.hidden:
            assert re.search(rf"^#+ `adaptok {word}[ `]", text, re.MULTILINE), word
