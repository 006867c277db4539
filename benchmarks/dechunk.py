"""Claim: neither the nearest-cell map nor the smoothing gets slower per cell on larger grids.

Times both beside their all-pairs forms on grids of 1,024, 4,096 and 16,384 cells with the
same number of cells in all, forward and backward apart.

    python benchmarks/dechunk.py --output benchmarks/results/dechunk-cpu.json
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from timing import describe_machine, time_interleaved
from torch import Tensor

from adaptok.dc.nearest import find_nearest, reach_of
from adaptok.dc.smoothing import LEAST_PROB, NORMALISER, smooth_kept

SIDES = (32, 64, 128)
CELLS = 65_536
LARGEST_GROWTH = 2.0


def coordinates(side: int, device: torch.device) -> Tensor:
    """Return the coordinates of all cells of a square grid."""
    axis = torch.arange(side, device=device, dtype=torch.float32)
    return torch.cartesian_prod(axis, axis)


def find_nearest_all_pairs(mask: Tensor, side: int) -> Tensor:
    """Compare each cell with each kept cell."""
    u = coordinates(side, mask.device)
    return torch.stack(
        [
            kept[torch.cdist(u, u[kept]).argmin(1)]
            for kept in (row.nonzero().squeeze(1) for row in mask)
        ]
    )


def smooth_all_pairs(h: Tensor, prob: Tensor, mask: Tensor, side: int, sigma: float) -> Tensor:
    """Smooth with the whole matrix of weights between kept cells."""
    u = coordinates(side, mask.device)
    p = prob.clamp(LEAST_PROB, 1 - LEAST_PROB)
    outs, start = [], 0
    for row in mask:
        at = u[row]
        mine = slice(start, start + len(at))
        distance = (at[:, None] - at[None]).square().sum(-1)
        weights = torch.exp(distance * (-0.5 / sigma**2)) * p[mine]
        smooth = (weights @ h[mine]) / (weights.sum(1, keepdim=True) + NORMALISER)
        outs.append(p[mine, None] * h[mine] + (1 - p[mine, None]) * smooth)
        start += len(at)
    return torch.cat(outs)


def make_backward(
    smooth: Callable[[Tensor, Tensor], Tensor], h: Tensor, prob: Tensor
) -> Callable[[], object]:
    """Return what computes the gradient of a smoothing whose forward pass is done."""
    h, prob = h.clone().requires_grad_(), prob.clone().requires_grad_()
    out = smooth(h, prob)
    probe = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (h, prob), probe, retain_graph=True)


def measure(side: int, width: int, sigma: float, rounds: int, device: torch.device) -> dict:
    """Time one grid size."""
    b, n, grid = CELLS // side**2, side**2, (side, side)
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(b, n, generator=generator) < 0.25).to(device)
    mask[:, [0, -1]] = True
    rows = mask.flatten().nonzero().squeeze(1)
    h = torch.randn(len(rows), width, generator=generator).to(device)
    prob = torch.rand(len(rows), generator=generator).to(device)

    def map_ours() -> Tensor:
        return find_nearest(mask, grid, int(reach_of(mask, grid)))

    def smooth_ours(h: Tensor, prob: Tensor) -> Tensor:
        return smooth_kept(h, prob, rows, b, grid, sigma)

    def smooth_theirs(h: Tensor, prob: Tensor) -> Tensor:
        return smooth_all_pairs(h, prob, mask, side, sigma)

    assert torch.equal(map_ours(), find_nearest_all_pairs(mask, side))
    assert torch.allclose(smooth_ours(h, prob), smooth_theirs(h, prob), atol=1e-4)
    with torch.no_grad():
        forward = time_interleaved(
            {
                "map": map_ours,
                "map, all pairs": lambda: find_nearest_all_pairs(mask, side),
                "smoothing forward": lambda: smooth_ours(h, prob),
                "smoothing forward, all pairs": lambda: smooth_theirs(h, prob),
            },
            rounds,
            device,
        )
    backward = time_interleaved(
        {
            "smoothing backward": make_backward(smooth_ours, h, prob),
            "smoothing backward, all pairs": make_backward(smooth_theirs, h, prob),
        },
        rounds,
        device,
    )
    return {name: asdict(timing) for name, timing in (forward | backward).items()}


def main() -> None:
    """Measure all sizes, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256, help="features of a token")
    parser.add_argument("--sigma", type=float, default=1.0, help="width of the smoothing in cells")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repeats")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    figures = {
        side**2: measure(side, arguments.width, arguments.sigma, arguments.rounds, device)
        for side in SIDES
    }
    smallest, largest = figures[min(figures)], figures[max(figures)]
    growth = {name: largest[name]["median"] / smallest[name]["median"] for name in smallest}
    print(f"{'ms for 65,536 cells':32}" + "".join(f"{n:>12,}" for n in figures) + "      growth")
    for name in smallest:
        medians = "".join(f"{figures[n][name]['median']:12.2f}" for n in figures)
        print(f"{name:32}{medians}{growth[name]:11.2f}x")
    ours = [name for name in smallest if "all pairs" not in name]
    holds = all(growth[name] <= LARGEST_GROWTH for name in ours)
    print(f"time per cell grows at most {LARGEST_GROWTH:g} times: {'yes' if holds else 'NO'}")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "command": f"python benchmarks/dechunk.py --sigma {arguments.sigma:g}",
            "machine": describe_machine(device),
            "unit": "ms for 65,536 cells, median and quartiles of interleaved rounds",
            "width": arguments.width,
            "sigma": arguments.sigma,
            "rounds": arguments.rounds,
            "figures": figures,
            "growth": {name: round(value, 3) for name, value in growth.items()},
        }
        arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
