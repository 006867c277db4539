"""Draw in front of which block emoji leave a real Vision Transformer with trained exits.

Usage: python scripts/draw_exit.py --weights FOLDER [--output docs/pictures/exit.png]

FOLDER holds the weights of a ViT-S/14 that was fine-tuned for saliency. A linear layer of eight
categories is fitted to its class token by least squares, then adapters and heads are trained on
shipped emoji of the training half, thresholds are chosen on others of that half, and emoji of the
test half are drawn (some minutes on a CPU). Nothing of the model itself is trained.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import timm
import torch
from adaptok_exit.calibration import ExitCalibration, calibrate_thresholds
from adaptok_exit.training import ExitTraining, train_exits
from jaxtyping import Float, Int
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import adaptok
from adaptok.errors import AdaptokError, DataError
from adaptok.see.canvas import QUIET, SMALL, TITLE, Canvas, make_canvas, save_figure
from adaptok.train.emoji import decode_emoji, read_emoji_index

Pixels = npt.NDArray[np.uint8]

WEIGHTS = "vit_small_patch14_saliency_fp16.safetensors"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE, BATCH = 98, 32
AGREEMENT = 0.8
BLOCKS = (7, 10)
RIDGE = 1.0
SHOWN, BOX, GAP, MARGIN, HEAD, LABEL = 14, 96, 8, 28, 78, 30


@dataclass(frozen=True, slots=True, eq=False)
class Lessons:
    """Pictures with their categories.

    Args:
        pictures: as they are, `(n h w 3)`.
        images: as the model takes them.
        labels: categories.
    """

    pictures: Pixels
    images: Float[Tensor, "n 3 h w"]
    labels: Int[Tensor, " n"]

    @property
    def batches(self) -> list[Tensor]:
        """The images in batches."""
        return list(self.images.split(BATCH))


def load_emoji(split: str, count: int, start: int = 0) -> Lessons:
    """Return shipped emoji of one half without variants of skin, in an order drawn once."""
    index = read_emoji_index()
    pictures = decode_emoji(index)
    names = list(index.classes)
    rows = [
        (row, names.index(entry.category))
        for row, entry in enumerate(index.entries)
        if entry.split == split and not entry.is_skin_variant
    ]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [rows[place] for place in order[start : start + count]]
    shown = np.stack([pictures[row] for row, _ in chosen])
    large = np.stack(
        [
            np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            for picture in shown
        ]
    )
    x = torch.from_numpy(large).float().permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return Lessons(shown, (x - mean) / std, torch.tensor([label for _, label in chosen]))


def load_model(folder: Path) -> nn.Module:
    """Return the ViT-S/14, without classes."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise DataError(f"{path} is not there: give --weights a folder that holds {WEIGHTS}")
    model: nn.Module = timm.create_model(
        "vit_small_patch14_dinov2", img_size=518, num_classes=0, dynamic_img_size=True
    )
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval()


def fit_classes(model: nn.Module, lessons: Lessons, count: int) -> None:
    """Give a model a linear layer of classes, fitted by least squares."""
    with torch.no_grad():
        features = torch.cat([model(batch) for batch in lessons.batches]).double()
    mean = features.mean(0)
    wanted = nn.functional.one_hot(lessons.labels, count).double()
    centred = features - mean
    scale = centred.square().mean().sqrt()
    gram = centred.T @ centred + RIDGE * scale.square() * len(features) * torch.eye(len(mean))
    weight = torch.linalg.solve(gram, centred.T @ (wanted - wanted.mean(0))).T
    model.reset_classifier(count)  # type: ignore[operator]
    with torch.no_grad():
        # ten times as steep, so that the softmax of what is fitted to 0 and 1 says something
        model.head.weight.copy_(10 * weight)  # type: ignore[union-attr, operator]
        model.head.bias.copy_(10 * (wanted.mean(0) - weight @ mean))  # type: ignore[union-attr, operator]


def judge_all(model: nn.Module, lessons: Lessons) -> tuple[list[int], Tensor]:
    """Return the block in front of which each image leaves, and its class."""
    depths: list[int] = []
    classes: list[Tensor] = []
    with adaptok.trace(model) as seen, torch.no_grad():
        classes += [model(batch).argmax(1) for batch in lessons.batches]
    for step in seen.steps:
        assert step.depths is not None
        depths += step.depths.tolist()
    return depths, torch.cat(classes)


def draw(lessons: Lessons, depths: list[int], head: list[str]) -> Canvas:
    """Draw a row of pictures for each depth."""
    levels = sorted(set(depths))
    row = LABEL + BOX + 2 * GAP
    canvas = make_canvas(
        2 * MARGIN + SHOWN * (BOX + GAP) - GAP, HEAD + len(levels) * row + MARGIN - 2 * GAP
    )
    canvas.text(MARGIN, 16, head[0], size=TITLE, bold=True)
    canvas.text(MARGIN, 44, head[1], size=SMALL, colour=QUIET)
    for number, level in enumerate(levels):
        top = HEAD + number * row
        places = [place for place, depth in enumerate(depths) if depth == level]
        what = "ran all blocks" if level == max(levels) else f"left in front of block {level}"
        canvas.text(MARGIN, top, f"{what}: {len(places)} of {len(depths)}", bold=True)
        for column, place in enumerate(places[:SHOWN]):
            left = MARGIN + column * (BOX + GAP)
            canvas.image(left, top + LABEL, (BOX, BOX), lessons.pictures[place])
    return canvas


def describe(
    training: ExitTraining, made: ExitCalibration, depths: list[int], agreed: float, right: float
) -> list[str]:
    """Return the title and the line under it."""
    print(training)
    print(made)
    left = sum(depth < max(depths) for depth in depths) / len(depths)
    return [
        "In front of which block emoji leave a ViT-S/14 (12 blocks, exits trained on other emoji)",
        f"{left:.0%} leave early; {agreed:.0%} of those get the class that all blocks give them "
        f"(promised {AGREEMENT:.0%}, thresholds from other pictures); {right:.0%} of all do",
    ]


def main() -> int:
    """Train, calibrate, draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="folder of the real weights")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures/exit.png"))
    parser.add_argument("--train", type=int, default=480, help="pictures to train on")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    try:
        model = load_model(options.weights)
        lessons = load_emoji("train", options.train)
        fit_classes(model, lessons, len(read_emoji_index().classes))
        adaptok.wrap(model, stack=[{"name": "exit", "blocks": BLOCKS}])
        training = train_exits(model, lessons.batches, epochs=options.epochs, keep=True)
        others = load_emoji("train", 500, start=options.train)
        drawn = load_emoji("test", 200)
        made = calibrate_thresholds(model, others.batches, AGREEMENT, held_out=drawn.batches)
        _, full = judge_all(model, drawn)
        print("accuracy of all blocks", float((full == drawn.labels).float().mean()))
        made.apply(model)
        depths, early = judge_all(model, drawn)
        print("accuracy with exits", float((early == drawn.labels).float().mean()))
        gone = torch.tensor(depths) < 12
        agreed = float((early == full)[gone].float().mean())
        head = describe(training, made, depths, agreed, float((early == full).float().mean()))
        save_figure(draw(drawn, depths, head).figure, options.output)
    except AdaptokError as error:
        print(f"draw_exit: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
