import json

import pytest
import torch
from conftest import make_model, randomise

from adaptok.config import Config
from adaptok.dc import DCDiT, DiT, DiTConfig, ModelCard, load_model, save_model
from adaptok.dc.folder import CARD_FILE, WEIGHTS_FILE, build_model
from adaptok.errors import CheckpointError, ConfigError, StorageError
from adaptok.storage import load_tensors, save_tensors

CARD = ModelCard(
    objective="flow",
    image_size=32,
    space_to_depth=2,
    class_names=("animal", "face"),
    training={"steps": 3, "loss": 0.25},
    limits="toys only",
)


def make_baseline():
    config = DiTConfig(hidden_size=32, depth=1, num_heads=2, latent_size=(4, 6), num_classes=10)
    return randomise(DiT(config)).eval()


def make_small():
    return make_model(hidden_size=32, depth=1, layout="bucketed", latent_size=(4, 6))


def call(model):
    h, w = model.config.grid
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, h, w, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([3, 500]), torch.tensor([1, 10]))


@pytest.fixture
def folder(tmp_path):
    save_model(make_small(), CARD, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("make", [make_small, make_baseline])
def test_a_model_and_its_card_come_back(tmp_path, make):
    model = make().train()
    save_model(model, CARD, tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {WEIGHTS_FILE, CARD_FILE}
    loaded = load_model(str(tmp_path / "model"))
    assert type(loaded.model) is type(model)
    assert loaded.card == CARD
    assert loaded.model.config == model.config
    assert not loaded.model.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert torch.equal(call(loaded.model), call(model.eval()))


def test_half_precision_on_disk_is_float32_again_in_memory(tmp_path):
    model = make_small()
    save_model(model, ModelCard(), tmp_path / "full")
    save_model(model, ModelCard(), tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(tmp_path / kind / WEIGHTS_FILE).stat().st_size for kind in ("full", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    on_disk = load_tensors(tmp_path / "half" / WEIGHTS_FILE)
    assert {value.dtype for value in on_disk.values()} == {torch.bfloat16}
    loaded = load_model(tmp_path / "half").model
    for name, value in model.state_dict().items():
        ours = loaded.state_dict()[name]
        assert ours.dtype == torch.float32
        # the fixed table is not read but made anew, exact
        wanted = value if name == "position" else value.to(torch.bfloat16).float()
        assert torch.equal(ours, wanted), name
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_a_model_is_replaced(folder):
    save_model(make_baseline(), ModelCard(), folder)
    assert isinstance(load_model(folder).model, DiT)


def test_a_missing_folder_or_file_is_named(folder):
    with pytest.raises(CheckpointError, match=r"there is no model folder .*none"):
        load_model(folder.parent / "none")
    with pytest.raises(CheckpointError, match="there is no model folder"):
        load_model(folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"there is no file .*{WEIGHTS_FILE}"):
        load_model(folder)
    (folder / CARD_FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read .*{CARD_FILE}"):
        load_model(folder)


def test_truncated_weights_are_refused(folder):
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE} is no complete safetensors file"):
        load_model(folder)


def test_weights_of_another_model_are_refused(folder):
    state = load_tensors(folder / WEIGHTS_FILE)
    save_tensors(folder / WEIGHTS_FILE, state | {"router.logit": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"1 unknown \(router.logit\)"):
        load_model(folder)
    save_tensors(folder / WEIGHTS_FILE, make_baseline().state_dict())
    with pytest.raises(CheckpointError, match=r"weights do not fit the model: \d+ missing"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "is of no adaptok model: got .*'extra'"),
        ({"kind": "UNet"}, "'UNet' is no kind of model: known are DCDiT, DiT"),
        ({"kind": "DiT"}, "DiTConfig is not valid: .*this option does not exist"),
        ({"kind": ["DiT"]}, r"\['DiT'\] is no kind of model: known are DCDiT, DiT"),
        ({"config": None}, f"in .*{CARD_FILE}: .*NoneType"),
        ({"config": {"depth": -1}}, "depth: .*got -1"),
        ({"card": {"version": 2}}, "ModelCard is not valid: version: .*got 2"),
        ({"card": {"objective": "gan"}}, "objective: .*got 'gan'"),
        ({"card": []}, f"in .*{CARD_FILE}: .*list"),
    ],
)
def test_a_card_of_something_else_is_refused(folder, changes, message):
    content = json.loads((folder / CARD_FILE).read_text())
    (folder / CARD_FILE).write_text(json.dumps(content | changes))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*model"):
        save_model(make_baseline(), ModelCard(), tmp_path / "file" / "model")


def test_models_are_built_from_their_configuration():
    for model in (make_small(), make_baseline()):
        assert type(build_model(model.config)) is type(model)
    assert isinstance(build_model(make_small().config), DCDiT)
    with pytest.raises(ConfigError, match="Config is the configuration of no model"):
        build_model(Config())


def test_a_card_without_its_parts_is_refused(folder):
    (folder / CARD_FILE).write_text('{"model": "bert"}')
    with pytest.raises(CheckpointError, match=r"is of no adaptok model: got \['model'\]"):
        load_model(folder)
