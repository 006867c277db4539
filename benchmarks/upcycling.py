"""Is a DC-DiT cheaper to train around the blocks of a DiT than from nothing?

    python -m benchmarks.upcycling --runs runs/upcycling

Trains a small DiT on the shipped emoji, then a DC-DiT around its blocks (distilled first) and the
same DC-DiT from nothing, and compares their loss on held-out emoji by the operations spent on
training. What the DiT itself has cost is stated beside it. All runs go on where they stopped.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from adaptok.dc.config import DCDiTConfig, DiTConfig
from adaptok.dc.folder import build_model
from adaptok.measure.flops import count_flops, count_flops_by_part
from adaptok.train.batches import Batch, Share, draw_batch
from adaptok.train.checkpoint import list_checkpoints, load_checkpoint
from adaptok.train.config import TrainConfig, fit_model_to_data
from adaptok.train.data import load_emoji
from adaptok.train.distillation import plan_upcycling
from adaptok.train.learner import measure_loss
from adaptok.train.trainer import train

BACKWARD = 3  # a training step counts as three forward passes
CATEGORIES = ("Food & Drink", "Animals & Nature")
EVERY = 50
LOSSES = (0.9, 0.6, 0.4, 0.3, 0.27, 0.25)  # where the curves are compared


@dataclass(frozen=True, slots=True)
class Point:
    """The state of a run.

    Args:
        step: optimiser steps done.
        flops: operations of training so far.
        loss: on held-out images, averaged weights, nothing dropped.
        kept: share of the cells that the router keeps of itself.
    """

    step: int
    flops: float
    loss: float
    kept: float


def make_config(options: argparse.Namespace, steps: int) -> TrainConfig:
    """Return what all runs share, with the model of the DiT."""
    config = TrainConfig(
        model=DiTConfig(hidden_size=options.width, depth=options.depth, num_heads=4, patch_size=2),
        image_size=32,
        categories=CATEGORIES,
        skin_variants=False,
        objective="flow",
        steps=steps,
        batch_size=options.batch,
        learning_rate=options.lr,
        learning_rate_warmup=20,
        ema_decay=0.98,
        budget_warmup=100,
        log_every=EVERY,
        checkpoint_every=EVERY,
        keep_checkpoints=10_000,
        seed=options.seed,
    )
    return fit_model_to_data(config, len(CATEGORIES))


def draw_held_out(config: TrainConfig, images: int) -> list[Batch]:
    """Return test emoji with fixed noise and times."""
    test = load_emoji(
        size=config.image_size, split="test", categories=CATEGORIES, skin_variants=False
    )
    fixed = config.model_copy(update={"seed": 12345, "class_dropout": 0.0, "batch_size": 32})
    return [draw_batch(fixed, test, step, Share()) for step in range(-(-images // 32))]


def follow(output: Path, config: TrainConfig, held_out: list[Batch]) -> list[Point]:
    """Return a run's loss on held-out images at each checkpoint, with what it has cost."""
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    points = []
    for folder in list_checkpoints(output):
        checkpoint = load_checkpoint(folder)
        step = checkpoint.state.step
        model = build_model(config.model).eval()
        model.load_state_dict(dict(checkpoint.ema))
        with torch.no_grad():
            found = [measure_loss(model, config, batch, 0.0) for batch in held_out]
        mse, kept = (
            torch.stack([part.get(name, torch.ones(())) for part in found]).mean().item()
            for name in ("mse", "natural")
        )
        points.append(Point(step, count_training(config, log, step), mse, kept))
    return points


def count_training(config: TrainConfig, log: list[dict[str, float]], step: int) -> float:
    """Count the operations of training up to a step, with the tokens that were really kept."""
    total, done = 0.0, 0
    for line in log:
        if line["step"] > step:
            break
        steps, done = line["step"] - done, line["step"]
        total += steps * config.batch_size * count_step(config, line, done)
    return total


