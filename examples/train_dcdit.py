"""Train a small DC-DiT on the shipped emoji for a moment, and see its loss fall.

Usage: python examples/train_dcdit.py [--output FOLDER] [--steps 60] [--size 16]

A minute of one CPU core teaches no model to draw: the shipped one took 18 minutes of a GPU. What is
seen here is the whole way: configuration, run folder, resumption, weights that load.
"""

import argparse
from pathlib import Path

import adaptok
from adaptok.see import draw_loss, save_figure
from adaptok.train.config import TrainConfig, fit_model_to_data
from adaptok.train.progress import StepReport
from adaptok.train.trainer import train


def main() -> None:
    """Train, draw the loss, load the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder")
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    parser.add_argument("--size", type=int, default=16, help="edge of an image in pixels")
    options = parser.parse_args()

    config = fit_model_to_data(
        TrainConfig(
            model=adaptok.DCDiTConfig(hidden_size=64, depth=2, num_heads=2, target=4.0),
            data="emoji",
            categories=("Food & Drink", "Animals & Nature"),
            skin_variants=False,
            image_size=options.size,
            space_to_depth=1,
            objective="flow",
            steps=options.steps,
            batch_size=16,
            learning_rate=2e-3,
            learning_rate_warmup=5,
            budget_warmup=options.steps // 2,  # then each step draws one of seven tail drops
            ema_decay=0.9,
            log_every=1,
            checkpoint_every=options.steps,
        ),
        num_classes=2,
    )
    reports: list[StepReport] = []
    run = options.output / "run"
    train(config, run, resume=False, on_step=reports.append)

    first, last = reports[0], reports[-1]
    print(f"{last.step} steps in {last.seconds:.0f} s: loss {first.loss:.2f} -> {last.loss:.2f}")
    model = adaptok.zoo.load_zoo_model(run).model  # the averaged weights, with their card
    weights = sum(p.numel() for p in model.parameters())
    print(f"kept {last.kept:.0%} of the cells in the last step; {weights:,} weights in {run}")
    figure = draw_loss(
        [report.step for report in reports],
        [report.loss for report in reports],
        title=f"Loss of a DC-DiT with {weights:,} weights on {options.size} px emoji",
    )
    print(f"see {save_figure(figure, options.output / 'training.png')}")


if __name__ == "__main__":
    main()
