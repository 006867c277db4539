"""Plug-ins as real installed distributions, each case in a fresh process."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import adaptok
from adaptok.discovery import PluginHost, find_part
from adaptok.errors import PluginError, UnknownNameError

OWN_ROUTERS = ["cosine", "covering", "dc", "entropy", "norm", "predictability", "random"]
FAKE = Path(__file__).parent / "fake_plugins"


def run(code, **environment):
    """Run code in a process that finds the fake distribution; returns the finished process."""
    head = "import json, sys, warnings\nimport adaptok\n"
    return subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", head + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(FAKE)} | environment,
    )


def test_a_plugin_is_found_and_nothing_of_it_imported_before_its_use():
    done = run("""
        names = adaptok.available("routers")
        early = "fake_edges_router" in sys.modules
        from adaptok.discovery import find_part
        import torch
        router = find_part("router", "edges")()
        routing = router(adaptok.Tokens(torch.randn(1, 6, 4), (2, 3)), adaptok.Context())
        print(json.dumps([names, early, list(routing.keep_prob.shape)]))
    """)
    assert done.returncode == 0, done.stderr
    names, early, shape = json.loads(done.stdout)
    assert {"dc", "edges"} <= set(names)
    assert not early
    assert shape == [1, 6]


def test_broken_plugins_are_reported_and_skipped_whole():
    done = run("""
        names = adaptok.available("routers")
        from adaptok.discovery import HOST
        kept = HOST.registry.find("router", "dc").origin, HOST.registry.find("router", "dc").path
        try:
            HOST.registry.find("router", "half-done")
        except adaptok.AdaptokError as error:
            message = str(error)
        plugins = sorted(name for name, _ in HOST.manager.list_name_plugin())
        print(json.dumps([names, kept, message, plugins]))
    """)
    assert done.returncode == 0, done.stderr
    names, kept, message, plugins = json.loads(done.stdout)
    assert "half-done" not in names
    assert "thief" not in names
    assert "misspelt" not in names
    assert kept == [
        "dc",
        "adaptok.dc.host:HostRouter",
    ]  # neither a name nor an entry point is shadowed
    ours = {"cache", "exit", "graph", "hnet", "merge", "patch", "prune", "width"}
    assert set(plugins) == {"dc", "edges", "hosts", "routers", *ours}
    for plugin in ("broken-import", "half", "thief", "misspelt", "silent", "dc"):
        assert f"the plug-in {plugin!r} (" in done.stderr
        assert f"the plug-in {plugin!r} could not be loaded" in message
    assert "broken on purpose" in done.stderr
    assert "implements a hook that does not exist" in done.stderr
    assert "implements no hook" in done.stderr


def test_the_environment_lists_the_only_plugins_to_load():
    done = run("print(json.dumps(adaptok.available('routers')))", ADAPTOK_PLUGINS="edges")
    assert json.loads(done.stdout) == sorted([*OWN_ROUTERS, "edges", "needs-more", "not-there"])
    assert "half" not in done.stderr
    none = run("print(json.dumps(adaptok.available()))", ADAPTOK_PLUGINS="")
    names = json.loads(none.stdout)
    assert names["routers"] == OWN_ROUTERS
    assert names["chunkers"] == names["dechunkers"] == ["dc"]
    assert "timm-vit" in names["backbones"]
    assert names["stages"] == []


def test_strict_mode_makes_a_broken_plugin_an_error():
    done = run("adaptok.available()", ADAPTOK_STRICT_PLUGINS="1", ADAPTOK_PLUGINS="broken-import")
    assert done.returncode != 0
    assert "PluginError: the plug-in 'broken-import' (fake_broken_import) cannot be" in done.stderr


def test_trace_prints_each_hook_call():
    done = run("adaptok.available()", ADAPTOK_TRACE_PLUGINS="1", ADAPTOK_PLUGINS="edges")
    assert "adaptok: adaptok_register -> dc" in done.stderr
    assert "adaptok: adaptok_register -> edges" in done.stderr


def test_nothing_is_discovered_at_import():
    done = run("print('fake_edges' in sys.modules or 'pluggy' in sys.modules)")
    assert done.stdout.strip() == "False"


def test_a_class_that_cannot_be_imported_is_described_as_such():
    done = run("print(adaptok.describe('needs-more'))", ADAPTOK_PLUGINS="edges")
    assert "router 'needs-more' (edges, fake_needs_more:Router): cannot be used" in done.stdout
    assert "run `pip install more`" in done.stdout


def test_a_stale_installation_is_a_loud_error(monkeypatch):
    monkeypatch.setattr("adaptok.discovery.entry_points", lambda group: [])
    with pytest.raises(PluginError, match="own entry point 'dc' is not announced"):
        PluginHost().load_all()


def test_names_of_the_reference_and_of_a_notebook():
    assert "dc" in adaptok.available("chunkers")
    assert find_part("dechunker", "dc").__name__ == "HostDechunker"
    assert [entry.kind for entry in adaptok.describe("dc").entries] == [
        "router", "chunker", "dechunker"
    ]  # fmt: skip
    with pytest.raises(UnknownNameError, match="no kind 'router': kinds are routers, chunkers"):
        adaptok.available("router")
    with pytest.raises(UnknownNameError, match="there is no chunker 'tokenlearner'"):
        adaptok.describe("tokenlearner")


def test_a_plugin_object_may_come_later():
    class Plugin:
        @adaptok.hookimpl
        def adaptok_register(self, registry):
            registry.router("late", "adaptok.dc:DCRouter")

    host = PluginHost()
    host.load_all()
    host.add(Plugin(), "late-plugin")
    assert host.registry.find("router", "late").origin == "late-plugin"
    with pytest.raises(PluginError, match="'late-plugin' is loaded already"):
        host.add(Plugin(), "late-plugin")
