"""`adaptok sample`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from adaptok.cli.pictures import objective_of, read_label, record_inputs, to_pixels
from adaptok.dc.folder import ModelCard, load_model
from adaptok.diffusion import FlowObjective, HybridObjective, sample
from adaptok.errors import LabelError


def test_writes_the_images_of_the_library(run, model_folder, tmp_path):
    result = run(
        "sample", "--model", model_folder, "--label", "food", "--label", "7", "--count", 2,
        "--seed", 40, "--steps", 3, "--drop", 0.3, "--output", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "0000-food-drink-seed40.png",
        "0001-food-drink-seed41.png",
        "0002-travel-places-seed42.png",
        "0003-travel-places-seed43.png",
        "grid.png",
    ]
    trained = load_model(model_folder)
    expected = sample(
        trained.model, [7], objective=FlowObjective(), scheduler="flow-euler", steps=3, seed=42,
        drop=0.3, clip=1.0,
    )  # fmt: skip
    with Image.open(tmp_path / names[2]) as image:
        pixels = np.asarray(image).astype(int)
    assert pixels.shape == (32, 32, 3)
    ours = to_pixels(expected.latents, trained.card)[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels - ours).max() <= 1
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width > 500
    for word in ("GFLOPs a step", "ms a step", "drop 0.3", "4 images"):
        assert word in result.output


def test_more_images_than_a_row_holds(run, model_folder, tmp_path):
    result = run(
        "sample", "--model", model_folder, "-l", "none", "-n", 9, "--steps", 2, "-o", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("*-no-class-seed*.png"))) == 9


def test_guided(run, model_folder, tmp_path):
    result = run(
        "sample", "--model", model_folder, "-l", 0, "--steps", 2, "--guidance", 2, "--drop", 0,
        "--uncond-drop", 0.9, "-o", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "drop 0, guidance 2, uncond. drop 0.9" in result.output


def test_fixed_patch_model(run, fixed_folder, tmp_path):
    result = run("sample", "--model", fixed_folder, "-l", 0, "--steps", 2, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert " 64 " in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "cheese"], "the label 'cheese' is no class"),
        (["--label", "9"], "there is no class 9"),
        (["--drop", "1.5"], "drop is a fraction in [0, 1), got 1.5"),
        (["--guidance", "nan", "--steps", "2"], "error: --guidance needs a number, got nan"),
        (["--drop", "0.1", "--keep", "0.5"], "exclude each other"),
        (["--tokens", "999", "--steps", "2"], "more than the 256 cells"),
        (
            ["--uncond-drop", "0.5", "--label", "0"],
            "error: --uncond-drop has no effect without an unconditional half: set --guidance to",
        ),
        (["--uncond-drop", "1.5"], "error: --uncond-drop is a fraction in [0, 1), got 1.5"),
        (["--scheduler", "ddpm"], "this model was trained for 'flow'"),
        (["--scheduler", "euler"], "there is no scheduler 'euler'"),
        (["--device", "toaster"], "there is no device 'toaster'"),
        (["--device", "cuda:99"], "cannot be used here"),
    ],
)
def test_bad_input(run, model_folder, tmp_path, arguments, message):
    result = run("sample", "--model", model_folder, "--output", tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


class TestNoModel:
    @pytest.mark.parametrize(
        ("file", "message"),
        [
            (None, "(no model.json): give the output folder of `adaptok train`, or a shipped"),
            ("config.json", "its config.json is of another library, whose models `adaptok doctor"),
            ("checkpoints/x", "its training has not ended; the same `adaptok train` command goes"),
        ],
    )
    def test_folder(self, run, tmp_path, file, message):
        folder = tmp_path / "folder"
        folder.mkdir()
        if file is not None:
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text("{}")
        result = run("sample", "--model", folder, "--output", tmp_path / "out")
        assert result.exit_code == 2
        assert f"there is no trained model in {folder}" in result.stderr
        assert message in result.stderr
        assert not (tmp_path / "out").exists()

    def test_file(self, run, tmp_path):
        (tmp_path / "x.safetensors").write_text("")
        result = run("sample", "--model", tmp_path / "x.safetensors", "--output", tmp_path / "out")
        assert result.exit_code == 2
        assert "is a file, and a model is a folder: give the output folder" in result.stderr


def test_budget_for_a_fixed_patch_model(run, fixed_folder, tmp_path):
    result = run("sample", "--model", fixed_folder, "--keep", 0.5, "--output", tmp_path)
    assert result.exit_code == 2
    assert "keeps all its tokens" in result.stderr


def test_output_that_cannot_be_made(run, model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("sample", "--model", model_folder, "--output", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "cannot make the folder" in result.stderr


class TestLabels:
    @pytest.mark.parametrize(
        ("text", "label"),
        [("3", 3), ("Food & Drink", 2), ("smil", 5), (" SYMBOLS ", 6), ("none", 8)],
    )
    def test_found(self, model_folder, text, label):
        assert read_label(text, load_model(model_folder)) == label

    def test_a_class_called_by_a_number_is_found_by_its_name(self, model_folder):
        trained = load_model(model_folder)
        names = ("1", "10", "2", "e", "f", "g", "h", "i")
        card = trained.card.model_copy(update={"class_names": names})
        numbered = replace(trained, card=card)
        found = [read_label(text, numbered) for text in ("1", "10", "2", "3", "7")]
        assert found == [0, 1, 2, 3, 7]

    @pytest.mark.parametrize("text", ["", "-1", "8", "&", "dog", "\N{SUPERSCRIPT TWO}", "--5"])
    def test_not_found(self, model_folder, text):
        with pytest.raises(LabelError, match="the classes are 0 Activities"):
            read_label(text, load_model(model_folder))


def test_objective_of_a_card():
    run = {"config": {"flow_shift": 3.0}}
    assert objective_of(ModelCard(objective="flow", training=run)) == FlowObjective(shift=3.0)
    assert objective_of(ModelCard(objective="flow")) == FlowObjective()
    assert objective_of(ModelCard(objective="hybrid")) == HybridObjective()


def test_recorded_inputs_are_those_of_the_model(model_folder):
    model = load_model(model_folder).model
    options = {"objective": FlowObjective(), "scheduler": "flow-euler", "steps": 3, "trace": True}
    with record_inputs(model) as inputs:
        samples = sample(model, [1, 2], **options)
    assert len(inputs) == 3
    assert torch.equal(inputs[0], samples.initial)
    assert not torch.equal(inputs[1], inputs[0])
    sample(model, [1], **options)
    assert len(inputs) == 3


def test_tells_of_images_that_were_there(run, model_folder, tmp_path):
    arguments = ("sample", "-m", model_folder, "-l", "food", "--steps", 1, "-o", tmp_path)
    assert "note:" not in run(*arguments).stderr
    again = run(*arguments, "--seed", 5)
    assert again.exit_code == 0
    assert "holds 1 image already" in again.stderr
    assert len(list(tmp_path.glob("0*.png"))) == 2
