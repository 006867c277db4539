"""`adaptok train`."""

import inspect
import json
import re

import pytest
import typer

from adaptok.cli.train import train as train_command
from adaptok.cli.training import MODEL_OPTIONS, describe_changes, read_config
from adaptok.dc import DCDiTConfig, DiTConfig
from adaptok.errors import ConfigError
from adaptok.train.config import TrainConfig
from adaptok.train.paper import list_paper_runs, make_paper_run

TINY = [
    "--hidden-size", 32, "--depth", 1, "--num-heads", 1, "--image-size", 16, "--objective", "flow",
    "--batch-size", 4, "--log-every", 1,
]  # fmt: skip


def test_trains_goes_on_and_can_be_sampled(run, tmp_path):
    output = tmp_path / "run"
    result = run("train", "-o", output, *TINY, "--steps", 2)
    assert result.exit_code == 0, result.output
    for word in ("DCDiT, width 32, 1 blocks, on 8 x 8 cells of 12 channels", "step 1/2", "loss",
                 "kept", "steps/s", "left", "done: 2 steps", "adaptok sample --model"):  # fmt: skip
        assert word in result.output
    again = run("train", "-o", output, *TINY, "--steps", 3)
    assert again.exit_code == 0, again.output
    assert "step 3/3" in again.output
    assert "step 1/3" not in again.output
    drawn = run("sample", "-m", output, "-l", 0, "--steps", 2, "-o", tmp_path / "samples")
    assert drawn.exit_code == 0, drawn.output


def test_config_file_of_another_run(run, tmp_path):
    assert run("train", "-o", tmp_path / "a", *TINY, "--steps", 2).exit_code == 0
    file = tmp_path / "a" / "config.json"
    result = run("train", "-o", tmp_path / "b", "--config", file, "--steps", 1, "--lr", 0.01)
    assert result.exit_code == 0, result.output
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    differing = {name for name in first if first[name] != second[name]}
    assert differing == {"steps", "learning_rate"}


def test_fresh_refuses_a_used_folder(run, tmp_path):
    assert run("train", "-o", tmp_path, *TINY, "--steps", 1).exit_code == 0
    result = run("train", "-o", tmp_path, *TINY, "--steps", 2, "--fresh")
    assert result.exit_code == 2
    assert "already holds a run" in result.stderr


