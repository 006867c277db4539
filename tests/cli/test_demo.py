"""`adaptok demo` from beginning to end, on a tiny model."""

import json
import re

import pytest
from chromium import start_browser
from PIL import Image

from adaptok import DCDiT, DCDiTConfig
from adaptok.cli.exhibits import REAL_IMAGES
from adaptok.dc.folder import ModelCard, save_model

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
    found = sorted(path.name for path in folder.iterdir())
    assert found == [*PICTURES, "report.html", "summary.json"]
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


def test_report(demo):
    _, folder = demo
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    assert [run["name"] for run in page["runs"]] == ["drop 0", "drop 0.3", "drop 0.6"]
    assert [len(run["steps"]) for run in page["runs"]] == [8] * 3
    assert page["samples"] == list(REAL_IMAGES)
    summary = json.loads((folder / "summary.json").read_text())
    for run, row in zip(page["runs"], summary["budgets"], strict=False):
        assert run["tokens"] == pytest.approx(row["tokens_per_step"], abs=1e-3)
        assert (run["gflops"], run["ms"]) == (row["gflops_per_step"], row["ms_per_step"])
    assert len({run["given"][0]["picture"] for run in page["runs"]}) == 3
    assert len(text) < 3_000_000


def test_report_opens_and_its_slider_changes_the_map(demo, tmp_path):
    _, folder = demo
    with start_browser(tmp_path) as browser:
        browser.open(folder / "report.html")
        read = "return document.querySelectorAll('canvas')[1].toDataURL()"
        before = browser.run(read)
        browser.find("#step").click()
        browser.press("\ue011")  # home
        assert browser.find("#step-name").text == "1 of 8, noise 100%"
        assert browser.run(read) != before
        assert browser.errors() == []


def test_output(demo):
    result, _ = demo
    for name in (*PICTURES, "report.html", "summary.json"):
        assert name in result.output
    for word in ("GFLOPs", "ms", "drop 0.6", "noisiest quarter", "cleanest quarter", "done in"):
        assert word in result.output


def test_model_of_latents_is_refused(run, tmp_path):
    config = DCDiTConfig(hidden_size=32, depth=1, num_heads=2, latent_size=4, num_classes=2)
    save_model(DCDiT(config).eval(), ModelCard(), tmp_path / "model")
    result = run("demo", "--model", tmp_path / "model", "--output", tmp_path / "demo")
    assert result.exit_code == 2
    assert "works on latents: `adaptok report` and `adaptok sample` take it" in result.stderr
    assert not (tmp_path / "demo").exists()


def test_fixed_patch_model_is_refused(run, fixed_folder, tmp_path):
    result = run("demo", "--model", fixed_folder, "--output", tmp_path / "demo")
    assert result.exit_code == 2
    assert "choose a DC-DiT" in result.stderr
    assert not (tmp_path / "demo").exists()
