"""Every public name has its entry in the API pages, and every entry is of something that exists."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import adaptok
from adaptok.discovery import HOST, available

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ENTRIES = [
    (page.name, entry)
    for page in PAGES
    for entry in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]
PACKAGES = ("measure", "testing", "see", "diffusion", "dc", "zoo")
PLUGINS = sorted(path.name for path in (ROOT / "plugins").glob("adaptok_*"))
# of adaptok.train, which has no list of public names: what only its own modules call
INNER = {
    "batches",
    "decoding",
    "emoji",
    "learner",
    "npz",
    "processes",
    "sample_store",
    "sharding",
    "tuning_loss",
}


def find(path):
    """Return what a dotted path names."""
    parts = path.split(".")
    for place in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:place]))
        except ModuleNotFoundError as error:
            if error.name and not path.startswith(error.name):
                raise
            continue
        for part in parts[place:]:
            found = getattr(found, part)
        return found
    raise AttributeError(path)


def public_names():
    """Yield each public name with a dot in it."""
    yield from (f"adaptok.{name}" for name in adaptok.__all__)
    for package in [*(f"adaptok.{name}" for name in PACKAGES), *PLUGINS]:
        module = importlib.import_module(package)
        yield from (f"{package}.{name}" for name in getattr(module, "__all__", ()))


@pytest.fixture(scope="module")
def described():
    """Ids of all objects that have an entry."""
    return {id(find(entry)) for _, entry in ENTRIES}


@pytest.mark.parametrize(("page", "entry"), ENTRIES)
def test_entry_is_of_something_that_exists(page, entry):
    assert find(entry) is not None


def test_no_entry_comes_twice():
    entries = [entry for _, entry in ENTRIES]
    assert sorted(entries) == sorted(set(entries))
    objects = [id(find(entry)) for entry in entries]
    assert len(objects) == len(set(objects))


@pytest.mark.parametrize("name", tuple(public_names()))
def test_public_name_has_an_entry(name, described):
    assert id(find(name)) in described, f"docs/api has no `::: {name}`"


def test_a_missing_entry_is_noticed(described):
    assert id(adaptok.wrap) in described
    assert id(test_a_missing_entry_is_noticed) not in described


def test_each_hook_has_an_entry():
    from adaptok import hookspecs

    entries = {entry for _, entry in ENTRIES}
    hooks = [name for name in vars(hookspecs) if name.startswith("adaptok_")]
    assert len(hooks) >= 3
    for hook in hooks:
        assert f"adaptok.hookspecs.{hook}" in entries


def test_each_error_has_an_entry():
    from adaptok import errors

    entries = {entry for _, entry in ENTRIES} | {"adaptok.errors.AdaptokError"}
    own = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert {f"adaptok.errors.{name}" for name in own} <= entries


def test_each_module_of_training_has_an_entry():
    entries = {entry for _, entry in ENTRIES}
    for path in (ROOT / "adaptok" / "train").glob("*.py"):
        if path.stem not in {"__init__", *INNER}:
            module = f"adaptok.train.{path.stem}."
            assert any(entry.startswith(module) for entry in entries), module


def test_each_registered_part_has_an_entry(described):
    """Of what ships with adaptok; adapters of hosts have the page of hosts instead."""
    packages = ("adaptok.", *(f"{name}." for name in PLUGINS))
    for kind in ("router", "chunker", "dechunker", "stage"):
        for name in available(f"{kind}s"):
            part = HOST.registry.find(kind, name).load()
            if part.__module__.startswith(packages):
                assert id(part) in described, f"docs/api has no entry of the {kind} {name}"


def imported_names():
    """Yield what documents and examples import from adaptok and its plug-ins."""
    found = set()
    for path in [*DOCUMENTS, *EXAMPLES]:
        for module, names in re.findall(
            r"^from (adaptok[\w.]*) import (\([^)]*\)|[^\n]+)$", path.read_text(), re.MULTILINE
        ):
            for name in re.findall(r"\w+", names.split("#")[0]):
                found.add(f"{module}.{name}")
    return sorted(found)


# what a plug-in's author meets in the guides, and does not call
GUIDED = {"adaptok.discovery.HOST", "adaptok.discovery.PluginHost", "adaptok.train"}


@pytest.mark.parametrize("name", imported_names())
def test_what_documents_import_has_an_entry(name, described):
    found = find(name)
    if name in GUIDED or type(found) is type(sys):
        return
    assert id(found) in described, f"docs/api has no `::: {name}`"


def named_in_text():
    """Yield dotted names in the text of the documents."""
    found = set()
    for path in DOCUMENTS:
        text = re.sub(r"^( *)(`{3,}).*?^\1\2", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`\n]+)`", text):
            match = re.fullmatch(r"(adaptok[a-z_]*(?:\.\w+)+)(?:\(.*\))?", code)
            if match and not re.search(r"\.(py|json|md|yml|toml|html|safetensors)$", match[1]):
                found.add(match[1])
    return sorted(found)


@pytest.mark.parametrize("name", named_in_text())
def test_name_in_a_text_exists(name):
    assert find(name) is not None
