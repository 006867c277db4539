"""A small model with the call signature of the real ones, and one that knows the answer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from adaptok.diffusion import FlowObjective, HybridObjective, combine_halves

NUM_CLASSES = 10


class StandIn(nn.Module):
    """Depends on image, time, label and budget, and tells its routing."""

    def __init__(self, out_channels=6, grid=(5, 7), channels=3):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.config = SimpleNamespace(num_classes=NUM_CLASSES, in_channels=channels, grid=grid)
        self.label = nn.Embedding(NUM_CLASSES + 1, 8)
        self.read = nn.Conv2d(channels, 8, 3, padding=1)
        self.write = nn.Conv2d(8, out_channels, 1)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            for value in self.parameters():
                value.normal_(0, 0.4, generator=generator)
        self.calls = []

    def forward(self, x, t, y, *, drop=None, keep=None, tokens=None, return_routing=False):
        self.calls.append(
            SimpleNamespace(x=x, t=t, y=y, drop=drop, keep=keep, tokens=tokens, grad=None)
        )
        condition = self.label(y) + torch.sin(t[:, None] / 300).to(self.label.weight.dtype)
        hidden = torch.tanh(self.read(x) + condition[:, :, None, None].to(x.dtype))
        score = hidden.float().mean(dim=1).flatten(1)
        n = score.shape[1]
        counts = (score > 0).sum(1).clamp(min=1)
        if drop is not None:
            drop = torch.as_tensor(drop, dtype=torch.float32).expand(len(x))
            counts = counts - (counts * drop).floor().long()
        if keep is not None:
            counts = (torch.as_tensor(keep).expand(len(x)) * n + 0.5).floor().long().clamp(min=1)
        if tokens is not None:
            counts = torch.as_tensor(tokens).expand(len(x))
        mask = score.argsort(1, descending=True).argsort(1) < counts[:, None]
        weight = (0.5 + 0.5 * mask.float()).view(-1, 1, *x.shape[2:]).to(x.dtype)
        out = self.write(self.dropout(hidden * weight))
        routing = SimpleNamespace(keep_prob=score.sigmoid(), keep_mask=mask, natural_mask=score > 0)
        return (out, routing) if return_routing else out

    def forward_with_cfg(
        self, x, t, y, *, cfg_scale, drop=None, uncond_drop=None, guided_channels=3, **options
    ):
        half = x[: len(x) // 2]
        if uncond_drop is not None:
            pair = torch.tensor([drop or 0.0, uncond_drop])
            drop = pair.repeat_interleave(len(half))
        out = self(torch.cat([half, half]), t, y, drop=drop, **options)
        if options.get("return_routing"):
            return combine_halves(out[0], cfg_scale, guided_channels), out[1]
        return combine_halves(out, cfg_scale, guided_channels)


class Plain(nn.Module):
    """A model without routing, as the fixed-patch baseline is."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.config = inner.config

    def forward(self, x, t, y, *, drop=None, return_routing=False):
        assert not drop
        out = self.inner(x, t, y)
        return (out, None) if return_routing else out


class Gaussian(nn.Module):
    """The best possible model of images whose values are normal, with a mean per class.

    `place` is where its variance lies in the learned range: "best" is the true variance of
    the reverse step, a number is that place everywhere.
    """

    def __init__(self, objective, means, std, timesteps=None, place="best"):
        super().__init__()
        self.objective, self.std, self.place = objective, std, place
        self.means = torch.tensor(means, dtype=torch.float64)
        self.timesteps = timesteps
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        self.bar = (1 - betas).cumprod(0)

    def forward(self, x, t, y):
        mean, t, x = self.means[y].view(-1, 1, 1, 1), t[0].double().item(), x.double()
        if self.objective.name == "flow":
            s = t / 1000
            a, b = 1 - s, s
        else:
            a, b = self.bar[round(t)].sqrt(), (1 - self.bar[round(t)]).sqrt()
        noise = b * (x - a * mean) / (a**2 * self.std**2 + b**2)
        if self.objective.name == "flow":
            x0 = mean + a * self.std**2 * (x - a * mean) / (a**2 * self.std**2 + b**2)
            return (noise - x0).float()
        return torch.cat([noise, torch.full_like(noise, self.find_place(round(t)))], 1).float()

    def find_place(self, t):
        if self.place != "best" or t == 0:
            return 0.0 if self.place == "best" else self.place
        steps = self.timesteps
        if t not in steps:  # a scheduler with other steps, which ignores the variance
            return 0.0
        now, before = self.bar[t], self.bar[steps[steps.index(t) + 1]]
        beta = 1 - now / before
        smallest = (1 - before) / (1 - now) * beta
        known = self.std**2 * (1 - now) / (now * self.std**2 + 1 - now)  # variance of x0 given x
        best = smallest + before * (beta / (1 - now)) ** 2 * known
        fraction = (best.log() - smallest.log()) / (beta.log() - smallest.log())
        return float(2 * fraction - 1)


class Knowing(nn.Module):
    """Knows the clean image, so that every walk must end in it."""

    def __init__(self, objective, x0):
        super().__init__()
        self.objective, self.x0 = objective, x0

    def forward(self, x, t, y, return_routing=False):
        time = t / 1000 if self.objective.name == "flow" else t.round().long()
        right = self.objective.predict_from_x0(self.x0, x, time)
        out = right if self.objective.name == "flow" else torch.cat([right, right * 0 - 1], 1)
        return (out, None) if return_routing else out


OBJECTIVES = {"ddpm": HybridObjective(), "dpm": HybridObjective(), "flow-euler": FlowObjective()}


@pytest.fixture
def classes():
    """The models, as importlib mode gives tests no module to import from."""
    return SimpleNamespace(StandIn=StandIn, Plain=Plain, Gaussian=Gaussian, Knowing=Knowing)


@pytest.fixture(params=OBJECTIVES)
def scheduler(request):
    return request.param


@pytest.fixture
def objective(scheduler):
    return OBJECTIVES[scheduler]


@pytest.fixture
def model(objective):
    return StandIn(out_channels=objective.out_channels(3)).eval()


@pytest.fixture
def linspace_steps():
    return lambda steps: np.linspace(0, 999, steps).round()[::-1].astype(int).tolist()
