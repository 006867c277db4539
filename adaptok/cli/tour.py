"""The work of `adaptok demo`: five pictures, a report, a table, and summary.json."""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table

from adaptok.cli.autoencoders import is_of_pixels
from adaptok.cli.drawing import FAST_SCHEDULER, make_folder
from adaptok.cli.exhibits import (
    show_curves,
    show_real_images,
    show_report,
    show_samples,
    show_training,
    show_trajectory,
)
from adaptok.cli.opening import open_routed
from adaptok.cli.pictures import make_curve
from adaptok.cli.settings import Row, Tour, draw_rows
from adaptok.cli.terminal import describe_seconds, out
from adaptok.dc.folder import TrainedModel
from adaptok.errors import ConfigError
from adaptok.storage import save_json

QUARTERS = {"noisiest": (0.75, 1.0), "cleanest": (0.0, 0.25)}


def give_tour(tour: Tour) -> None:
    """Draw all pictures, write the report, print what they show, and write summary.json.

    Args:
        tour: what a person asked for.

    Raises:
        AdaptokError: the model cannot be used, or a file cannot be written.
    """
    started = time.monotonic()
    trained = open_routed(tour.model, "the demo")
    if not is_of_pixels(trained):
        raise ConfigError(
            f"the demo shows emoji in pixels, and {tour.model!r} works on latents: "
            "`adaptok report` and `adaptok sample` take it, with --vae for its autoencoder"
        )
    trained.model.to("cuda" if torch.cuda.is_available() else "cpu")
    make_folder(tour.output)
    drawn = draw_rows(tour, trained)
    curves = [
        make_curve(row.setting.name, row.measured.samples)
        for row in drawn.rows
        if row.setting.runs == 1
    ]
    pictures = {
        "samples by budget": show_samples(tour, trained, drawn),
        "where tokens go": show_trajectory(tour, trained, drawn),
        "when tokens go": show_curves(tour, trained, curves),
        "real images": show_real_images(tour, trained),
    }
    losses, pictures["training"] = show_training(tour)
    pictures["look at every cell"] = show_report(tour, trained, drawn)
    seconds = time.monotonic() - started
    quarters = {name: curves[0].mean_between(*ends) for name, ends in QUARTERS.items()}
    out.print(make_table(drawn.rows, trained))
    say_quarters(quarters)
    for name, path in pictures.items():
        out.print(f"{name + ':':20}{path}", soft_wrap=True)
    summary = summarise(tour, trained, drawn.rows, quarters, losses, seconds)
    save_json(tour.output / "summary.json", summary)
    out.print(f"{'all figures:':20}{tour.output / 'summary.json'}", soft_wrap=True)
    out.print(f"done in {describe_seconds(seconds)}")


def make_table(rows: Sequence[Row], trained: TrainedModel) -> Table:
    """Put the costs of all settings into a table."""
    h, w = trained.model.config.grid
    table = Table(title=f"Cost of a sampling step for one image ({h} x {w} = {h * w:,} cells)")
    for column in ("budget", "tokens", "kept", "GFLOPs", "ms", "ms in all"):
        table.add_column(column, justify="left" if column == "budget" else "right")
    for row in rows:
        cost = row.measured.cost
        table.add_row(
            row.setting.name,
            f"{cost.mean_tokens:,.0f}",
            f"{cost.mean_tokens / (h * w * row.setting.runs):.1%}",
            f"{cost.gflops:.2f}",
            f"{cost.ms:.1f}",
            f"{cost.ms * len(row.measured.step_ms):,.0f}",
        )
    return table


def say_quarters(quarters: dict[str, float | None]) -> None:
    """Print the kept fraction at both ends of the trajectory."""
    words = [
        f"{value:.1%} in the {name} quarter of the way"
        for name, value in quarters.items()
        if value is not None
    ]
    if words:
        out.print(f"cells kept at drop 0: {', '.join(words)}", soft_wrap=True)


def summarise(
    tour: Tour,
    trained: TrainedModel,
    rows: Sequence[Row],
    quarters: dict[str, float | None],
    losses: Sequence[float],
    seconds: float,
) -> dict[str, Any]:
    """Return all figures of the demo as plain values."""
    model = trained.model
    cells = model.config.grid[0] * model.config.grid[1]
    tail = max(1, len(losses) // 10)
    return {
        "model": tour.model,
        "seed": tour.seed,
        "steps": tour.steps,
        "scheduler": FAST_SCHEDULER[trained.card.objective],
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "cells": cells,
        "budgets": [
            {
                "name": row.setting.name,
                "drop": row.setting.drop,
                "uncond_drop": row.setting.uncond_drop,
                "guidance": row.setting.guidance,
                "tokens_per_step": row.measured.cost.mean_tokens,
                "gflops_per_step": row.measured.cost.gflops,
                "ms_per_step": row.measured.cost.ms,
                "images": len(row.measured.cost.tokens),
                "seconds": row.measured.seconds,
            }
            for row in rows
        ],
        "kept_by_quarter": quarters,
        "training": {
            "steps": len(losses),
            "first_loss": statistics.fmean(losses[:tail]),
            "last_loss": statistics.fmean(losses[-tail:]),
        },
        "seconds": seconds,
    }
