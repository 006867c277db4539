import inspect
import json
import subprocess
import sys
import textwrap

import pytest

import adaptok

# no Example needed: an error without arguments, and a module of functions that have their own
SIMPLE = {"AdaptokError", "hookimpl", "losses", "Chunker", "Dechunker"}
OPTIONAL = {
    "timm", "diffusers", "transformers", "accelerate", "PIL", "matplotlib", "typer", "rich",
    "torch_geometric",
}  # fmt: skip


def run_fresh(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", adaptok.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(adaptok, name)
    assert value is not None
    text = inspect.getdoc(value)
    assert text
    first = text.split("\n\n")[0]
    assert first.rstrip().endswith(".") or first.rstrip().endswith(":"), first
    if name not in SIMPLE:
        assert "Example:" in text, f"adaptok.{name} has no Example in its docstring"
        assert ">>>" in text


def test_public_names_are_sorted_listed_and_found_by_dir():
    assert sorted(adaptok.__all__) == adaptok.__all__
    assert len(set(adaptok.__all__)) == len(adaptok.__all__)
    assert set(adaptok.__all__) <= set(dir(adaptok))
    assert set(adaptok.HOMES) <= set(adaptok.__all__)


def test_every_public_function_of_losses_has_an_example():
    functions = [
        value
        for _, value in inspect.getmembers(adaptok.losses, inspect.isfunction)
        if value.__module__ == "adaptok.losses"
    ]
    assert functions
    for function in functions:
        assert "Example:" in inspect.getdoc(function)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'adaptok' has no attribute 'DCDIT'"):
        _ = adaptok.DCDIT


def test_no_optional_package_is_loaded_until_it_is_needed():
    at_first, before, after = run_fresh("""
        import json, sys
        import adaptok
        at_first = sorted(sys.modules)
        core = [adaptok.Tokens, adaptok.Budget, adaptok.Router, adaptok.Chunker, adaptok.losses]
        before = sorted(sys.modules)
        import torch
        config = adaptok.DCDiTConfig(hidden_size=32, depth=1, num_heads=2, latent_size=4)
        adaptok.DCDiT(config)(torch.randn(1, 4, 4, 4), torch.tensor([5]), torch.tensor([1]))
        print(json.dumps([at_first, before, sorted(sys.modules)]))
        """)
    assert "torch" not in at_first  # so that `adaptok --help` answers at once
    for loaded in (before, after):
        assert "torch" in loaded  # the list is really that of a process that imported adaptok
        assert "adaptok.budgets" in loaded
        assert {name.partition(".")[0] for name in loaded} & OPTIONAL == set()
    # the core imports no method
    methods = ("adaptok.dc", "adaptok.train", "adaptok.see", "adaptok.zoo", "adaptok.cli",
               "adaptok.measure", "adaptok.diffusion")  # fmt: skip
    assert [name for name in before if name.startswith(methods)] == []
    assert "adaptok.dc.model" in after