def count_step(config: TrainConfig, line: dict[str, float], step: int) -> float:
    """Count the operations of a training step for one image."""
    model, grid = config.model, config.model.grid
    cells = grid[0] * grid[1]
    if isinstance(model, DiTConfig):
        return BACKWARD * count_flops(model, grid, [cells // model.patch_size**2])
    kept = [max(1, round(line["kept"] * cells))]
    parts = count_flops_by_part(model, grid, kept)
    if step > (config.distill_steps or 0):
        return BACKWARD * parts.total
    shared = {name: getattr(model, name) for name in DiTConfig.model_fields if name != "patch_size"}
    teacher = DiTConfig(**shared, patch_size=model.position_cells)
    patches = cells // model.position_cells**2
    return BACKWARD * (parts.total - parts.backbone) + count_flops(teacher, grid, [patches])


def cost_of(points: list[Point], loss: float) -> float | None:
    """Return the operations after which a run is at a loss or below, between its points."""
    before = points[0]
    for point in points:
        if point.loss <= loss:
            if point is before:
                return point.flops
            share = (before.loss - loss) / (before.loss - point.loss)
            return before.flops + share * (point.flops - before.flops)
        before = point
    return None


def draw_curves(curves: dict[str, list[Point]], baseline: Point, path: Path) -> None:
    """Draw loss by operations."""
    from adaptok.see.canvas import COLOURS, QUIET, SMALL, TITLE, make_canvas

    canvas = make_canvas(1120, 640)
    canvas.text(28, 22, "Upcycled or from nothing: loss on held-out emoji", size=TITLE, bold=True)
    canvas.text(
        28,
        59,
        f"the DiT that gave its blocks: loss {baseline.loss:.3f} after {baseline.flops / 1e12:.0f} "
        "TFLOPs of its own, which the curves do not hold   ·   distillation is counted",
        size=SMALL,
        colour=QUIET,
    )
    axes = canvas.axes(112, 124, 968, 412)
    for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(
            [point.flops / 1e12 for point in points],
            [point.loss for point in points],
            color=colour,
            linewidth=1.8,
            marker="o",
            markersize=3,
            label=name,
        )
    line = (0, (1, 2))
    axes.axhline(baseline.loss, color=QUIET, linewidth=1.2, linestyle=line, label="the DiT itself")
    axes.set_yscale("log")
    axes.set_ylim(0.9 * baseline.loss, 1.3)
    ticks = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("operations spent on training, TFLOPs", size=SMALL)
    axes.set_ylabel("held-out loss: squared error of the velocity", size=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=SMALL)
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/upcycling"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/upcycling.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/upcycling.png"))
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--host-steps", type=int, default=800)
    parser.add_argument("--distill-steps", type=int, default=100)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    host = make_config(options, options.host_steps)
    folder = options.runs / "dit"
    train(host, folder)
    upcycled = plan_upcycling(
        make_config(options, options.steps), folder / "model", options.distill_steps
    )
    values = {name: getattr(upcycled, name) for name in TrainConfig.model_fields}
    model = upcycled.model.model_dump() | {
        "position_cells": 1,
        "condition_norm": False,
        "train_embedders": True,
    }
    scratch = TrainConfig(
        **(values | {"host": None, "distill_steps": None, "model": DCDiTConfig(**model)})
    )
    held_out = draw_held_out(host, options.held_out)
    baseline = follow(folder, host, held_out)[-1]
    curves, seconds = {}, {}
    for name, config in (("upcycled", upcycled), ("from nothing", scratch)):
        output = options.runs / name.replace(" ", "-")
        started = time.monotonic()
        seconds[name] = round(train(config, output).seconds)
        print(name, round(time.monotonic() - started), "s", flush=True)
        curves[name] = follow(output, config, held_out)
    last = curves["from nothing"][-1]
    needed = cost_of(curves["upcycled"], last.loss)
    levels = {str(loss): [cost_of(points, loss) for points in curves.values()] for loss in LOSSES}
    result = {
        "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        "data": f"shipped emoji, {', '.join(CATEGORIES)}, no skin variants, 32 px as 16 x 16 x 12; "
        f"held out: {options.held_out} draws of test emoji with fixed noise and times",
        "torch": torch.__version__,
        "dit": {"step": baseline.step, "loss": baseline.loss, "training_flops": baseline.flops},
        "seconds": seconds,
        "from_nothing_final": {"loss": last.loss, "flops": last.flops},
        "upcycled_final": {
            "loss": curves["upcycled"][-1].loss,
            "flops": curves["upcycled"][-1].flops,
        },
        "upcycled_flops_to_that_loss": needed,
        "share_of_flops": None if needed is None else needed / last.flops,
        "share_of_flops_with_the_dit": None
        if needed is None
        else (needed + baseline.flops) / last.flops,
        "share_of_flops_by_loss": {
            loss: first / second if first and second else None
            for loss, (first, second) in levels.items()
        },
        "curves": {
            name: [[p.step, p.flops, p.loss, p.kept] for p in points]
            for name, points in curves.items()
        },
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    draw_curves(curves, baseline, options.picture)
    print(json.dumps({k: v for k, v in result.items() if k != "curves"}, indent=1))


if __name__ == "__main__":
    main()
