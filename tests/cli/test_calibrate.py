"""`adaptok calibrate`."""

import inspect
import json

import pytest
import timm
import torch

import adaptok
from adaptok.cli.calibrate import calibrate as calibrate_command
from adaptok.cli.fitting import Fitting, read_wishes
from adaptok.errors import ConfigError
from adaptok.profiles import Profile

TINY = ["test_vit", "--random-weights", "--image-size", 96, "--count", 8, "--batch-size", 2]


def test_a_profile_is_written_and_can_be_applied(run, tmp_path):
    path = tmp_path / "profile.json"
    done = run("calibrate", *TINY, "--stack", "tome", "--stack", "evit",
               "--want", "tome.keep=0.3", "-o", path)  # fmt: skip
    assert done.exit_code == 0, done.output
    for word in ("tome: threshold 0.", "kept 0.3", "evit: nothing to fit", "profile.json"):
        assert word in done.stdout, word
    profile = Profile.load(path)
    assert profile.samples == 8
    assert profile.stages["tome"].figures["held_out"] == 4
    model = timm.create_model("test_vit", img_size=96).eval()
    profile.apply(adaptok.wrap(model, stack=["tome", "evit"]), grid=(6, 6))


def test_json_for_machines_and_an_adapter(run, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=96).eval()
    adaptok.save(adaptok.wrap(model, stack=["exit"]), tmp_path / "adapter")
    done = run("calibrate", *TINY, "--adapter", tmp_path / "adapter", "--json",
               "--want", "exit.compared=features", "-o", tmp_path / "profile.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["stages"]["exit"]["wanted"]["compared"] == "features"
    assert content["stages"]["exit"]["settings"] == {"threshold": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --stack or --adapter"),
        (["--stack", "tome", "--adapter", "x"], "give either --stack or --adapter"),
        (["--stack", "evit"], "there is nothing to fit for evit"),
        (["--stack", "tome", "--want", "tome"], "'tome' is no wish"),
        (["--stack", "tome", "--want", "tome.keep=7"], "keep is a share in (0, 1)"),
        (["--stack", "tome", "--want", "exit.agreement=.9"], "wanted of 'exit'"),
    ],
)
def test_wrong_options_end_in_one_sentence(run, tmp_path, options, message):
    done = run("calibrate", *TINY, *options, "-o", tmp_path / "profile.json")
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not (tmp_path / "profile.json").exists()


def test_wishes_are_read():
    assert read_wishes(["a-2.b=[1, 2]", "a-2.c=x"]) == {"a-2": {"b": [1, 2], "c": "x"}}
    for text in ("a.b", ".b=1", "a.=1", "a=1"):
        with pytest.raises(ConfigError, match="is no wish"):
            read_wishes([text])


def test_options_of_the_command_are_those_of_a_fitting():
    assert set(inspect.signature(calibrate_command).parameters) == set(Fitting.__dataclass_fields__)
