"""What do fewer tokens cost? The shipped model under several budgets, in tokens, FLOPs and ms.

Usage: python examples/compare_budgets.py [--output FOLDER] [--count 4] [--repeats 3]

Emoji are noised by half, and the model is asked once for the clean image. How close it comes is the
quality: `drop` leaves the counts to the router, image by image, `keep` gives every image the same.
They are emoji that it was trained on. It is small and knows them by heart; with --split test, on
those that it never saw, fewer tokens are not worse, since the motif is wrong under every budget.
"""

import argparse
import math
from pathlib import Path

import torch

import adaptok
from adaptok.diffusion import make_objective
from adaptok.see import CostCurve, CostPoint, save_figure, show_budgets
from adaptok.train.data import load_emoji
from adaptok.train.pixels import space_to_depth, to_latent

BUDGETS = [{"drop": drop} for drop in (0.0, 0.3, 0.6, 0.85)]
BUDGETS += [{"keep": keep} for keep in (0.25, 0.17, 0.1, 0.04)]
NAMES = {"drop": "drop= (counts differ)", "keep": "keep= (equal counts)"}


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder")
    parser.add_argument("--count", type=int, default=4, help="emoji in the batch")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="which emoji")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    options = parser.parse_args()

    trained = adaptok.zoo.load_zoo_model("dcdit-emoji32")
    model, card = trained.model, trained.card
    objective = make_objective(card.objective)
    emoji = load_emoji(size=card.image_size, split=options.split, skin_variants=False)
    chosen = torch.linspace(0, len(emoji) - 1, options.count).long()
    clean = space_to_depth(to_latent(emoji.take(chosen)), card.space_to_depth)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((options.count,), 0.5)
    x = objective.noisy(clean, noise, t)
    inputs = (x, objective.model_time(t), emoji.labels[chosen])

    report = adaptok.benchmark(model, inputs, BUDGETS, repeats=options.repeats, warmup=0)
    points: dict[str, list[CostPoint]] = {name: [] for name in NAMES}
    for row, budget in zip(report.rows, BUDGETS, strict=True):
        with torch.inference_mode():
            found = objective.predict_x0(model(*inputs, **budget), x, t).clamp(-1, 1)
        psnr = -10 * math.log10(float((found - clean).square().mean()) / 4)
        cost = (row.computed.mean, row.gflops / options.count, row.ms / options.count)
        points[next(iter(budget))].append(CostPoint(row.name, *cost, psnr))
    for found_points in points.values():
        first, last = found_points[0], found_points[-1]
        print(
            f"{first.name} -> {last.name}: {first.tokens:.0f} -> {last.tokens:.0f} tokens, "
            f"{first.ms:.0f} -> {last.ms:.0f} ms, {first.value:.1f} -> {last.value:.1f} dB"
        )
    figure = show_budgets(
        [CostCurve(NAMES[kind], tuple(found)) for kind, found in points.items()],
        quality="PSNR of the clean image in dB",
        title=f"{options.count} emoji denoised under two kinds of budget",
        note=f"one image of a batch of {options.count}, {report.machine.name}, medians",
    )
    print(f"see {save_figure(figure, options.output / 'budgets.png')}")


if __name__ == "__main__":
    main()
