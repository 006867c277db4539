"""The command itself: help, version, errors, and real processes."""

import os
import re
import subprocess
import sys

import pytest
import typer

import adaptok
from adaptok.cli.terminal import SpeakingGroup, describe_seconds
from adaptok.errors import BudgetError, StorageError


def run_process(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "adaptok", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["demo", "train", "sample", "--version"]),
        (["demo"], ["--output", "--model", "--steps", "two minutes"]),
        (["sample"], ["--label", "--guidance", "--drop", "--keep", "--tokens", "--uncond-drop"]),
        (["train"], ["--output", "--scale", "--data", "--objective", "--steps", "--fresh"]),
    ],
)
def test_help(run, command, words):
    result = run(*command, "--help")
    assert result.exit_code == 0
    for word in words:
        assert word in plain(result.output)


def test_version(run):
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"adaptok {adaptok.__version__}"


def test_help_of_a_real_process():
    result = run_process("--help")
    assert result.returncode == 0
    assert "sample" in result.stdout
    assert result.stderr == ""


def test_error_of_a_real_process_is_one_sentence():
    result = run_process("sample", "--model", "no [such] model")
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: there is no model 'no [such] model'")


def test_truncated_model_in_a_real_process(model_folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.json").write_bytes((model_folder / "model.json").read_bytes())
    weights = (model_folder / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    result = run_process("sample", "--model", broken, "--output", tmp_path / "out")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "truncated" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_does_not_load_what_commands_need():
    code = (
        "import sys, adaptok.cli; "
        "print([m for m in ('matplotlib', 'diffusers', 'accelerate', 'PIL') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BudgetError("drop is wrong"), 2, "error: drop is wrong"),
        (StorageError("the disk is full"), 1, "error: the disk is full"),
        (OSError(28, "No space left on device"), 1, "error: a file cannot be read or written"),
        (KeyboardInterrupt(), 130, "error: stopped by Ctrl-C"),
    ],
)
def test_errors_become_a_sentence_and_an_exit_code(error, code, words):
    from typer.testing import CliRunner

    app = typer.Typer(cls=SpeakingGroup)

    @app.callback()
    def main():
        pass

    @app.command()
    def fail():
        raise error

    result = CliRunner().invoke(app, ["fail"])
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_bugs_are_not_hidden():
    from typer.testing import CliRunner

    app = typer.Typer(cls=SpeakingGroup)

    @app.callback()
    def main():
        pass

    @app.command()
    def fail():
        raise RuntimeError("a bug")

    assert isinstance(CliRunner().invoke(app, ["fail"]).exception, RuntimeError)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.6, "1 min"), (3_600, "1 h"), (3_725, "1 h 2 min"), (90_000, "1 d 1 h")],
)
def test_seconds_in_words(seconds, words):
    assert describe_seconds(seconds) == words
