"""A small DiT whose every weight matters, walks over it, and a count of what its blocks get."""

import copy
from dataclasses import dataclass, field

import pytest
import torch

import adaptok
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DiTConfig
from adaptok.testing.models import fill_weights

DEPTH = 3
TIMES = (999.0, 880.0, 761.0, 642.0, 523.0, 404.0, 285.0, 166.0, 47.0)


@dataclass
class Walk:
    """Inputs of a run: noisy images that move at a speed of their own."""

    b: int = 3
    seed: int = 0
    times: tuple = TIMES
    size: tuple = (8, 12)
    speeds: tuple = (0.02, 0.15, 0.6)
    dtype: torch.dtype = torch.float32
    steps: list = field(default_factory=list)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.b, 4, *self.size)
        clean, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        speed = torch.tensor(self.speeds[: self.b]).repeat(self.b)[: self.b].view(-1, 1, 1, 1)
        for t in self.times:
            x = noise + speed * (1 - t / 1000) * 3 * clean
            self.steps.append((x.to(self.dtype), torch.full((self.b,), t), self.labels))

    @property
    def labels(self):
        return torch.arange(self.b) % 5

    def sample(self, i):
        """The inputs of one sample alone."""
        return [(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for x, t, y in self.steps]


def make_dit(depth=DEPTH, **options):
    options = {
        "hidden_size": 64,
        "num_heads": 4,
        "latent_size": (8, 12),
        "num_classes": 5,
    } | options
    return fill_weights(DiT(DiTConfig(depth=depth, **options))).eval()


def run_steps(model, steps, request="one", branch=None):
    """Return what a model makes of each step, under one request."""
    with torch.no_grad():
        if request is None:
            return [model(*step) for step in steps]
        with adaptok.request(model, request, branch=branch):
            return [model(*step) for step in steps]


def count_samples(model):
    """Return a list that gets the batch size of each block call."""
    seen = []
    for block in (model.blocks[i] for i in range(DEPTH)):
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    return seen


@pytest.fixture(scope="session")
def template():
    return make_dit()


@pytest.fixture
def dit(template):
    return copy.deepcopy(template)


@pytest.fixture
def wrapped(template):
    """Make a wrapped copy with its stage."""

    def make(stage, **options):
        model = copy.deepcopy(template)
        adaptok.wrap(model, stack=[stage, *options.pop("inside", ())], **options)
        return model

    return make


@pytest.fixture
def tools():
    """What tests of this folder share."""

    class Tools:
        pass

    for item in (Walk, make_dit, run_steps, count_samples):
        setattr(Tools, item.__name__, staticmethod(item))
    Tools.TIMES, Tools.DEPTH = TIMES, DEPTH
    return Tools
