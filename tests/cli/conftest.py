"""A tiny model with a router that decides differently from image to image, and a terminal."""

import pytest
import torch
from typer.testing import CliRunner

from adaptok import DCDiT, DCDiTConfig
from adaptok.cli import app, terminal
from adaptok.dc import DiT, DiTConfig
from adaptok.dc.folder import ModelCard, save_model
from adaptok.train.emoji import read_emoji_index

CARD = ModelCard(
    objective="flow", image_size=32, space_to_depth=2, class_names=read_emoji_index().classes
)


def fill(model):
    """Give the parts that start at zero random weights."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    config = DCDiTConfig(
        hidden_size=64,
        depth=1,
        num_heads=2,
        latent_size=16,
        in_channels=12,
        num_classes=8,
        learn_sigma=False,
    )
    model = fill(DCDiT(config))
    x, y = torch.randn(8, 12, 16, 16), torch.arange(8)
    with torch.no_grad():
        model.router.score[3].weight.mul_(5)
        _, routing = model(x, torch.full((8,), 500.0), y, return_routing=True)
        model.router.logit_bias.data -= routing.keep_prob[:, 1:-1].logit().quantile(0.7)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, CARD, folder)
    return folder


@pytest.fixture(scope="session")
def fixed_folder(tmp_path_factory):
    config = DiTConfig(
        hidden_size=64,
        depth=1,
        num_heads=2,
        latent_size=16,
        in_channels=12,
        num_classes=8,
        learn_sigma=False,
        patch_size=2,
    )
    folder = tmp_path_factory.mktemp("models") / "fixed"
    save_model(fill(DiT(config)), CARD, folder)
    return folder


@pytest.fixture
def run(monkeypatch):
    """Call the command line in this process; returns exit code, output and errors."""
    for console in (terminal.out, terminal.err):
        monkeypatch.setattr(console, "_width", 200)
        monkeypatch.setattr(console, "_height", 50)

    def call(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call
