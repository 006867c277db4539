"""Every hook is documented by its signature, and tested by name."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import adaptok
from adaptok import hookspecs
from adaptok.discovery import HOST, PluginHost
from adaptok.errors import PluginError, StackError
from adaptok.testing import make_vit

HOOKS = [name for name in vars(hookspecs) if name.startswith("adaptok_")]
PAGE = Path(__file__).parents[1] / "docs" / "hooks.md"
IMAGE = torch.randn(2, 3, 32, 48)


@pytest.fixture
def plugin():
    """Registers an object for one test."""
    taken = []

    def add(instance):
        HOST.load_all()
        HOST.add(instance, type(instance).__name__)
        taken.append(instance)
        return instance

    yield add
    for instance in taken:
        HOST.manager.unregister(instance)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_documented_and_tested(hook):
    function = getattr(hookspecs, hook)
    assert inspect.getdoc(function)
    source = inspect.getsource(function)
    signature = re.search(r"def (\w+\(.*?\) -> .*?):\n", source, re.DOTALL).group(1)
    signature = re.sub(r"\s+", " ", signature).replace("( ", "(").replace(" )", ")")
    signature = signature.replace("',", ",").replace(",)", ")")
    assert f"### `{signature}`" in PAGE.read_text()
    assert f"test_hook_{hook}" in globals()


def test_hook_adaptok_register():
    class Late:
        @adaptok.hookimpl
        def adaptok_register(self, registry):
            registry.router("late-norm", "adaptok.routers:NormRouter")

    host = PluginHost()
    host.load_all()
    host.add(Late(), "late")
    assert host.registry.find("router", "late-norm").origin == "late"


class Quiet(adaptok.Stage):
    effects = adaptok.Effects("depth")

    def forward(self, inner, call):
        return inner(call)


def test_hook_adaptok_order_stages(plugin):
    class Turning:
        @adaptok.hookimpl
        def adaptok_order_stages(self, stages, backbone):
            seen.append(([type(stage).__name__ for stage in stages], backbone.name))
            return stages[::-1]

    seen = []
    turning = plugin(Turning())
    vit = adaptok.wrap(make_vit(), chunker="dc", stack=[Quiet()], budget=0.5)
    assert seen == [(["Quiet", "ChunkStage"], "timm-vit")]
    assert list(vit.blocks.adaptok) == ["dc", "quiet"]
    adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
    assert len(seen) == 1  # one stage has no order
    HOST.manager.unregister(turning)
    other = adaptok.wrap(make_vit(), chunker="dc", stack=[Quiet()], budget=0.5)
    assert list(other.blocks.adaptok) == ["quiet", "dc"]
    HOST.manager.register(turning, "Turning")


def test_a_veto_leaves_the_model_as_it_was(plugin):
    class Strict:
        @adaptok.hookimpl
        def adaptok_order_stages(self, stages, backbone):
            raise StackError("these two were never tried together")

    plugin(Strict())
    vit = make_vit()
    with pytest.raises(StackError, match="never tried together"):
        adaptok.wrap(vit, chunker="dc", stack=[Quiet()], budget=0.5)
    assert not adaptok.is_wrapped(vit)


def test_an_order_of_other_stages_is_refused(plugin):
    class Losing:
        @adaptok.hookimpl
        def adaptok_order_stages(self, stages, backbone):
            return stages[:1]

    plugin(Losing())
    with pytest.raises(StackError, match="returned other stages than it was given"):
        adaptok.wrap(make_vit(), chunker="dc", stack=[Quiet()], budget=0.5)


def test_hook_adaptok_observe(plugin):
    class Watching:
        @adaptok.hookimpl
        def adaptok_observe(self, event):
            seen.append(event)

    seen = []
    plugin(Watching())
    vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.25)
    vit(IMAGE)
    assert seen == []
    with adaptok.trace(vit) as trace:
        vit(IMAGE)
        vit(IMAGE)
    vit(IMAGE)
    assert [event.kept.tolist() for event in seen] == [[6, 6], [6, 6]]
    assert seen == trace.steps


def test_each_pass_is_told_once_and_only_if_it_ends(plugin):
    class Counting:
        @adaptok.hookimpl
        def adaptok_observe(self, event):
            seen.append(event)

    class Failing(adaptok.Stage):
        effects = adaptok.Effects("depth")

        def forward(self, inner, call):
            raise RuntimeError("in the middle of a pass")

    seen = []
    plugin(Counting())
    vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.25)
    with adaptok.trace(vit) as outer, adaptok.trace(vit) as inner:
        vit(IMAGE)
    assert len(outer.steps) == len(inner.steps) == 1
    assert seen == outer.steps
    broken = adaptok.wrap(make_vit(), stack=[Failing()], verify=False)
    with adaptok.trace(broken), pytest.raises(RuntimeError, match="in the middle"):
        broken(IMAGE)
    with adaptok.collect_losses(vit):  # no trace
        vit(IMAGE)
    assert len(seen) == 1


def test_arguments_may_be_left_out_and_misspelt_hooks_are_refused():
    class Few:
        @adaptok.hookimpl
        def adaptok_order_stages(self, stages):
            return None

    class Misspelt:
        @adaptok.hookimpl
        def adaptok_order_stage(self, stages):
            return None

    host = PluginHost()
    host.add(Few(), "few")
    with pytest.raises(PluginError, match="implements a hook that does not exist"):
        host.add(Misspelt(), "misspelt")
    assert host.manager.hook.adaptok_order_stages(stages=(), backbone=None) is None
