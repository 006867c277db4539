"""Draw which heads and channel groups a shortly trained tiny DiT runs at each step.

Usage: python scripts/draw_width.py [--steps 400] [--host-steps 250] [--output FILE]

A tiny DiT is trained on shipped emoji, then wrapped by `stack=["width"]` and trained on, with the
three losses of DyDiT, to run half of its operations. Some minutes on a CPU.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from adaptok_width import DynamicWidth, count_ratio, find_stage, training_losses
from adaptok_width.masks import StepMasks
from jaxtyping import Float
from matplotlib.colors import ListedColormap
from matplotlib.ticker import FixedLocator
from torch import Tensor, nn

import adaptok
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DiTConfig
from adaptok.diffusion.objective import HybridObjective
from adaptok.errors import AdaptokError
from adaptok.see.canvas import COLOURS, QUIET, SMALL, TITLE, Canvas, make_canvas, save_figure
from adaptok.train.data import load_emoji

CONFIG = {"hidden_size": 128, "depth": 5, "num_heads": 8, "patch_size": 2, "in_channels": 3}
SIDE, BATCH, TARGET, SHOWN = 16, 16, 0.5, 50
MARGIN, HEAD, LABEL, WIDE, TALL, GAP, LOW = 84, 84, 24, 440, 230, 100, 150


class Lessons:
    """Noisy emoji, and the loss of a model on them.

    Args:
        model: the model.
    """

    def __init__(self, model: DiT) -> None:
        emoji = load_emoji(size=SIDE, skin_variants=False)
        self.pictures = torch.stack([emoji[number] for number in range(len(emoji))])
        self.labels = emoji.labels
        self.model = model
        self.objective = HybridObjective()

    def draw(self) -> Callable[[], Tensor]:
        """Draw a batch, and return what computes the loss on it."""
        chosen = torch.randint(len(self.pictures), (BATCH,))
        x0, y = self.pictures[chosen].float(), self.labels[chosen]
        # times in equal parts of the scale: the routers look at nothing else
        t = self.objective.times((torch.arange(BATCH) + torch.rand(BATCH)) / BATCH)
        noise = torch.randn_like(x0)
        noisy = self.objective.noisy(x0, noise, t)

        def compute() -> Tensor:
            out = self.model(noisy, self.objective.model_time(t), y)
            assert isinstance(out, Tensor)
            return self.objective.loss(out, x0, noise, t).total.mean()

        return compute


def train_width(options: argparse.Namespace) -> tuple[DiT, DynamicWidth, Lessons]:
    """Train a tiny model whole, and then to run on a part of its width."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(**CONFIG, latent_size=SIDE, num_classes=9))
    lessons = Lessons(model)
    train(list(model.parameters()), 1e-3, [], options.host_steps, lambda _: lessons.draw()())
    adaptok.wrap(model, stack=[{"name": "width", "target": TARGET}])
    stage = find_stage(model)
    model.train()

    def step(number: int) -> Tensor:
        stage.anneal(number, options.steps // 2)
        losses = training_losses(model, lessons.draw())
        return losses["dynamic"] + losses["complete"] + losses["width"]

    routers = set(stage.parameters())
    host = [p for p in model.parameters() if p not in routers]
    train(host, 2e-4, list(routers), options.steps, step)
    return model.eval(), stage, lessons


def train(
    host: list[nn.Parameter],
    rate: float,
    routers: list[nn.Parameter],
    steps: int,
    step: Callable[[int], Tensor],
) -> None:
    """Train a host, and routers fast, on whatever a step returns."""
    groups = [{"params": host, "lr": rate}, {"params": routers, "lr": 2e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for number in range(steps):
        loss = step(number)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(host, 1.0)
        optimizer.step()
        if number % 100 == 0 or number + 1 == steps:
            print(f"step {number}: {float(loss.detach()):.4f}", flush=True)


@torch.no_grad()
def measure_tokens(
    model: DiT, stage: DynamicWidth, lessons: Lessons, times: list[float]
) -> Float[Tensor, " steps"]:
    """Return the mean share of operations at each step, tokens that skip the MLP included."""
    target, stage.current_target = stage.current_target, 0.0  # the loss is 2 ratio^2
    shares = []
    x0, y = lessons.pictures[:64].float(), lessons.labels[:64]
    for time in times:
        t = torch.full((64,), int(time))
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        with adaptok.collect_losses(model) as losses:
            model(lessons.objective.noisy(x0, noise, t), t.float(), y)
        shares.append(float(losses["width"] / 2) ** 0.5)
    stage.current_target = target
    return torch.tensor(shares)


def label_steps(axes: Any, steps: int) -> None:  # noqa: ANN401 - matplotlib has no types
    """Write the first, the middle and the last step below axes, inside their width."""
    labels = ["t = 999, noise", "t = 500", "t = 0, image"]
    axes.set_xticks([0, steps // 2, steps - 1], labels)
    for text, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
        text.set_ha(side)


def draw_masks(
    canvas: Canvas, place: tuple[int, int], title: str, mask: npt.NDArray[np.bool_], colour: str
) -> None:
    """Draw which parts run: a row for each part, blocks below each other, steps along x.

    Args:
        canvas: where.
        place: left and upper edge.
        title: what it is.
        mask: `(steps blocks parts)`, noise first.
        colour: of what runs.
    """
    left, top = place
    steps, blocks, parts = mask.shape
    axes = canvas.axes(left, top, WIDE, TALL)
    rows = np.zeros((blocks * (parts + 1) - 1, steps))
    rows[:] = np.nan
    for block in range(blocks):
        rows[block * (parts + 1) : block * (parts + 1) + parts] = mask[:, block].T
    axes.imshow(
        rows,
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=1,
        cmap=ListedColormap(["#E4E7ED", colour]),
    )
    axes.yaxis.set_major_locator(
        FixedLocator([b * (parts + 1) + parts / 2 - 0.5 for b in range(blocks)])
    )
    axes.set_yticklabels([f"block {b}" for b in range(blocks)])
    label_steps(axes, steps)
    axes.tick_params(labelsize=SMALL, colors=QUIET, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    canvas.text(left, top - LABEL, title, bold=True)


def draw(options: argparse.Namespace) -> None:
    """Train, draw and save."""
    model, stage, lessons = train_width(options)
    times = [float(t) for t in np.linspace(999, 0, SHOWN).round()]
    masks: StepMasks = stage.tabulate(times)
    shares = measure_tokens(model, stage, lessons, times)
    heads, groups = masks.heads.float().mean(2), masks.groups.float().mean(2)
    without = count_ratio(
        heads, groups, torch.ones_like(heads), count=(SIDE // 2) ** 2, width=128, hidden=512
    ).mean(1)
    print(
        f"share of operations {shares.mean():.3f}, without skipping tokens {without.mean():.3f}; "
        f"heads {heads.mean():.3f}, channels {groups.mean():.3f}"
    )
    width = 2 * WIDE + 2 * MARGIN + GAP
    canvas = make_canvas(width, HEAD + TALL + 2 * LABEL + 40 + LOW + 40)
    title = "What a tiny DiT runs at each step, trained briefly towards one half"
    canvas.text(MARGIN, 14, title, size=TITLE, bold=True)
    kinds = (
        (MARGIN, "Heads (coloured: runs)", masks.heads, COLOURS[0]),
        (
            MARGIN + WIDE + GAP,
            "Channel groups (coloured: runs)",
            masks.groups,
            COLOURS[1],
        ),
    )
    for left, label, mask, colour in kinds:
        draw_masks(canvas, (left, HEAD), label, mask.numpy(), colour)
    top = HEAD + TALL + 2 * LABEL + 40
    axes = canvas.axes(MARGIN, top, 2 * WIDE + GAP, LOW)
    axes.plot(shares, color=COLOURS[2], lw=1.8, label="with tokens that skip the MLP")
    axes.plot(without, color=COLOURS[3], lw=1.8, ls="--", label="heads and channels alone")
    axes.axhline(TARGET, color=QUIET, lw=0.8, ls=":")
    axes.set_ylim(0, 1.5)
    axes.set_yticks([0, 0.5, 1])
    axes.set_xlim(0, SHOWN - 1)
    label_steps(axes, SHOWN)
    axes.tick_params(labelsize=SMALL, colors=QUIET, length=2)
    axes.legend(fontsize=SMALL, frameon=False, loc="upper left", ncols=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    canvas.text(
        MARGIN, top - LABEL, "Share of the operations of the blocks (dotted: target)", bold=True
    )
    print(save_figure(canvas.figure, options.output))


def main() -> int:
    """Read the arguments, draw, and return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--host-steps", type=int, default=250)
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/dydit.png"))
    try:
        draw(parser.parse_args())
    except AdaptokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
