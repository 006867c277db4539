"""`adaptok demo` from beginning to end, on a tiny model."""

import json

import pytest
from PIL import Image

PICTURES = (
    "1_samples_by_budget.png",
    "2_keep_probability.png",
    "3_kept_by_time.png",
    "4_real_images.png",
    "5_training_loss.png",
)


@pytest.fixture(scope="module")
def demo(model_folder, tmp_path_factory):
    """One demo for all tests; its result and its folder."""
    from typer.testing import CliRunner

    from adaptok.cli import app

    folder = tmp_path_factory.mktemp("demo") / "new"
    arguments = ["--model", model_folder, "--output", folder, "--steps", 8, "--train-steps", 3]
    result = CliRunner().invoke(app, ["demo", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result, folder


def test_pictures(demo):
    _, folder = demo
    assert sorted(path.name for path in folder.iterdir()) == [*PICTURES, "summary.json"]
    for name in PICTURES:
        with Image.open(folder / name) as image:
            assert min(image.size) > 400
            assert len(set(image.convert("L").get_flattened_data())) > 20


def test_summary(demo):
    _, folder = demo
    summary = json.loads((folder / "summary.json").read_text())
    natural, some, many, guided, lite = summary["budgets"]
    assert [row["drop"] for row in (natural, some, many)] == [0, 0.3, 0.6]
    assert natural["tokens_per_step"] > some["tokens_per_step"] > many["tokens_per_step"] >= 1
    assert natural["gflops_per_step"] > some["gflops_per_step"] > many["gflops_per_step"]
    assert guided["tokens_per_step"] > lite["tokens_per_step"] > natural["tokens_per_step"]
    assert (lite["uncond_drop"], guided["uncond_drop"]) == (0.9, None)
    assert all(row["ms_per_step"] > 0 for row in summary["budgets"])
    assert set(summary["kept_by_quarter"]) == {"noisiest", "cleanest"}
    assert all(0 < value < 1 for value in summary["kept_by_quarter"].values())
    assert summary["training"]["steps"] == 3
    assert summary["cells"] == 256


def test_output(demo):
    result, _ = demo
    for name in (*PICTURES, "summary.json"):
        assert name in result.output
    for word in ("GFLOPs", "ms", "drop 0.6", "noisiest quarter", "cleanest quarter", "done in"):
        assert word in result.output


def test_fixed_patch_model_is_refused(run, fixed_folder, tmp_path):
    result = run("demo", "--model", fixed_folder, "--output", tmp_path / "demo")
    assert result.exit_code == 2
    assert "choose a DC-DiT" in result.stderr
    assert not (tmp_path / "demo").exists()
