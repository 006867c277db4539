import subprocess
import sys

import pytest
from adaptok_graph.geometric import import_geometric

import adaptok
from adaptok.errors import MissingPackageError
from adaptok.testing import make_vit

COMMAND = r'pip install "adaptok\[graph\]"'


@pytest.fixture
def without_geometric(monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == "torch_geometric":
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch_geometric", None)


@pytest.mark.usefixtures("without_geometric")
@pytest.mark.parametrize(
    "parts",
    [
        {"chunker": "graph"},
        {"chunker": "graph", "router": "norm", "dechunker": "dc"},
        {"chunker": "dc", "router": "graph"},
        {"chunker": "dc", "dechunker": "graph"},
    ],
)
def test_a_part_that_is_built_without_it_names_the_command(parts):
    vit = make_vit()
    with pytest.raises(MissingPackageError, match=COMMAND):
        adaptok.wrap(vit, budget=0.5, **parts)
    assert not adaptok.is_wrapped(vit)


@pytest.mark.usefixtures("without_geometric")
def test_the_parts_are_still_listed():
    assert "graph" in adaptok.available("chunkers")
    with pytest.raises(MissingPackageError, match="'torch_geometric'"):
        import_geometric("utils")


def test_neither_adaptok_nor_the_plugin_loads_it_before_its_use():
    code = (
        "import sys, adaptok, adaptok_graph.plugin\n"
        "adaptok.describe('graph').entries[0].load()\n"
        "assert 'adaptok_graph.router' in sys.modules\n"
        "assert 'torch_geometric' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
