"""What scripts/docs_hooks.py and scripts/docs_signatures.py do to pages and sources."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods" / "page.md"


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import docs_hooks

    return docs_hooks


def test_links_out_of_docs_are_found(hooks):
    assert hooks.find_outside(PAGE, "../../examples/wrap_vit.py") == Path("examples/wrap_vit.py")
    for target in ("../wrapping.md", "../../nothing.py", "../../../shared/style.md", "../.."):
        assert hooks.find_outside(PAGE, target) is None


def test_pages_of_files(hooks):
    assert hooks.name_page(Path("examples/wrap_vit.py")) == "repository/examples/wrap_vit.py.md"
    assert hooks.name_page(Path("examples/a/README.md")) == "repository/examples/a/README.md"
    page = hooks.show_file(Path("examples/wrap_vit.py"))
    assert page.startswith("---\nhide: [navigation, toc]\n---\n\n# wrap_vit.py\n")
    assert "````python\n" + (ROOT / "examples" / "wrap_vit.py").read_text()[:80] in page
    text = hooks.show_file(Path("CONTRIBUTING.md"))
    assert "](" not in text.replace("](https://", "")


def test_formulas_become_mathml(hooks):
    html = '<div class="arithmatex">\\[p &lt; \\tfrac{1}{2}\\]</div>'
    found = hooks.on_page_content(html, page=None, config=None, files=None)
    assert found.startswith('<div class="formula"><math')
    assert "<mfrac" in found
    assert "&#x0003C;" in found
    inline = '<span class="arithmatex">\\(x\\)</span>'
    assert 'display="inline"' in hooks.on_page_content(inline, page=None, config=None, files=None)


def test_pictures_open_in_full_size(hooks):
    html = '<p><img alt="a" src="../p.png" /></p><p>text <img alt="b" src="q.png" /></p>'
    found = hooks.on_page_content(html, page=None, config=None, files=None)
    assert found.startswith('<p><a class="picture" href="../p.png"><img')
    assert found.count("<a ") == 1


def test_configurations_have_a_signature_and_examples_are_code(monkeypatch):
    import griffe

    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import docs_signatures

    extensions = griffe.Extensions(docs_signatures.Signatures())
    package = griffe.load(
        "adaptok", search_paths=[str(ROOT)], extensions=extensions, submodules=True
    )
    config = package["dc.config.DCDiTConfig"]
    names = [parameter.name for parameter in config.parameters]
    assert {"scale", "hidden_size", "layout"} <= set(names)
    assert names.index("scale") < names.index("layout")  # inherited fields come first
    assert str(config.parameters["in_channels"].default) == "4"
    assert not [name for name in config.members if name.startswith(("check_", "fill_"))]
    assert "Examples:" in package["budgets.Budget"].docstring.value
    assert "Example:" not in package["budgets.Budget"].docstring.value


def test_each_example_is_on_the_page_of_examples():
    text = (ROOT / "docs" / "examples.md").read_text()
    scripts = sorted((ROOT / "examples").glob("*.py"))
    assert len(scripts) >= 6
    for path in scripts:
        assert f"](../examples/{path.name})" in text
