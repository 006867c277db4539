import pytest

import adaptok
from adaptok.dc.host import HostChunker
from adaptok.errors import ConfigError
from adaptok.testing import make_vit
from adaptok.wrap_config import BudgetConfig, WrapConfig


def make_config():
    return WrapConfig(
        backbone="timm-vit",
        chunker=adaptok.PartConfig(name="dc", layout="fixed"),
        router=adaptok.PartConfig(name="random", seed=3),
        span=(1, 3),
        budget=BudgetConfig(keep=[0.25, 0.5]),
        stack=(adaptok.PartConfig(name="later"),),
    )


@pytest.mark.parametrize("name", ["a.json", "a.yaml", "a.yml"])
def test_a_file_gives_the_same_configuration_back(tmp_path, name):
    make_config().to_file(tmp_path / name)
    assert WrapConfig.from_file(tmp_path / name) == make_config()
    assert make_config().budget.to_budget().describe() == "keep=[0.25, 0.5]"


def test_a_wrap_knows_its_configuration():
    options = {"chunker": {"name": "dc", "buckets": 4}, "router": "norm", "span": (1, 3)}
    vit = adaptok.wrap(make_vit(), **options, budget=0.5)
    config = vit.blocks.config
    assert config.complete
    assert config.backbone == "timm-vit"
    assert config.chunker == adaptok.PartConfig(name="dc", buckets=4)
    assert config.router.name == "norm"
    assert config.dechunker.name == "dc"
    assert config.span == (1, 3)
    assert config.budget.keep == 0.5


def test_an_instance_without_a_name_makes_the_configuration_incomplete():
    class Mine(adaptok.Router):
        def forward(self, tokens, context):
            return adaptok.Routing(tokens.x.norm(dim=-1).sigmoid())

    vit = adaptok.wrap(make_vit(), chunker="dc", router=Mine(), budget=0.5)
    assert not vit.blocks.config.complete


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("chunkers: {name: dc}", "chunkers: this option does not exist"),
        ("version: 2", "up to version 1: install a newer adaptok"),
        ("[1, 2]", "mapping is needed, got a list"),
        ("a: [", "no YAML"),
        ("chunker: {layout: fixed}", "name: Field required"),
        ("span: [1]", "span"),
    ],
)
def test_what_is_no_configuration_is_refused(text, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        WrapConfig.from_yaml(text)
    with pytest.raises(ConfigError, match=r"cannot read.*none\.yaml"):
        WrapConfig.from_file(tmp_path / "none.yaml")


def test_yaml_runs_no_code():
    with pytest.raises(ConfigError, match="no YAML"):
        WrapConfig.from_yaml("backbone: !!python/object/apply:os.getcwd []")


def test_a_chunker_in_the_stack_is_complete_only_with_its_router_and_dechunker(monkeypatch):
    class Own(adaptok.Router):
        def forward(self, tokens, context):
            return adaptok.Routing(tokens.x.norm(dim=-1).sigmoid())

    def is_complete():
        return adaptok.wrap(make_vit(), stack=[HostChunker()], budget=0.5).blocks.config.complete

    assert is_complete()
    monkeypatch.setattr(HostChunker, "router", Own())
    assert not is_complete()