def test_interrupted(run, tmp_path, monkeypatch):
    from adaptok.cli import training
    from adaptok.train.progress import TrainSummary

    summary = TrainSummary(
        step=7, steps=9, loss=0.5, seconds=1.0, images_seen=28, output=tmp_path,
        checkpoint=tmp_path / "checkpoints" / "step-7", model_folder=tmp_path / "model",
        interrupted=True,
    )  # fmt: skip
    monkeypatch.setattr(training, "train", lambda *_, **__: summary)
    result = run("train", "-o", tmp_path, *TINY)
    assert result.exit_code == 130
    assert "stopped after step 7 of 9, loss 0.5000: run the same command again" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "data 'nowhere' is not found"),
        (["--hidden-size", "100"], "error: --hidden-size=100 is no multiple of --num-heads=6"),
        (["--scale", "S", "--depth", "3"], "leave one of them out"),
        (["--model", "dit", "--target", "4"], "error: --target=4.0 is for a model that chooses"),
        (["--config", "no.json"], "cannot read the configuration no.json"),
        (["--config", "S-256"], "there is no such file, and the published runs are paper/S-256,"),
        (["--config", "paper/S-128"], "no published run 'paper/S-128': there are paper/S-256,"),
        (["--config", "paper/S-256"], "'latents/imagenet-256' is no folder of latents: make one"),
        (["--config", "paper/S-256", "--data", "emoji"], "'emoji' is no folder of latents"),
        (["--image-size", "17"], "--image-size=17 is no multiple of --space-to-depth=2"),
        (["--lr", "nan"], "error: --learning-rate: Input should be"),
        (["--ema", "1"], "error: --ema: Input should be less than 1"),
        (["--drop", "1"], "error: --drop: Input should be less than 1"),
        (["--flow-shift", "2"], '--flow-times and --flow-shift need --objective="flow"'),
        (["--accumulation", "3"], "--batch-size=256 is no multiple of --accumulation=3"),
        (["--category", "Cheese"], "no category Cheese"),
    ],
)
def test_bad_input(run, tmp_path, arguments, message):
    result = run("train", "-o", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


class TestReadConfig:
    def test_defaults_are_those_of_the_library(self):
        assert read_config(None, {}).model_dump(exclude={"model"}) == TrainConfig().model_dump(
            exclude={"model"}
        )
        assert read_config(None, {}).model == DCDiTConfig(scale="S")

    def test_sizes_replace_the_scale_of_a_file(self, tmp_path):
        file = tmp_path / "config.json"
        TrainConfig(model=DCDiTConfig(scale="B", target=3.0)).to_json_file(file)
        model = read_config(file, {"depth": 5}).model
        assert (model.scale, model.depth, model.hidden_size, model.target) == (None, 5, 768, 3.0)

    def test_scale_replaces_the_sizes_of_a_file(self, tmp_path):
        file = tmp_path / "config.json"
        TrainConfig(model=DCDiTConfig(hidden_size=64, depth=3, num_heads=2)).to_json_file(file)
        assert read_config(file, {"scale": "B"}).model == DCDiTConfig(scale="B")

    @pytest.mark.parametrize(
        "sizes", [{"scale": "B"}, {"hidden_size": 64, "depth": 2, "num_heads": 2}]
    )
    def test_the_baseline_of_a_run_has_its_sizes(self, tmp_path, sizes):
        file = tmp_path / "config.json"
        TrainConfig(model=DCDiTConfig(**sizes, target=3.0, latent_size=24)).to_json_file(file)
        model = read_config(file, {"kind": "dit", "patch_size": 4}).model
        assert model == DiTConfig(**sizes, latent_size=24, patch_size=4)
        wide = read_config(file, {"kind": "dit", "patch_size": 4, "scale": "L"}).model
        assert (wide.depth, wide.latent_size) == (24, 24)

    @pytest.mark.parametrize(("pixels", "cell", "patch"), [(9, 1, 3), (50, 2, 5), (20, 1, 5)])
    def test_a_patch_divides_the_images_that_are_there(self, pixels, cell, patch):
        asked = {"kind": "dit", "patch_size": patch, "image_size": pixels, "space_to_depth": cell}
        assert read_config(None, asked).model.grid == (pixels // cell,) * 2
        with pytest.raises(ConfigError, match="does not divide"):
            read_config(None, asked | {"patch_size": patch + 1})

    @pytest.mark.parametrize(
        ("kind", "option", "message"),
        [
            ("dit", {"drops": (0.0, 0.3)}, r"drops=\(0.0, 0.3\) is for a model that chooses"),
            ("dit", {"target": 3.0}, "target=3.0 is for a model that chooses its tokens"),
            ("dc", {"patch_size": 2}, "patch_size=2 is for fixed patches"),
        ],
    )
    def test_options_of_the_other_model_are_refused(self, kind, option, message):
        with pytest.raises(ConfigError, match=message):
            read_config(None, {"kind": kind} | option)

    def test_ratio_group(self):
        assert read_config(None, {"ratio_group": 8}).ratio_group == 8

    def test_unknown_option(self):
        with pytest.raises(ConfigError, match="does not exist"):
            read_config(None, {"stepz": 3})


class TestPaperRuns:
    @pytest.mark.parametrize("name", list_paper_runs())
    def test_a_name_is_the_published_run(self, name):
        assert read_config(name, {}) == make_paper_run(name)
        again = read_config(name, {"batch_size": 128, "data": "latents/mine"})
        assert (again.batch_size, again.data) == (128, "latents/mine")
        assert again.model == make_paper_run(name).model

    def test_changes_are_said(self):
        name = "paper/B-256"
        config = read_config(name, {"learning_rate": 2e-4, "workers": 3, "seed": 1, "data": "x"})
        (line,) = describe_changes(config, name)
        assert line == f"not the published setting of {name}: learning_rate 0.0002 for 0.0001"
        assert describe_changes(make_paper_run(name), name) == []
        assert describe_changes(config, None) == describe_changes(config, "a.json") == []
        (line,) = describe_changes(read_config(name, {"depth": 2}), name)
        assert "model.depth 2 for 12" in line

    def test_help_lists_all(self):
        (text,) = (text for name, text in command_options() if name == "config")
        assert re.findall(r"paper/[\w-]+\d", text) == [
            name for kind in (False, True) for name in list_paper_runs() if ("DiT" in name) is kind
        ]


def command_options():
    for name, parameter in inspect.signature(train_command).parameters.items():
        (info,) = (part for part in parameter.annotation.__metadata__)
        assert isinstance(info, typer.models.OptionInfo)
        yield name, info.help


def test_every_option_exists_in_the_library():
    known = {*TrainConfig.model_fields, *MODEL_OPTIONS, "kind", "output", "config", "fresh"}
    assert {name for name, _ in command_options()} <= known


def test_every_option_of_a_run_is_on_the_command_line():
    elsewhere = {"model", "host", "distill_steps", "latents", "version"}  # `distill`, or the data
    assert TrainConfig.model_fields.keys() - elsewhere <= {name for name, _ in command_options()}


def test_help_tells_the_true_defaults():
    defaults = {
        **{name: field.default for name, field in DiTConfig.model_fields.items()},
        **{name: field.default for name, field in DCDiTConfig.model_fields.items()},
        **{name: field.default for name, field in TrainConfig.model_fields.items()},
        "scale": "S",
    }
    words = {True: "all", False: "off", None: "all"}
    checked = 0
    for name, text in command_options():
        _, found, told = text.partition(" Default: ")
        if not found or name in ("kind", "drops"):
            continue
        default = defaults[name]
        if isinstance(default, bool) or default is None:
            assert told == f"{words[default]}.", name
        elif isinstance(default, int | float):
            assert float(told[:-1].replace(",", "")) == default, name
        else:
            assert told == f"{default}.", name
        checked += 1
    assert checked > 25
