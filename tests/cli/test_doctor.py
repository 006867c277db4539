"""`adaptok doctor`."""

import json

import diffusers
import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner

from adaptok.cli.building import build_model
from adaptok.cli.doctor import doctor
from adaptok.cli.terminal import SpeakingGroup

VIT = "test_vit"  # timm's smallest
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "patch_size": 8,
    "image_size": 48,
}


@pytest.fixture
def run():
    app = typer.Typer(cls=SpeakingGroup)
    app.callback()(lambda: None)
    app.command()(doctor)

    def call(*arguments):
        given = ["doctor", "--repeats", "1", "--device", "cpu", *map(str, arguments)]
        return CliRunner().invoke(app, given)

    return call


@pytest.fixture
def dit_folder(tmp_path):
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, patch_size=2
    )
    model.save_config(tmp_path / "pipe" / "transformer")
    return tmp_path / "pipe"


class TestCommand:
    def test_of_a_timm_name(self, run):
        done = run(VIT)
        assert done.exit_code == 0, done.output
        assert "VisionTransformer: can be wrapped" in done.stdout
        assert "timm-vit" in done.stdout
        assert "error 0 with every cell kept" in done.stdout

    def test_as_json(self, run):
        done = run(VIT, "--json")
        assert done.exit_code == 0, done.output
        content = json.loads(done.stdout)
        assert content["backbone"] == "timm-vit"
        assert content["overhead"]["repeats"] == 1

    def test_of_a_folder_of_transformers(self, run, tmp_path):
        config = transformers.ViTConfig(**SIZES, architectures=["ViTForImageClassification"])
        config.save_pretrained(tmp_path)
        done = run(tmp_path)
        assert done.exit_code == 0, done.output
        assert "ViTForImageClassification: can be wrapped" in done.stdout
        assert "transformers-vit" in done.stdout
        assert "grid 4 x 6" in done.stdout

    def test_of_a_model_that_cannot_be_wrapped(self, run, tmp_path):
        transformers.BertConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96
        ).save_pretrained(tmp_path)
        done = run(tmp_path)
        assert done.exit_code == 1
        assert "BertModel: cannot be wrapped" in done.stdout
        assert "encoder.layer (2)" in done.stdout

    def test_of_a_model_that_chooses_its_tokens_itself(self, run, model_folder):
        done = run(model_folder, "--json")
        assert done.exit_code == 0, done.output
        content = json.loads(done.stdout)
        assert content["ok"]
        assert (content["backbone"], content["blocks"]) == ("dcdit", 1)
        assert "it has a router and a chunker of its own" in content["note"]
        reasons = {fit["name"]: fit["reason"] for fit in content["fits"]}
        assert {fit["kind"] for fit in content["fits"]} == {"stage"}
        assert reasons["tome"] == ""
        assert "between attention and MLP" in reasons["evit"]

    def test_of_a_baseline_of_adaptok(self, run, fixed_folder):
        done = run(fixed_folder)
        assert done.exit_code == 0, done.output
        assert "adaptok.dc.baseline.DiT: can be wrapped" in done.stdout
        assert "x the time" in done.stdout

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("vit_tinny_patch16_224", "'vit_tinny_patch16_224' is no model of timm and no folder"),
            ("hf_hub:timm/vit_tiny", "is no model of timm and no folder"),
        ],
    )
    def test_unknown_names(self, run, name, message):
        done = run(name)
        assert done.exit_code == 2
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1

    def test_a_name_that_is_nearly_right(self, run):
        assert "did you mean 'vit_tiny_patch16_224'?" in run("vit_tinny_patch16_224").stderr

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "has no config.json"),
            ("{", "is no JSON"),
            ("[]", "needs a JSON object"),
            ("{}", "transformers makes no model"),
            ('{"model_type": "no-such-thing"}', "transformers makes no model"),
            ('{"model_type": "vit", "hidden_size": "wide"}', "transformers makes no model"),
            ('{"_class_name": "NoSuchThing"}', "diffusers makes no model"),
            ('{"_class_name": "DDPMScheduler"}', "DDPMScheduler is no model"),
            ('{"_class_name": "DiTTransformer2DModel", "num_layers": "x"}', "makes no model"),
        ],
    )
    def test_broken_folders(self, run, tmp_path, text, message):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        done = run(tmp_path)
        assert done.exit_code == 2, done.output
        assert message in done.stderr

    def test_bad_device(self, run):
        done = run(VIT, "--device", "toaster")
        assert done.exit_code == 2
        assert "there is no device 'toaster'" in done.stderr


class TestBuilding:
    def test_of_a_pipelines_transformer(self, dit_folder):
        model = build_model(str(dit_folder))
        assert type(model) is diffusers.DiTTransformer2DModel
        assert len(model.transformer_blocks) == 2

    def test_repeats_itself_and_leaves_the_random_state(self):
        state = torch.get_rng_state()
        first, second = build_model(VIT).state_dict(), build_model(VIT).state_dict()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not build_model(VIT).training

    def test_no_code_of_others_is_run(self, tmp_path):
        content = SIZES | {"model_type": "vit", "auto_map": {"AutoModel": "evil.Evil"}}
        (tmp_path / "config.json").write_text(json.dumps(content))
        (tmp_path / "evil.py").write_text("raise SystemExit('evil')")
        assert type(build_model(str(tmp_path))) is transformers.ViTModel
        (tmp_path / "config.json").write_text(
            json.dumps(SIZES | {"model_type": "vit", "architectures": ["set_seed"]})
        )
        assert type(build_model(str(tmp_path))) is transformers.ViTModel
