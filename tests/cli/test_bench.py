"""`adaptok bench`."""

import json

import diffusers
import pytest
import torch
import transformers

from adaptok.cli.benching import enlarge_inputs, read_budget_option
from adaptok.errors import BudgetError, ConfigError
from adaptok.hosts import HostInputs
from adaptok.measure import BenchmarkReport

VIT = "test_vit"  # timm's smallest: patches of 16 pixels


@pytest.fixture
def bench(run):
    def call(*arguments):
        return run("bench", "--repeats", 1, "--device", "cpu", "--batch", 2, *arguments)

    return call


class TestCommand:
    def test_table_json_and_plot(self, bench, tmp_path):
        done = bench(
            VIT, "--size", 64, "--budget", 0.5, "--budget", "tokens=3",
            "--json", tmp_path / "report.json", "--plot", tmp_path / "report.png",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        for word in ("keep=0.5", "tokens=3", "16 cells", "eager", "of the FLOPs", "report.png"):
            assert word in done.stdout, word
        report = BenchmarkReport.load(tmp_path / "report.json")
        assert [row.computed.mean for row in report.rows] == [8, 3]
        assert (report.batch, report.repeats) == (2, 1)
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")

    def test_json_for_machines(self, bench):
        threads = torch.get_num_threads()
        done = bench(
            VIT, "--size", 48, "--json", "-", "--router", "norm", "--dtype", "bfloat16",
            "--threads", 2, "--budget", 1,
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        content = json.loads(done.stdout)
        assert content["precision"] == "bfloat16"
        assert "Norm" in content["method"]
        assert content["machine"]["threads"] == 2
        assert torch.get_num_threads() == threads

    def test_size_of_the_model_by_default(self, bench):
        done = bench(VIT, "--budget", 0.1, "--json", "-")
        assert json.loads(done.stdout)["inputs"] == ["0: float32 (2, 3, 160, 160)"]

    def test_of_a_dcdit(self, bench, model_folder):
        done = bench(model_folder, "--size", 8, "--budget", "drop=0.2", "--budget", 0.25)
        assert done.exit_code == 0, done.output
        assert "keep=1 (no baseline was given)" in done.stdout
        assert "keep=0.25" in done.stdout
        assert "64 cells" in done.stdout

    def test_of_a_folder_of_diffusers(self, bench, tmp_path):
        diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, patch_size=2
        ).save_config(tmp_path)
        done = bench(tmp_path, "--budget", 0.5, "--json", "-")
        assert done.exit_code == 0, done.output
        content = json.loads(done.stdout)
        assert content["cells"] == 16
        assert content["rows"][0]["computed"]["mean"] == 8

    def test_of_a_folder_of_transformers(self, bench, tmp_path):
        transformers.ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
            patch_size=8, image_size=48, architectures=["ViTModel"],
        ).save_pretrained(tmp_path)  # fmt: skip
        done = bench(tmp_path, "--budget", 0.5, "--json", "-")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["cells"] == 36


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["vit_tinny_patch16_224"], "did you mean 'vit_tiny_patch16_224'?"),
            ([VIT, "--budget", "half"], "'half' is no budget"),
            ([VIT, "--budget", "1.5"], "keep is a fraction in (0, 1], got 1.5"),
            ([VIT, "--budget", "0.5", "--budget", "keep=0.5"], "keep=0.5 came twice"),
            ([VIT, "--dtype", "int8"], "--dtype is one of float32"),
            ([VIT, "--device", "toaster"], "there is no device 'toaster'"),
            ([VIT, "--router", "nome"], "nome"),
            ([VIT, "--size", "64", "--router", "norm", "--budget", "natural"], "only ranks cells"),
            ([VIT, "--size", "50"], "does not run with --size 50: Input height (50) should be"),
            ([VIT, "--size", "8"], "does not run with --size 8: "),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_one_sentence(self, bench, arguments, message):
        done = bench(*arguments)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_missing_package_is_one_sentence(self, bench, monkeypatch):
        def fail(*args, **kwargs):
            raise ModuleNotFoundError("No module named 'flash'")

        monkeypatch.setattr("adaptok.cli.benching.benchmark", fail)
        done = bench(VIT, "--size", 64)
        assert done.exit_code == 2
        assert "needs a package that is missing here: No module named 'flash'" in done.stderr

    def test_a_fault_of_our_own_is_not_hidden(self, bench, monkeypatch):
        def fail(*args, **kwargs):
            raise KeyError("a fault")

        monkeypatch.setattr("adaptok.cli.benching.benchmark", fail)
        assert isinstance(bench(VIT, "--size", 64).exception, KeyError)

    def test_router_of_a_dcdit(self, bench, model_folder):
        done = bench(model_folder, "--router", "norm")
        assert done.exit_code == 2
        assert "has its own chunker and router" in done.stderr

    def test_a_fixed_patch_dit(self, bench, fixed_folder):
        done = bench(fixed_folder)
        assert done.exit_code == 2
        assert "has no tokens to save" in done.stderr


class TestBudgets:
    @pytest.mark.parametrize(
        ("text", "budget"),
        [
            ("0.5", 0.5),
            ("keep=0.25", 0.25),
            ("tokens=98", {"tokens": 98}),
            (" drop = 0.3 ", {"drop": 0.3}),
            ("drop=0,uncond_drop=0.9", {"drop": 0.0, "uncond_drop": 0.9}),
            ("natural", {}),
        ],
    )
    def test_words(self, text, budget):
        assert read_budget_option(text) == budget

    @pytest.mark.parametrize("text", ["", "many", "keep=", "=3", "speed=3", "drop=1,drop=2"])
    def test_other_words(self, text):
        with pytest.raises(BudgetError, match="is no budget: give"):
            read_budget_option(text)


class TestInputs:
    def test_samples_take_turns(self):
        example = HostInputs(
            (torch.zeros(2, 4, 6, 8),), {"t": torch.tensor([1, 2]), "name": "a", "text": [7, 8]}
        )
        inputs = enlarge_inputs(example, 5, 12)
        image = inputs.args[0]
        assert image.shape == (5, 4, 12, 12)
        assert not torch.equal(image[0], image[2])
        assert inputs.kwargs["t"].tolist() == [1, 2, 1, 2, 1]
        assert inputs.kwargs["text"] == [7, 8, 7, 8, 7]
        assert inputs.kwargs["name"] == "a"
        assert enlarge_inputs(example, 1, None).args[0].shape == (1, 4, 6, 8)

    def test_without_an_image(self):
        example = HostInputs((torch.zeros(2, 24, 16),))
        assert enlarge_inputs(example, 3, 32, given=False).args[0].shape == (3, 24, 16)
        with pytest.raises(ConfigError, match="leave --size out"):
            enlarge_inputs(example, 3, 32)
