import pytest
from torch import nn

import adaptok
from adaptok.dc.host import HostChunker, HostRouter
from adaptok.errors import ConfigError, UnknownNameError
from adaptok.parts import HostFacts, build_part, describe_instance, options_of

FACTS = HostFacts(width=64, depth=3, grid_axes=2)


def test_width_comes_from_the_host_unless_it_is_given():
    router, config = build_part("router", "dc", FACTS)
    assert router.project.in_channels == 64
    assert config == adaptok.PartConfig(name="dc")
    router, config = build_part("router", {"name": "dc", "width": 32}, FACTS)
    assert router.project.in_channels == 32


def test_all_forms_make_the_same_part():
    class Typed(adaptok.config.Config):
        name: str = "dc"
        buckets: int = 3

    for spec in (
        {"name": "dc", "buckets": 3},
        adaptok.PartConfig(name="dc", buckets=3),
        Typed(),
        HostChunker(buckets=3),
    ):
        part, config = build_part("chunker", spec, FACTS)
        assert part.buckets == 3
        assert config == adaptok.PartConfig(name="dc", buckets=3)


def test_options_are_those_of_the_constructor_without_what_the_host_fills():
    fields = options_of(HostRouter).model_fields
    assert set(fields) == {"prior", "bias"}
    assert fields["bias"].default == 4.0


def test_an_instance_is_described_only_if_it_can_be_made_again():
    assert describe_instance("chunker", HostChunker()) == adaptok.PartConfig(name="dc")

    class Unnamed(HostChunker):
        pass

    assert describe_instance("chunker", Unnamed()) is None


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ({"name": "dc", "bukets": 3}, ConfigError, "bukets: this option does not exist"),
        ({"name": "dc", "layout": "dense"}, ConfigError, "layout: .*'packed'"),
        ({"name": "dc", "buckets": 0}, ConfigError, "buckets is at least 1"),
        ({"buckets": 3}, ConfigError, "needs a name"),
        ("nope", UnknownNameError, "no chunker 'nope'"),
        (nn.Linear(1, 1), ConfigError, "a chunker is a name"),
        (HostChunker, ConfigError, "a class: make an instance"),
    ],
)
def test_what_is_no_part_is_refused(spec, error, match):
    with pytest.raises(error, match=match):
        build_part("chunker", spec, FACTS)
