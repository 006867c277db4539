import pytest

import adaptok
from adaptok.dc import DCChunker, DCRouter
from adaptok.errors import MissingPackageError, PluginError, RegistryError, UnknownNameError
from adaptok.registry import Registry
from adaptok.testing import make_vit


@pytest.fixture
def registry():
    registry = Registry()
    with registry.record("first"):
        registry.router("dc", "adaptok.dc:DCRouter")
        registry.chunker("dc", DCChunker)
    return registry


def test_lazy_names_are_imported_when_they_are_asked_for(registry):
    entry = registry.find("router", "dc")
    assert entry.target == "adaptok.dc:DCRouter"
    assert entry.load() is DCRouter
    assert registry.find("chunker", "dc").path == "adaptok.dc.chunker:DCChunker"
    assert registry.names("router") == ("dc",)
    assert registry.names("dechunker") == ()


def test_a_taken_name_is_refused_with_both_origins(registry):
    def register_two():
        with registry.record("second"):
            registry.router("fresh", "other:Thing")
            registry.router("dc", "other:Thing")

    with pytest.raises(
        RegistryError, match=r"'dc' of second \(other:Thing\).* first has that name"
    ):
        register_two()
    assert registry.names("router") == ("dc",)  # nothing of the second one stayed
    assert registry.find("router", "dc").origin == "first"
    assert registry.origin == "__main__"


def test_a_notebook_cell_may_run_again_but_not_take_another_name(registry):
    def make_router():
        class Cell(adaptok.Router):
            def forward(self, tokens, context):
                raise NotImplementedError

        Cell.__module__, Cell.__qualname__ = "__main__", "Cell"
        return Cell

    old, new = make_router(), make_router()
    registry.router("cell", old)
    registry.router("cell", new)
    assert registry.find("router", "cell").load() is new
    with pytest.raises(RegistryError, match="first has that name"):
        registry.router("dc", new)
    other = make_router()
    other.__qualname__ = "Other"
    with pytest.raises(RegistryError, match="choose another name"):
        registry.router("cell", other)


def test_unknown_names_list_what_there_is(registry):
    registry.failures["bad"] = "ImportError: no"
    with pytest.raises(UnknownNameError) as caught:
        registry.find("router", "dcc")
    message = str(caught.value)
    assert message.startswith("there is no router 'dcc': known are dc; did you mean 'dc'?")
    assert "the plug-in 'bad' could not be loaded (ImportError: no)" in message
    registry.dechunker("plug", "a:B")
    with pytest.raises(UnknownNameError, match="'plug' is a dechunker"):
        registry.find("router", "plug")


@pytest.mark.parametrize("name", ["", "Upper", "two words", "9lives", "-x", "x-", "ä", None])
def test_badly_spelt_names_are_refused(registry, name):
    with pytest.raises(RegistryError, match="lower-case letters"):
        registry.router(name, DCRouter)


def test_targets_of_another_kind_are_refused(registry):
    with pytest.raises(RegistryError, match=r"router 'x' needs a subclass of adaptok\.Router"):
        registry.router("x", DCChunker)
    with pytest.raises(RegistryError, match="class or 'module:Class', got 'nothing'"):
        registry.router("x", "nothing")
    with pytest.raises(RegistryError, match="needs a subclass"):
        registry.router("x", DCRouter(32))
    registry.router("lazy", "adaptok.dc:DCChunker")
    with pytest.raises(RegistryError, match="router 'lazy' needs a subclass"):
        registry.find("router", "lazy").load()


def test_targets_that_cannot_be_imported_say_what_to_do(registry):
    registry.router("a", "nowhere_at_all:Thing", install="pip install nowhere")
    with pytest.raises(MissingPackageError, match="run `pip install nowhere`"):
        registry.find("router", "a").load()
    registry.router("b", "adaptok.dc:Nothing")
    with pytest.raises(PluginError, match=r"said to be adaptok\.dc:Nothing, and there is none"):
        registry.find("router", "b").load()


@pytest.mark.parametrize(("first", "second"), [("stage", "chunker"), ("chunker", "stage")])
def test_a_method_has_one_name(first, second):
    registry = Registry()
    targets = {"stage": "mine:Stage", "chunker": "mine:Chunker"}
    registry.add(first, "merge", targets[first])
    with pytest.raises(RegistryError, match=f"there is a {first} of that name, and a method has"):
        registry.add(second, "merge", targets[second])
    registry.router("merge", "mine:Router")  # a part of another kind may be called so


def test_an_unknown_member_of_a_stack_is_told_of_both_kinds():
    with pytest.raises(UnknownNameError, match=r"no stage 'hent'.*, and the chunkers .*'hnet'"):
        adaptok.wrap(make_vit(), stack=["hent"])
