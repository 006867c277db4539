"""Errors of the library in the words of the command line."""

import pytest

from adaptok.cli.wording import speak_options

OPTIONS = {
    "guidance": "--guidance",
    "uncond_drop": "--uncond-drop",
    "class_dropout": "--class-dropout",
    "ema_decay": "--ema",
    "depth": "--depth",
    "drops": "--drop",
    "keep": "--keep",
    "steps": "--steps",
}


@pytest.mark.parametrize(
    ("said", "spoken"),
    [
        ("set guidance_scale to 1", "set --guidance to 1"),
        ("num_inference_steps=0 is none", "--steps=0 is none"),
        ("RunConfig is not valid: drops.0: no; keep: no", "--drop: no; --keep: no"),
        ("model.depth=3 was saved", "--depth=3 was saved"),
        ("set class_dropout=0 (--class-dropout 0) for", "set --class-dropout 0 for"),
        ("budgets (keep=, steps=2)", "budgets (keep=, --steps=2)"),
    ],
)
def test_names(said, spoken):
    assert speak_options(said, OPTIONS) == spoken


@pytest.mark.parametrize(
    "said",
    [
        "RunConfig is not valid: stepz: no",
        "latents.depth=3 was saved",
        "the steps keep what they had",
        "call set_budget(model, keep=0.5) or `keep=1`",
        "'tome:keep=3' and 'ema_decay' came",
        "no file runs/ema_decay/x or ema_decay.json",
        "in a.json: RunConfig is not valid: ema_decay: no",
    ],
)
def test_what_is_no_option_stays(said):
    assert speak_options(said, OPTIONS) == said


def test_of_no_command():
    assert speak_options("ema_decay=1", {}) == "ema_decay=1"
