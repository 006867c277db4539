"""Does tuning help? ViT-S/14 with real weights, wrapped, on held-out emoji.

    python -m benchmarks.tune --shared ../shared

Trains router and dechunker, and in a second run the host too, on training emoji, and compares the
features of test emoji (other base emoji) with those of the unwrapped model, before and after.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

import adaptok
from adaptok.tracing import observe, plain
from adaptok.train.emoji import read_emoji_index
from adaptok.train.tuning import TuneStep, tune
from adaptok.train.tuning_loss import BlockExit
from benchmarks.emoji_knn.images import load_pictures
from benchmarks.emoji_knn.intervals import bootstrap_difference, bootstrap_mean
from benchmarks.emoji_knn.models import SaliencyVitS14
from benchmarks.emoji_knn.neighbours import compare_centred

KEEPS = (0.3, 0.5, 0.7)
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
SEED = 0
# name: learning rate of router and dechunker, and of the host if it is trained
RUNS: dict[str, tuple[float, float | None]] = {
    "router and dechunker": (5e-4, None),
    "host too": (1e-4, 5e-6),
}


def read_features(
    model: nn.Module, images: Float[Tensor, "n 3 h w"], keep: float | None
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Return class features of images and features of their cells; plain without a budget."""
    seen, outputs, cells = BlockExit(), [], []
    context = plain(model) if keep is None else adaptok.budget(model, keep=keep)
    with torch.no_grad(), context, observe(model, seen):
        for batch in images.split(16):
            outputs.append(model(batch))
            cells.append(seen.cells)
    return torch.cat(outputs), torch.cat(cells)


def compare(
    model: nn.Module,
    images: Float[Tensor, "n 3 h w"],
    target: tuple[Float[Tensor, "n d"], Float[Tensor, "n m d"]],
) -> dict[str, dict[str, Float[Tensor, " n"]]]:
    """Return the cosine of centred features to those of the unwrapped model, image by image."""
    found = {}
    for keep in KEEPS:
        output, cells = read_features(model, images, keep)
        by_cell = compare_centred(cells, target[1], target[1].mean((0, 1)))
        found[str(keep)] = {
            "class": compare_centred(output, target[0], target[0].mean(0)),
            "cells": by_cell.mean(1),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--cache", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tune.json"))
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=96, help="held-out images")
    options = parser.parse_args()

    entries = [entry for entry in read_emoji_index().entries if not entry.is_skin_variant]
    known = [entry for entry in entries if entry.split == "train"]
    order = torch.randperm(
        sum(entry.split == "test" for entry in entries),
        generator=torch.Generator().manual_seed(SEED),
    )
    unseen = [entry for entry in entries if entry.split == "test"]
    unseen = [unseen[i] for i in order[: options.images].tolist()]
    pixels = load_pictures(known + unseen, options.shared, options.resolution, options.cache)
    result = {
        "model": SaliencyVitS14.name,
        "measure": "cosine of centred features to those of the unwrapped model, mean over held-out "
        "emoji with 95 % bootstrap intervals; class: the model's output, cells: normed tokens "
        "behind the last block",
        "training_images": len(known),
        "held_out_images": len(unseen),
        "options": {k: v for k, v in vars(options).items() if not isinstance(v, Path)},
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": {},
    }
    for name, (lr, host_lr) in RUNS.items():
        host = SaliencyVitS14(options.shared)
        images = host.prepare(pixels[: len(known)])
        held_out = host.prepare(pixels[len(known) :])
        model = adaptok.wrap(host.model, chunker="dc", budget=0.5)
        for block in model.get_submodule("blocks").children():
            block.requires_grad_(requires_grad=True)
        target = read_features(model, held_out, None)
        before = compare(model, held_out, target)

        def draw(step: int, images: Tensor = images) -> Tensor:
            generator = torch.Generator().manual_seed(step)
            return images[torch.randint(len(images), (options.batch,), generator=generator)]

        def show(step: TuneStep) -> None:
            if step.step % 10 == 0:
                parts = "  ".join(f"{key} {value:.3f}" for key, value in step.parts.items())
                print(f"{step.step}/{step.steps}  keep {step.keep}  {parts}", flush=True)

        started = time.monotonic()
        report = tune(
            model,
            draw,
            steps=options.steps,
            lr=lr,
            budgets=BUDGETS,
            train_host=host_lr is not None,
            host_lr=host_lr or lr,
            seed=SEED,
            on_step=show,
        )
        after = compare(model, held_out, target)
        table = {
            keep: {
                kind: {
                    "untuned": asdict(bootstrap_mean(before[keep][kind], SEED)),
                    "tuned": asdict(bootstrap_mean(after[keep][kind], SEED)),
                    "gain": asdict(
                        bootstrap_difference(after[keep][kind], before[keep][kind], SEED)
                    ),
                }
                for kind in ("class", "cells")
            }
            for keep in before
        }
        result["runs"][name] = {
            "lr": lr,
            "host_lr": host_lr,
            "trained_tensors": len(report.trained),
            "images_seen": options.steps * options.batch,
            "seconds": round(time.monotonic() - started),
            "keep": table,
        }
        for keep, kinds in table.items():
            for kind, row in kinds.items():
                print(
                    name, keep, kind, {key: round(value["mean"], 4) for key, value in row.items()}
                )
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
