import pytest
import torch
from conftest import make_model

from adaptok.dc import DCDiT
from adaptok.dc.checkpoint import (
    check_state,
    from_reference,
    rename_from_reference,
    rename_to_reference,
    to_reference,
)
from adaptok.errors import CheckpointError

NAMES = {
    "embed.weight": "x_embedder.proj.weight",
    "timestep_embedder.mlp.2.bias": "t_embedder.mlp.2.bias",
    "label_embedder.table.weight": "y_embedder.embedding_table.weight",
    "position": "pos_embed",
    "encoder.blocks.1.skip.weight": "hnet.encoder.layers.1.skip_proj.weight",
    "encoder.blocks.0.condition.1.weight": "hnet.encoder.layers.0.cond_proj.1.weight",
    "router.score.3.bias": "hnet.routing_module.residual_scorer.3.bias",
    "backbone.blocks.11.modulation.1.weight": (
        "hnet.main_network.main_network.layers.11.adaLN_modulation.1.weight"
    ),
    "backbone.norm.weight": "hnet.main_network.main_network.rmsnorm.weight",
    "dechunker.residual.bias": "hnet.residual_proj.bias",
    "decoder.norm.weight": "hnet.decoder.rmsnorm.weight",
    "final_layer.modulation.1.bias": "final_layer.adaLN_modulation.1.bias",
}


@pytest.fixture
def published(tiny_model):
    return {name: value.clone() for name, value in tiny_model.reference_state_dict().items()}


@pytest.mark.parametrize(("ours", "theirs"), NAMES.items())
def test_names_both_ways(ours, theirs):
    assert rename_to_reference(ours) == theirs
    assert rename_from_reference(theirs) == ours


def test_names_of_the_golden_file_are_known_both_ways(golden):
    names = [name.removeprefix("weights.") for name in golden if name.startswith("weights.")]
    assert len(names) > 80
    for name in names:
        ours = rename_from_reference(name)
        assert "hnet" not in ours
        assert rename_to_reference(ours) == name


def test_every_name_of_a_model_goes_there_and_back(tiny_model):
    state = tiny_model.state_dict()
    theirs = to_reference(state)
    assert len(theirs) == len(state)
    assert [rename_from_reference(name) for name in theirs] == list(state)


def test_published_weights_make_the_same_model(tiny_model, published):
    other = DCDiT(tiny_model.config).eval()
    x, t, y = torch.randn(2, 4, 12, 18), torch.tensor([5, 800]), torch.tensor([1, 10])
    assert not torch.allclose(other(x, t, y), tiny_model(x, t, y), atol=1e-2)
    other.load_reference_state_dict(published)
    assert torch.equal(other(x, t, y), tiny_model(x, t, y))


def test_missing_and_unknown_names_are_named(tiny_model, published):
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    del published["hnet.residual_proj.bias"], published["pos_embed"]
    published["optimizer.step"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        tiny_model.load_reference_state_dict({name: value + 1 for name, value in published.items()})
    message = str(caught.value)
    assert "2 missing (dechunker.residual.bias, position)" in message
    assert "1 unknown (optimizer.step)" in message
    assert "configuration that they were trained with" in message
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_of_another_size_are_refused_with_the_shapes(tiny_model):
    wider = make_model(hidden_size=96).reference_state_dict()
    shapes = r"has the shape \(.*96.*\) instead of \(.*160.*\).* and \d+ more"
    with pytest.raises(CheckpointError, match=shapes):
        tiny_model.load_reference_state_dict(wider)
    deeper = make_model(depth=3).reference_state_dict()
    with pytest.raises(CheckpointError, match=r"unknown \(backbone.blocks.2."):
        tiny_model.load_reference_state_dict(deeper)


def test_a_position_table_of_another_grid_is_refused(tiny_model, published):
    turned = make_model(latent_size=(18, 12)).reference_state_dict()
    assert turned["pos_embed"].shape == published["pos_embed"].shape
    with pytest.raises(CheckpointError, match="pos_embed is not the fixed sine-cosine table"):
        from_reference(turned, tiny_model)
    half = published | {"pos_embed": published["pos_embed"].to(torch.bfloat16)}
    assert from_reference(half, tiny_model)["position"].dtype == torch.bfloat16
    published["pos_embed"][0, 7, 3] += 0.05
    with pytest.raises(CheckpointError, match="weights are of another model"):
        from_reference(published, tiny_model)


def test_problems_are_counted_and_only_the_first_are_told():
    needed = {name: torch.zeros(2) for name in "abcdefgh"}
    check_state(needed, needed)
    came = {name: torch.zeros(3) for name in "abcdef"} | {"x": torch.zeros(1)}
    with pytest.raises(CheckpointError) as caught:
        check_state(came, needed)
    message = str(caught.value)
    assert "2 missing (g, h); 1 unknown (x); a has the shape (3,) instead of (2,)" in message
    assert "b has the shape" in message
    assert "c has the shape" not in message
    assert "and 4 more" in message
