"""`adaptok report` from beginning to end, on a tiny model."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from adaptok.cli.pictures import objective_of
from adaptok.dc.nearest import find_nearest
from adaptok.diffusion import sample
from adaptok.zoo.models import load_zoo_model


def read_page(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL)[1])


@pytest.fixture(scope="module")
def page(model_folder, tmp_path_factory):
    from typer.testing import CliRunner

    from adaptok.cli import app

    path = tmp_path_factory.mktemp("report") / "new" / "a.html"
    arguments = ["--model", model_folder, "--output", path, "--steps", 4, "--seed", 5]
    options = ["--drop", 0, "--keep", 0.1, "--label", "food", "--label", "none"]
    result = CliRunner().invoke(app, ["report", *map(str, [*arguments, *options])])
    assert result.exit_code == 0, result.output
    assert str(path) in result.output.replace("\n", "")
    return read_page(path)


def test_what_is_on_it(page):
    assert page["samples"] == ["Food & Drink", "no class"]
    assert [run["name"] for run in page["runs"]] == ["drop 0", "keep 0.1"]
    for run in page["runs"]:
        assert [step["name"].split(",")[0] for step in run["steps"]] == [
            "1 of 4", "2 of 4", "3 of 4", "4 of 4",
        ]  # fmt: skip
        assert run["ms"] > 0
        assert run["gflops"] > 0
        assert run["final"][0] != run["final"][1]
    assert page["runs"][1]["steps"][2]["tokens"] == [26, 26]
    assert page["runs"][1]["gflops"] < page["runs"][0]["gflops"]


def test_cells_are_those_of_sampling(page, model_folder):
    trained = load_zoo_model(model_folder)
    food = trained.card.class_names.index("Food & Drink")
    drawn = sample(
        trained.model, [food, 8], objective=objective_of(trained.card), scheduler="flow-euler",
        steps=4, seed=5, clip=1.0, drop=0.0, trace=True,
    )  # fmt: skip
    run, n = page["runs"][0], 256
    token = np.frombuffer(base64.b64decode(run["token"]), "<u2").reshape(4, 2, n)
    mark = np.frombuffer(base64.b64decode(run["mark"]), np.uint8).reshape(4, 2, n)
    for number, step in enumerate(drawn.steps):
        own = torch.from_numpy(mark[number] > 127)
        assert torch.equal(own, step.keep_mask)
        np.testing.assert_allclose((mark[number] & 127) / 100, step.keep_prob, atol=0.005001)
        nearest = find_nearest(own, (16, 16))
        for i in range(2):  # tokens are numbered in the order of their cells
            kept, owner = own[i].nonzero().flatten(), token[number, i].astype(np.int64)
            assert torch.equal(kept[torch.from_numpy(owner)], nearest[i])
        assert run["steps"][number]["tokens"] == step.kept.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--label", "no such class"], "is no class"),
        (["--drop", 1.5], "drop"),
        ([option for i in range(9) for option in ("--drop", i / 10)], "at most 8 budgets"),
        ([option for _ in range(9) for option in ("--label", 1)], "at most 8 samples"),
        (["--model", "no such model"], "no model"),
    ],
)
def test_wrong_options(run, model_folder, tmp_path, options, words):
    path = tmp_path / "a.html"
    model = [] if "--model" in options else ["--model", model_folder]
    result = run("report", *model, "--output", path, *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not path.exists()


def test_fixed_patch_model_is_refused(run, fixed_folder, tmp_path):
    result = run("report", "--model", fixed_folder, "--output", tmp_path / "a.html")
    assert result.exit_code == 2
    assert "choose a DC-DiT" in result.stderr


def test_a_place_that_cannot_be_written(run, model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    options = ["--steps", 1, "--drop", 0, "--label", 0, "--output", tmp_path / "file" / "a.html"]
    result = run("report", "--model", model_folder, *options)
    assert result.exit_code == 1
    assert "cannot make the folder" in result.stderr
