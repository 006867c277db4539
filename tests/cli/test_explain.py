"""`adaptok explain`: order, sites, refusals and exit codes."""

import json

import pytest

from adaptok.cli.explain import read_stage
from adaptok.errors import ConfigError

MODEL = "vit_tiny_patch16_224"


def test_order_and_options(run):
    result = run("explain", MODEL, "tome:r=4,restore=update", "dc", "--keep", "0.5")
    assert result.exit_code == 0, result.output
    assert result.output.index("dc (tokens)") < result.output.index("tome (tokens)")
    assert "acts between attention and MLP of blocks 0 to 11" in result.output
    assert "restore='update'" in result.output


def test_shipped_model(run):
    result = run("explain", "dcdit-emoji32", "tome:r=4", "teacache")
    assert result.exit_code == 0, result.output
    assert "DCDiT (dcdit), stages around the blocks 0 to 6 of 7" in result.output
    assert result.output.index("teacache (time)") < result.output.index("tome (tokens)")
    result = run("explain", "dcdit-emoji32", "dc")
    assert result.exit_code == 2
    assert "adaptok.DCDiT has a chunker of its own" in " ".join(result.output.split())


def test_json(run):
    result = run("explain", MODEL, "evit", "--json")
    stages = json.loads(result.stdout)["stages"]
    assert [stage["name"] for stage in stages] == ["evit"]


def test_what_cannot_run_together_ends_with_the_reason(run):
    result = run("explain", MODEL, "teacache", "tome")
    assert result.exit_code == 2
    assert "'teacache' needs the diffusion step" in " ".join(result.output.split())
    assert "is ['tome'], without 'teacache'" in " ".join(result.output.split())


@pytest.mark.parametrize("text", ["tome:r", "tome:=3", "tome:r=[", "tome:r=8,"])
def test_options_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match="name:option=value"):
        read_stage(text)
