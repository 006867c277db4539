"""Autoencoders by folder or name, and models of latents on the command line."""

import json
import re

import huggingface_hub
import pytest
import torch
from encoded_images import make_vae

from adaptok import DCDiT, DCDiTConfig
from adaptok.cli.autoencoders import find_autoencoder, open_autoencoder
from adaptok.dc.folder import ModelCard, save_model
from adaptok.errors import CheckpointError
from adaptok.train.vae import load_autoencoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, vae):
    """Models of latents: one whose card names the autoencoder, one whose card does not."""
    torch.manual_seed(0)
    config = DCDiTConfig(
        hidden_size=32, depth=1, num_heads=2, latent_size=(4, 5), num_classes=2, learn_sigma=False
    )
    model = DCDiT(config).eval()
    source = load_autoencoder(vae).source.model_dump(mode="json")
    folder = tmp_path_factory.mktemp("models")
    for name, training in (("named", {"config": {"latents": source}}), ("silent", {})):
        save_model(model, ModelCard(objective="flow", training=training), folder / name)
    return folder


def refuse(*_, **__):
    raise ConnectionError("no route\nto anywhere")


class TestFinding:
    @pytest.fixture(autouse=True)
    def offline(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def test_folder(self, vae):
        assert find_autoencoder(str(vae)) == str(vae)

    @pytest.mark.parametrize("name", ["nosuchvae", "models/vae/first"])
    def test_what_is_no_name_is_refused(self, name):
        with pytest.raises(CheckpointError, match=f"no folder '{name}' of an .* like OWNER/NAME"):
            find_autoencoder(name)

    def test_hub_that_does_not_answer_is_refused(self):
        words = r"none of that name was fetched before, and the hub cannot be reached \(no route\):"
        with pytest.raises(CheckpointError, match=words):
            find_autoencoder("owner/vae")

    def test_hub_that_is_forbidden_is_refused(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids to fetch it: give a"):
            find_autoencoder("owner/vae")

    def test_hub_that_answers(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
        assert find_autoencoder("owner/vae") == "owner/vae"

    def test_what_was_fetched_before_needs_no_hub_and_keeps_its_name(self, monkeypatch, vae):
        there = str(vae / "config.json")
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: there)
        assert find_autoencoder("owner/vae") == str(vae)
        found = open_autoencoder("owner/vae", CPU).source
        assert found.name == "owner/vae"
        assert found.weights_hash == load_autoencoder(vae).source.weights_hash


def read_page(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)[1])


class TestReport:
    def test_of_latents(self, run, tmp_path, folders, vae):
        words = ["report", "--steps", 2, "--keep", 0.5, "-l", 0, "--model"]
        result = run(*words, folders / "named", "-o", tmp_path / "a.html")
        assert result.exit_code == 0, result.output
        result = run(*words, folders / "silent", "-o", tmp_path / "b.html", "--vae", vae)
        assert result.exit_code == 0, result.output
        first, second = (read_page(tmp_path / name)["runs"][0] for name in ("a.html", "b.html"))
        assert first["final"] == second["final"]
        assert [step["tokens"] for step in first["steps"]] == [[10], [10]]

    def test_without_an_autoencoder_is_refused(self, run, tmp_path, folders):
        for command in ("report", "sample"):
            result = run(command, "--model", folders / "silent", "-o", tmp_path / "a.html")
            assert result.exit_code == 2
            assert (
                "works on latents of 4 channels, and its card names no autoencoder that turns "
                "them into pixels: say with --vae where it lies" in result.stderr
            )
        assert not (tmp_path / "a.html").exists()

    def test_with_a_wrong_autoencoder_is_refused(self, run, tmp_path, folders):
        other = make_vae(tmp_path / "other", channels=8)
        words = ["report", "-o", tmp_path / "a.html", "--vae", other, "--model"]
        result = run(*words, folders / "silent")
        assert result.exit_code == 2
        assert f"and the autoencoder {other} has 8: give the one that" in result.stderr
        result = run(*words, folders / "named")
        assert "is not the one that the model was trained with" in result.stderr

    def test_with_a_lost_autoencoder_says_how_to_name_it(self, run, tmp_path, folders, vae):
        moved = vae.rename(tmp_path / "moved")
        try:
            result = run("report", "--model", folders / "named", "-o", tmp_path / "a.html")
        finally:
            moved.rename(vae)
        assert result.exit_code == 2
        assert f"there is no folder {vae} of an autoencoder; say with --vae" in result.stderr

    def test_of_pixels_needs_none(self, run, tmp_path, model_folder, vae):
        result = run("report", "--model", model_folder, "-o", tmp_path / "a.html", "--vae", vae)
        assert result.exit_code == 2
        assert "draws pixels and no latents: no autoencoder is needed" in result.stderr
