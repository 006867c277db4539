import pytest

from adaptok import hookimpl, routers
from adaptok.registry import Registry
from adaptok.routers import plugin

NAMES = {
    "predictability": "PredictabilityRouter",
    "covering": "CoveringRouter",
    "cosine": "CosineRouter",
    "entropy": "EntropyRouter",
    "norm": "NormRouter",
    "random": "RandomRouter",
}


def test_all_are_registered_lazily_and_load():
    registry = Registry()
    plugin.adaptok_register(registry)
    assert set(registry.names("router")) == set(NAMES)
    for name, owner in NAMES.items():
        entry = registry.find("router", name)
        assert isinstance(entry.target, str)
        assert entry.load() is getattr(routers, owner)
    assert set(routers.__all__) == set(NAMES.values())


def test_the_function_is_marked_as_a_hook():
    mark = hookimpl.project_name + "_impl"
    assert getattr(plugin.adaptok_register, mark, None)


@pytest.mark.parametrize("name", NAMES)
def test_targets_name_the_module_of_the_class(name):
    registry = Registry()
    plugin.adaptok_register(registry)
    entry = registry.find("router", name)
    assert entry.path == f"{entry.load().__module__}:{NAMES[name]}"
