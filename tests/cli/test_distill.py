"""`adaptok distill`."""

import json

import pytest

from adaptok.cli import app
from adaptok.cli.distill import distill as distill_command
from adaptok.dc.folder import load_model

TINY = [
    "--hidden-size", 64, "--depth", 1, "--num-heads", 2, "--image-size", 16, "--objective", "flow",
    "--batch-size", 4, "--log-every", 1, "--steps", 1,
    "--category", "Food & Drink", "--category", "Travel & Places",
]  # fmt: skip


@pytest.fixture(autouse=True)
def command():
    """The command, until the app itself has it."""
    names = {info.name or info.callback.__name__ for info in app.registered_commands}
    if "distill" not in names:
        app.command()(distill_command)


@pytest.fixture
def dit_folder(run, tmp_path):
    result = run("train", "-o", tmp_path / "dit", "--model", "dit", *TINY)
    assert result.exit_code == 0, result.output
    return tmp_path / "dit" / "model"


def test_distils_fine_tunes_and_goes_on(run, tmp_path, dit_folder):
    output = tmp_path / "up"
    arguments = ["distill", dit_folder, "-o", output, "--distill-steps", 1, "--log-every", 1]
    result = run(*arguments, "--steps", 2)
    assert result.exit_code == 0, result.output
    for word in ("DCDiT, width 64", "1 steps of distillation first", "step 1/2", "step 2/2"):
        assert word in result.output
    saved = json.loads((output / "config.json").read_text())
    assert (saved["objective"], saved["categories"]) == (
        "flow",
        ["Food & Drink", "Travel & Places"],
    )
    assert (saved["budget_warmup"], saved["batch_size"]) == (1, 4)
    again = run(*arguments, "--steps", 3)
    assert again.exit_code == 0, again.output
    assert "step 3/3" in again.output
    assert "step 1/3" not in again.output
    assert load_model(output / "model").model.config.position_cells == 2


def test_refusals(run, tmp_path, model_folder, fixed_folder):
    output = tmp_path / "run"
    result = run("distill", tmp_path / "none", "-o", output)
    assert result.exit_code == 2
    assert "there is no model folder" in result.stderr
    result = run("distill", model_folder, "-o", output)
    assert result.exit_code == 2
    assert "holds a DCDiT: a DiT is needed" in result.stderr
    result = run("distill", fixed_folder, "-o", output)
    assert result.exit_code == 2
    assert "does not say how its DiT was trained" in result.stderr
    assert not output.exists()


def test_distillation_fits_into_the_run(run, tmp_path, dit_folder):
    result = run("distill", dit_folder, "-o", tmp_path / "up", "--distill-steps", 5, "--steps", 4)
    assert result.exit_code == 2
    assert "give more --steps" in result.stderr
