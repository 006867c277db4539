"""Fixtures that many tests share."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adaptok

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def seed_everything():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_folder():
    """The folder of real weights, images and golden tensors beside the project."""
    if not SHARED.is_dir():
        pytest.skip("the shared folder of real data is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared_folder):
    """Tensors that the published implementation produced."""
    return load_file(shared_folder / "golden" / "dcdit_tiny.safetensors")


def randomise(module, seed=0, scale=0.25):
    """Fill all parameters, zero-initialised ones too, with values that make outputs react."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                noise = noise / parameter[0].numel() ** 0.5 * 4 * scale
            elif "norm" in name and name.endswith("weight"):
                noise = 1 + scale * noise
            else:
                noise = scale * noise
            parameter.copy_(noise)
    return module


def make_model(**options):
    """A small DC-DiT whose every part matters, on a grid that is not square."""
    options = {
        "hidden_size": 160,  # narrower, and norms of one channel take the condition out
        "depth": 2,
        "num_heads": 2,
        "latent_size": (12, 18),
        "num_classes": 10,
    } | options
    model = randomise(adaptok.DCDiT(adaptok.DCDiTConfig(**options))).eval()
    # random weights would keep nearly all cells or nearly none: put one in twelve above 0.5
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, model.config.in_channels, *model.config.grid, generator=generator)
    _, routing = make_natural(model)(x, torch.arange(4) * 250, torch.arange(4), return_routing=True)
    cut = routing.keep_prob[:, 1:-1].logit().quantile(0.92)
    model.router.logit_bias.data -= cut.detach()
    return model


@pytest.fixture
def tiny_model():
    return make_model()


@pytest.fixture
def uneven_batch():
    """Three samples whose natural counts differ at least twofold."""
    return make_uneven_batch(make_model())


def make_uneven_batch(model):
    h, w = model.config.grid
    pool = 96
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(pool, model.config.in_channels, h, w, generator=generator)
    spikes = torch.where(torch.rand(x.shape, generator=generator) < 0.01, 5 * x, 0.3)
    x = torch.where((torch.arange(pool) % 2 == 0)[:, None, None, None], spikes, x)
    t = torch.randint(0, 1000, (pool,), generator=generator)
    y = torch.randint(0, model.config.num_classes + 1, (pool,), generator=generator)
    with torch.no_grad():
        _, routing = make_natural(model)(x, t, y, return_routing=True)
    counts = routing.natural_mask.sum(1)
    order = counts.argsort()
    pick = order[[pool // 2, 0, -1]]
    assert counts[order[-1]] >= 2 * counts[order[0]], counts.sort().values
    return x[pick], t[pick], y[pick]


def make_natural(model):
    """The same weights in the packed layout, which takes the natural budget."""
    copy = adaptok.DCDiT(model.config.model_copy(update={"layout": "packed"}))
    copy.load_state_dict(model.state_dict())
    return copy.eval()


@pytest.fixture(autouse=True, scope="module")
def forget_graphs_of_a_module():
    """Graphs of one forward are counted over all tests of a process, up to a limit."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
