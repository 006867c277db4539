"""Runs of a report whose every cell is known."""

import numpy as np

from adaptok.see import ReportRun, ReportStep

GRID = (4, 6)
SIDE = 5  # pixels of a cell


def make_step(number, seed, kept):
    """Cells in front of `kept` are tokens of their own, the others belong to the one before."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (2, GRID[0] * SIDE, GRID[1] * SIDE, 3), dtype=np.uint8)
    n = GRID[0] * GRID[1]
    own = np.zeros((2, n), dtype=bool)
    own[0, :kept] = own[1, : kept // 2] = True
    token = np.maximum(0, own.cumsum(1) - 1)
    token[1, -2:] = -1
    prob = np.linspace(1, 0, n)[None].repeat(2, axis=0)
    return ReportStep(
        f"{number + 1} of 3", pixels, token, own, tuple(own.sum(1).tolist()), prob,
        clean=255 - pixels, gflops=0.01 * kept, ms=0.1 * kept,
    )  # fmt: skip


def make_run(name="drop 0", kept=12, steps=3):
    made = tuple(make_step(number, number, kept + number) for number in range(steps))
    return ReportRun(name, GRID, made, made[-1].clean)
