"""A stranger copies the template, installs it, and its parts are there by name."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).parents[2] / "examples" / "plugin_template"


def run(folder, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The template as a stranger has it: outside of this repository."""
    folder = tmp_path_factory.mktemp("copied") / "plugin"
    shutil.copytree(TEMPLATE, folder, ignore=shutil.ignore_patterns("*.egg-info", "build", "__py*"))
    return folder


@pytest.fixture(scope="module")
def installed(copied):
    """A folder into which pip has installed the template, without a network."""
    target = copied.parent / "site"
    run(
        copied.parent,
        "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index",
        "--no-deps", "--no-build-isolation", "--target", str(target), str(copied),
    )  # fmt: skip
    return target


def run_code(folder, installed, code, **environment):
    out = run(folder, "-c", textwrap.dedent(code), PYTHONPATH=str(installed), **environment)
    return json.loads(out)


def test_its_parts_are_there_by_name_and_work(tmp_path, installed):
    names, early, repr_of_blocks, kept, same = run_code(
        tmp_path,
        installed,
        """
        import json, sys
        import adaptok
        names = [adaptok.available("routers"), adaptok.available("chunkers")]
        early = "adaptok_edges.router" in sys.modules
        import torch
        from adaptok.testing import make_vit
        vit, image = make_vit(), torch.randn(2, 3, 32, 48)
        before = vit(image)
        adaptok.wrap(vit, chunker="dc", router={"name": "edges", "contrast": 2.0}, budget=0.5)
        with adaptok.trace(vit) as trace:
            vit(image)
        text = vit.blocks.extra_repr()
        kept = trace.steps[0].kept.tolist()
        same = torch.equal(adaptok.unwrap(vit)(image), before)
        print(json.dumps([names, early, text, kept, same]))
        """,
    )
    assert "edges" in names[0]
    assert "similar" in names[1]
    assert not early  # a name costs no import
    assert "router=EdgeRouter" in repr_of_blocks
    assert kept == [12, 12]
    assert same


def test_without_the_installation_the_names_are_unknown(tmp_path):
    out = run(tmp_path, "-c", "import adaptok; print('edges' in adaptok.available('routers'))")
    assert out.strip() == "False"


def test_its_own_tests_pass(copied, installed):
    out = run(copied, "-m", "pytest", "-q", "-p", "no:cacheprovider", PYTHONPATH=str(installed))
    counts = re.search(r"(\d+) passed", out)
    assert counts, out
    assert int(counts[1]) >= 60
    assert "failed" not in out


def test_the_code_of_its_readme_runs(tmp_path, installed):
    (block,) = re.findall(r"```python\n(.*?)```", (TEMPLATE / "README.md").read_text(), re.DOTALL)
    out = run(tmp_path, "-c", block, PYTHONPATH=str(installed))
    assert "router=EdgeRouter" in out
    assert "[6, 6]" in out


def test_it_uses_public_names_only():
    import adaptok

    for path in TEMPLATE.rglob("*.py"):
        for module, names in re.findall(r"from (adaptok[\w.]*) import ([\w, ]+)", path.read_text()):
            if module == "adaptok":
                assert set(names.split(", ")) <= set(adaptok.__all__), path
            else:
                assert module.startswith(("adaptok_edges", "adaptok.testing")), path
        assert len(path.read_text().splitlines()) < 100


def test_it_says_what_it_is_and_under_which_licence():
    text = (TEMPLATE / "README.md").read_text()
    assert len(text.splitlines()) <= 60
    assert "Apache-2.0" in (TEMPLATE / "LICENSE").read_text()
    assert 'license = "Apache-2.0"' in (TEMPLATE / "pyproject.toml").read_text()
