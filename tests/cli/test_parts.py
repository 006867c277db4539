"""`adaptok list` and `adaptok describe`: every name with what it does."""

import json

import pytest

import adaptok


def test_every_name_of_every_kind_is_listed(run):
    result = run("list", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    found = {(row["kind"] + "s", row["name"]) for row in rows}
    for kind, names in adaptok.available().items():
        for name in names:
            assert (kind, name) in found
    assert ("models", "dcdit-emoji32") in found
    assert all(row["summary"].strip() for row in rows)
    by_name = {row["name"]: row for row in rows if row["kind"] == "stage"}
    assert by_name["tome"]["origin"] == "merge"
    assert by_name["tome"]["summary"] == "Merges similar tokens at every block."


def test_one_kind_as_a_table(run):
    result = run("list", "stages")
    assert result.exit_code == 0
    assert "teacache" in result.stdout
    assert "dcdit-emoji32" not in result.stdout
    assert "covering" not in result.stdout
    models = run("list", "models").stdout
    assert "dcdit-emoji32" in models
    assert "teacache" not in models


def test_a_description_has_options_and_what_is_declared(run):
    result = run("describe", "tome")
    assert result.exit_code == 0
    assert "r = None" in result.stdout
    assert "needs_keys=True" in result.stdout
    (entry,) = json.loads(run("describe", "tome", "--json").stdout)["entries"]
    assert {"name": "restore", "default": "'copy'"} in entry["options"]
    assert entry["effects"]["axis"] == "tokens"
    kinds = [
        entry["kind"] for entry in json.loads(run("describe", "dc", "--json").stdout)["entries"]
    ]
    assert kinds == ["router", "chunker", "dechunker"]


@pytest.mark.parametrize(
    ("command", "words"),
    [(("list", "nonsense"), "kinds are routers"), (("describe", "tomme"), "no stage 'tomme'")],
)
def test_wrong_names_end_in_a_sentence(run, command, words):
    result = run(*command)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_the_shell_completes_names():
    from adaptok.cli.parts import complete_kind, complete_name

    assert complete_kind("st") == ["stages"]
    assert complete_name("te") == ["teacache"]
    assert "dcdit-emoji32" in complete_name("dc")


def test_commands_come_in_groups(run):
    text = run("--help").stdout
    places = [text.index(word) for word in ("Look", "Choose a method", "Measure and set", "Train")]
    assert places == sorted(places)
    assert "--install-completion" in text


def test_a_shipped_model_is_described(run):
    text = run("describe", "dcdit-emoji32").stdout
    assert "7.3 M parameters" in text
    assert "Food & Drink" in text
    found = json.loads(run("describe", "dcdit-emoji32", "--json").stdout)
    assert found["config"]["depth"] == 7
