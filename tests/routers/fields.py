"""Features on grids for the tests of routers."""

import itertools
import math

import torch

ROUTER_GRIDS = [(5, 7), (1, 9), (9, 1), (2, 2), (3, 4, 5), (1, 1, 6)]


def make_noise(grid, b=3, d=6, seed=0):
    """Independent cells, of samples that differ in scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(b, math.prod(grid), d, generator=generator)
    scale = torch.tensor([1.0, 0.05, 40.0, 3.0])[:b].reshape(-1, 1, 1)
    return scale * (noise + torch.randn(b, 1, d, generator=generator))


def make_waves(grid, d=16):
    """One sample whose features change slowly from cell to cell."""
    axes = torch.meshgrid(*(torch.arange(float(length)) for length in grid), indexing="ij")
    position = torch.stack(axes, -1).reshape(-1, len(grid))
    generator = torch.Generator().manual_seed(3)
    speed = 0.3 * torch.randn(len(grid), d, generator=generator)
    phase = 6.28 * torch.rand(d, generator=generator)
    return (position @ speed + phase).sin()[None]


def mean_by_loop(x, grid, falloff):
    """Means of neighbours, cell by cell and pair by pair, in float64."""
    cells = list(itertools.product(*map(range, grid)))
    mean = x.double().clone()
    for i, here in enumerate(cells):
        total, weights = 0, 0
        for j, there in enumerate(cells):
            steps = [abs(a - b) for a, b in zip(here, there, strict=True)]
            if max(steps) == 1:
                weight = math.sqrt(sum(steps)) ** -falloff
                total, weights = total + weight * x[:, j].double(), weights + weight
        if weights:
            mean[:, i] = total / weights
    return mean
