"""Draw which steps of which samples three step caches compute, on the shipped model.

Usage: python scripts/draw_caches.py [--output docs/pictures/caches.png] [--steps 40]

The shipped model runs with all of its cells, so that its blocks can be wrapped as a plain list; a
few minutes on one CPU core.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from adaptok_cache import FirstBlockCache, StepCache, TaylorSeer, TeaCache
from torch import Tensor, nn

import adaptok
from adaptok.dc import DCDiT
from adaptok.diffusion import FlowObjective, sample
from adaptok.errors import AdaptokError
from adaptok.see.canvas import (
    COLOURS,
    LINE,
    QUIET,
    SMALL,
    TITLE,
    Canvas,
    frame_image,
    make_canvas,
    save_figure,
)
from adaptok.tracing import plain
from adaptok.zoo.models import load_zoo_model

LABELS, SEEDS = (1, 3, 5, 7), (11, 3, 24, 5)
CELL, ROW, GAP, MARGIN, HEAD, PANEL, NAMES = 20, 64, 20, 30, 96, 56, 186
FADED = "#e6e9ef"


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """What one way to sample gave.

    Args:
        title: how it was done.
        images: RGB pixels, `(b h w 3)`.
        computed: whether a sample was computed in a step, `(steps b)`.
        seconds: time of the processor for all steps.
        error: mean absolute difference to the images without a cache, in grey levels of 255.
    """

    title: str
    images: npt.NDArray[np.uint8]
    computed: npt.NDArray[np.bool_]
    seconds: float
    error: float


def give_inputs(model: nn.Module) -> adaptok.HostInputs:
    """Return small inputs of the model for the probe of a wrap."""
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = (x, torch.tensor([300.0, 700.0]), torch.tensor([0, 1]))
    return adaptok.HostInputs(inputs, {"keep": 1.0})


def load_dense() -> DCDiT:
    """Return the shipped model with a layout whose tokens are dense, in eval mode."""
    trained = load_zoo_model("dcdit-emoji32").model
    assert isinstance(trained, DCDiT)
    model = DCDiT(trained.config.model_copy(update={"layout": "fixed"}))
    model.load_state_dict(trained.state_dict())
    return model.eval()


def wrap_dense(model: DCDiT, stage: StepCache) -> DCDiT:
    """Wrap the blocks of the model, which see all cells."""
    host = adaptok.ListBackbone(
        blocks="backbone.blocks",
        grid=model.config.grid,
        per_sample=(1,),
        width=model.config.hidden_size,
        inputs=give_inputs,
        timestep="t",
    )
    return adaptok.wrap(model, stack=[stage], backbone=host)


def to_pixels(latents: Tensor) -> npt.NDArray[np.uint8]:
    """Return images in [-1, 1], `(b 3 h w)`, as pixels, `(b h w 3)`."""
    pixels = ((latents.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())


def run(model: DCDiT, stage: StepCache, title: str, steps: int, cached: bool) -> Draw:
    """Draw the images of one way to sample."""
    flags: list[tuple[bool, ...]] = []

    def note(done: int, total: int) -> None:
        flags.append(stage.last_computed if cached else (True,) * len(LABELS))

    options = {"objective": FlowObjective(), "scheduler": "flow-euler", "keep": 1.0}
    began = time.process_time()  # others may use the machine
    drawn = sample(model, LABELS, seed=SEEDS, steps=steps, progress=note, **options)  # type: ignore[arg-type]
    seconds = time.process_time() - began
    return Draw(title, to_pixels(drawn.latents), np.array(flags), seconds, 0.0)


def run_all(stages: dict[str, StepCache], steps: int) -> list[Draw]:
    """Draw without a cache, and with each of them."""
    draws: list[Draw] = []
    for title, stage in stages.items():
        model = wrap_dense(load_dense(), stage)
        if not draws:
            with plain(model):
                draws.append(run(model, stage, "no cache", steps, cached=False))
        found = run(model, stage, title, steps, cached=True)
        error = np.abs(found.images.astype(float) - draws[0].images.astype(float)).mean()
        draws.append(Draw(found.title, found.images, found.computed, found.seconds, float(error)))
    return draws


def say(draw: Draw, base: Draw) -> str:
    """Return the figures of a way to sample."""
    share = draw.computed.mean()
    if draw is base:
        return f"100 % computed, {draw.seconds:.0f} s of a CPU core"
    return (
        f"{100 * share:.0f} % computed, {draw.seconds:.0f} s, images differ by {draw.error:.1f} "
        "of 255"
    )


def draw_panel(canvas: Canvas, top: int, draw: Draw, base: Draw, names: Sequence[str]) -> None:
    """Draw one way to sample: images, and a cell for each step of each sample."""
    steps, b = draw.computed.shape
    canvas.text(MARGIN, top, draw.title, bold=True)
    right = MARGIN + NAMES + ROW + GAP + steps * CELL
    canvas.text(right, top + 3, say(draw, base), size=SMALL, colour=QUIET, align="right")
    for i in range(b):
        row = top + PANEL - 26 + i * (ROW + 4)
        canvas.text(MARGIN, row + ROW / 2, names[i], size=SMALL, anchor="center")
        canvas.image(MARGIN + NAMES, row, (ROW, ROW), draw.images[i])
        axes = canvas.axes(MARGIN + NAMES + ROW + GAP, row + 14, steps * CELL, ROW - 28)
        for step, ran in enumerate(draw.computed[:, i]):
            axes.barh(0, 0.86, left=step + 0.07, height=1, color=COLOURS[0] if ran else FADED)
        axes.set_xlim(0, steps)
        axes.set_ylim(-0.5, 0.5)
        frame_image(axes)
        for spine in axes.spines.values():
            spine.set_visible(False)


def draw_all(draws: Sequence[Draw], names: Sequence[str]) -> Canvas:
    """Draw all ways to sample, one below the other."""
    steps, b = draws[0].computed.shape
    height = PANEL + b * (ROW + 4)
    width = 2 * MARGIN + NAMES + ROW + GAP + steps * CELL
    canvas = make_canvas(width, HEAD + len(draws) * height + MARGIN)
    title = f"Which of {steps} steps the blocks run in, sample by sample"
    canvas.text(MARGIN, 18, title, size=TITLE, bold=True)
    left = MARGIN + NAMES + ROW + GAP
    for place, (colour, text) in enumerate(((COLOURS[0], "computed"), (FADED, "reused"))):
        axes = canvas.axes(left + 130 * place, 62, CELL, 20)
        axes.set_facecolor(colour)
        frame_image(axes)
        canvas.text(left + 130 * place + CELL + 8, 72, text, size=SMALL, anchor="center")
    canvas.text(
        left + steps * CELL, 72, "noise  →  image", size=SMALL, align="right", anchor="center"
    )
    for place, draw in enumerate(draws):
        top = HEAD + place * height
        line = canvas.axes(MARGIN, top - 8, width - 2 * MARGIN, 1)
        line.set_facecolor(LINE)
        line.set_axis_off()
        draw_panel(canvas, top, draw, draws[0], names)
    return canvas


def main() -> int:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/caches.png"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tea", type=float, default=0.06, help="threshold of teacache")
    parser.add_argument("--first", type=float, default=0.08, help="threshold of firstblock")
    parser.add_argument("--interval", type=int, default=3, help="interval of taylorseer")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that the processor's time is that of the work
    try:
        stages: dict[str, StepCache] = {
            f"teacache, threshold {options.tea:g}": TeaCache(options.tea),
            f"firstblock, threshold {options.first:g}": FirstBlockCache(options.first),
            f"taylorseer, interval {options.interval}": TaylorSeer(options.interval),
        }
        draws = run_all(stages, options.steps)
        names = load_zoo_model("dcdit-emoji32").card.class_names
        canvas = draw_all(draws, [names[label] for label in LABELS])
        save_figure(canvas.figure, options.output)
        for draw in draws:
            print(f"{draw.title}: {say(draw, draws[0])}")
    except AdaptokError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
