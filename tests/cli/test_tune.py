"""`adaptok tune`."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

import adaptok
from adaptok.adapters import load
from adaptok.cli import app
from adaptok.cli.tune import tune as tune_command
from adaptok.cli.tuning import Tuning

TINY = ["test_vit", "--random-weights", "--steps", 2, "--batch-size", 2, "--image-size", 32]


@pytest.fixture(autouse=True)
def command():
    """The command, until the app itself has it."""
    names = {info.name or info.callback.__name__ for info in app.registered_commands}
    if "tune" not in names:
        app.command()(tune_command)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(8):
        pixels = random.integers(0, 255, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_tunes_and_saves_an_adapter(run, tmp_path, pictures):
    output = tmp_path / "adapter"
    result = run("tune", *TINY, "--images", pictures, "-o", output, "--keep", 0.3)
    assert result.exit_code == 0, result.output
    for word in ("learns from 6 images", "2 are held out", "step 2/2", "keep 0.3", "before",
                 "after", "adaptok.load"):  # fmt: skip
        assert word in result.output, word
    import timm

    torch.manual_seed(3)
    model = timm.create_model("test_vit", pretrained=False, img_size=32).eval()
    load(model, output)
    assert adaptok.is_wrapped(model)
    stage = model.blocks.stages[0]
    assert bool(stage.router.logit.weight.abs().sum() > 0)  # it starts at zero: learned
    again = run("tune", *TINY, "--images", pictures, "-o", output)
    assert again.exit_code == 0, again.output  # an adapter is replaced


def test_emoji_are_the_default(run, tmp_path):
    result = run("tune", *TINY, "-o", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    assert "images of emoji" in result.output


def test_a_folder_of_transformers(run, tmp_path, pictures):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    output = tmp_path / "adapter"
    result = run(
        "tune", tmp_path / "vit", "--images", pictures, "-o", output, "--steps", 1,
        "--batch-size", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert output.is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no_such_model"], "neither a folder nor a timm model"),
        (["test_vit", "--random-weights", "--router", "nothing"], "nothing"),
        (["test_vit", "--random-weights", "--images", "nowhere"], "not found"),
        (["test_vit", "--random-weights", "--keep", 1.5], "fractions of the cells"),
    ],
)
def test_wrong_options_end_in_one_sentence(run, tmp_path, options, message):
    result = run("tune", *options, "--steps", 1, "--batch-size", 2, "-o", tmp_path / "adapter")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "adapter").exists()


def test_a_folder_with_other_files_is_refused(run, tmp_path, pictures):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "letter.txt").write_text("dear")
    result = run("tune", *TINY, "--images", pictures, "-o", tmp_path / "own")
    assert result.exit_code == 1, result.output
    assert (tmp_path / "own" / "letter.txt").exists()
    result = run("tune", *TINY, "--images", pictures, "-o", tmp_path / "own" / "letter.txt")
    assert result.exit_code == 1, result.output
    assert "a file of that name is there" in result.stderr
    assert "learns from" not in result.output


def test_too_few_images(run, tmp_path, pictures):
    result = run("tune", "test_vit", "--random-weights", "--images", pictures, "--batch-size", 5,
                 "-o", tmp_path / "adapter")  # fmt: skip
    assert result.exit_code == 2
    assert "at least 10 are needed" in result.stderr


def test_options_of_the_command_are_those_of_a_tuning():
    assert set(inspect.signature(tune_command).parameters) == set(Tuning.__dataclass_fields__)
