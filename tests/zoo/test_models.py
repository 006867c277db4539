"""Loading shipped models and folders."""

import pytest
import torch

from adaptok import DCDiT, DCDiTConfig
from adaptok.dc.folder import ModelCard, save_model
from adaptok.errors import CheckpointError
from adaptok.zoo.models import list_zoo_models, load_zoo_model


@pytest.fixture
def zoo(tmp_path):
    torch.manual_seed(0)
    for seed, name in enumerate(("second", "first")):
        model = DCDiT(DCDiTConfig(hidden_size=32, depth=1, num_heads=1, latent_size=4))
        save_model(model, ModelCard(limits=f"number {seed}"), tmp_path / "zoo" / name)
    (tmp_path / "zoo" / "no-model").mkdir()
    return tmp_path / "zoo"


def test_names_in_order(zoo):
    assert list_zoo_models(zoo) == ("first", "second")


def test_by_name_and_by_folder(zoo):
    by_name = load_zoo_model("second", zoo)
    by_folder = load_zoo_model(zoo / "second")
    assert by_name.card.limits == by_folder.card.limits == "number 0"
    for name, value in by_name.model.state_dict().items():
        assert torch.equal(value, by_folder.model.state_dict()[name])
    assert not by_name.model.training


def test_output_folder_of_training(zoo, tmp_path):
    (zoo / "first").rename(tmp_path / "model")
    assert load_zoo_model(tmp_path).card.limits == "number 1"


def test_shipped_models_load():
    for name in list_zoo_models():
        trained = load_zoo_model(name)
        assert trained.card.class_names
        assert trained.card.training
        assert trained.card.limits


def test_unknown_name(zoo):
    with pytest.raises(CheckpointError, match="no model 'third': shipped are first, second"):
        load_zoo_model("third", zoo)


def test_folder_of_something_else(zoo):
    with pytest.raises(CheckpointError, match=r"model\.json"):
        load_zoo_model(zoo / "no-model")
