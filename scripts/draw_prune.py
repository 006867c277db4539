"""Draw what EViT and DynamicViT keep at each site, on a photograph and on a shipped emoji.

Usage: python scripts/draw_prune.py evit --weights FOLDER [--output docs/pictures/evit.png]
       python scripts/draw_prune.py dynamicvit --weights FOLDER [--steps 150] [--adapter FOLDER]

FOLDER holds the weights of real models: for EViT an image tower of CLIP ViT-B/16, for DynamicViT a
ViT-S/14 fine-tuned for saliency. DynamicViT's predictors are trained first, on shipped emoji and by
distillation, while the model stays as it is (some minutes on a CPU); `--adapter` keeps what was
trained, or takes what was kept. The photograph is Matplotlib's sample image, Grace Hopper (US Navy,
public domain).
"""

import argparse
import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import timm
import torch
from adaptok_prune.distilling import distillation_loss
from adaptok_prune.dynamicvit import DynamicViT
from jaxtyping import Float
from matplotlib.collections import LineCollection
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import adaptok
from adaptok.errors import AdaptokError, DataError
from adaptok.reductions import ReduceEvent
from adaptok.see.canvas import COLOURS, QUIET, SMALL, TITLE, Canvas, make_canvas, save_figure
from adaptok.see.cells import GONE, find_borders, shade_cells
from adaptok.see.specimens import load_emoji, load_photograph
from adaptok.train.emoji import decode_emoji, read_emoji_index

Pixels = npt.NDArray[np.uint8]

CLIP, SALIENCY = "clip_vit_b16_image_int8", "vit_small_patch14_saliency_fp16"
CLIP_COLOURS = ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276))
IMAGENET_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIDE, TRAIN_SIDE, BATCH = 224, 140, 8
BOX, MARGIN, GAP, HEAD, LABEL = 300, 28, 20, 52, 30
VEIL = 0.84
TITLES = {
    "evit": "EViT in CLIP ViT-B/16: grey cells have no token of their own, they are fused",
    "dynamicvit": (
        "DynamicViT in a ViT-S/14 for saliency, predictors trained briefly: grey cells are dropped"
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model with the colours that it was trained on.

    Args:
        model: the model, in eval mode.
        mean: mean of each colour.
        std: its standard deviation.
    """

    model: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def take(self, pictures: Pixels) -> Float[Tensor, "b 3 h w"]:
        """Return pictures, `(b h w 3)`, as the model takes them."""
        x = torch.from_numpy(pictures.copy()).float().permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


def find_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the weights of a file; int8 ones are multiplied out."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise DataError(f"{path} is not there: give --weights a folder that holds {path.name}")
    stored = load_file(path)
    weights = {key: value.float() for key, value in stored.items() if value.dtype != torch.int8}
    for key, value in stored.items():
        if key.endswith(".int8"):
            scale = weights.pop(key.removesuffix("int8") + "scale")
            weights[key.removesuffix(".int8")] = value.float() * scale[:, None]
    return weights


def load_clip(folder: Path) -> Subject:
    """Return the image tower of CLIP ViT-B/16."""
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, patch_size=16
    )
    model = CLIPVisionModelWithProjection(config)
    model.load_state_dict(find_weights(folder, CLIP), strict=False)
    return Subject(model.eval(), *CLIP_COLOURS)


def load_saliency(folder: Path) -> Subject:
    """Return the ViT-S/14."""
    model = timm.create_model(
        "vit_small_patch14_dinov2", img_size=518, num_classes=0, dynamic_img_size=True
    )
    model.load_state_dict(find_weights(folder, SALIENCY))
    return Subject(model.eval(), *IMAGENET_COLOURS)


def resize(picture: Pixels, side: int) -> Pixels:
    """Return a square picture of another size."""
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))


def load_pictures(name: str) -> dict[str, Pixels]:
    """Return a photograph, and the shipped emoji of a name."""
    return {
        "a photograph": resize(load_photograph(), SIDE),
        name: resize(load_emoji([name])[0], SIDE),
    }


def load_lessons() -> Pixels:
    """Return the emoji of the training half, without variants of skin."""
    index = read_emoji_index()
    pictures = decode_emoji(index)
    chosen = [
        resize(picture, TRAIN_SIDE)
        for picture, entry in zip(pictures, index.entries, strict=True)
        if entry.split == "train" and not entry.is_skin_variant
    ]
    return np.stack(chosen)


def train_predictors(subject: Subject, steps: int) -> None:
    """Train the predictors of a wrapped model to leave its tokens as they were."""
    teacher = adaptok.unwrap(copy.deepcopy(subject.model))
    (stage,) = (m for m in subject.model.modules() if isinstance(m, DynamicViT))
    subject.model.requires_grad_(False)
    stage.requires_grad_(True)
    stage.train()
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-3)
    lessons = load_lessons()
    for step in range(steps):
        x = subject.take(lessons[torch.randint(len(lessons), (BATCH,)).numpy()])
        with torch.no_grad():
            wanted = teacher.forward_features(x)  # type: ignore[operator]
        with adaptok.collect_losses(subject.model) as losses, stage.collect_masks() as masks:
            found = subject.model.forward_features(x)  # type: ignore[operator]
        loss = distillation_loss(
            found[:, 0], wanted[:, 0], found[:, 1:], wanted[:, 1:], masks[-1], logit_weight=0.0
        )
        loss = loss + 0.5 * ((found[:, 0] - wanted[:, 0]) ** 2).mean() + losses["ratio"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            shares = ", ".join(f"{mask.mean().item():.2f}" for mask in masks)
            print(f"step {step}: loss {loss.item():.4f}, kept {shares}", flush=True)
    stage.eval()


def run(subject: Subject, picture: Pixels) -> tuple[ReduceEvent, ...]:
    """Return what was decided at each site."""
    with adaptok.trace(subject.model) as seen, torch.no_grad():
        subject.model(subject.take(picture[None]))
    events: tuple[ReduceEvent, ...] = seen.steps[0].plans[0].events  # type: ignore[attr-defined]
    return events


def paint(picture: Pixels, keep: npt.NDArray[np.bool_]) -> Pixels:
    """Fade the cells of a picture whose token has gone."""
    return shade_cells(picture, keep, GONE, VEIL)


def draw_site(canvas: Canvas, left: int, top: int, picture: Pixels, event: ReduceEvent) -> None:
    """Draw what is left of a picture behind a site."""
    owner = event.owner[0]
    side = round(len(owner) ** 0.5)
    (count,) = event.counts
    sizes = torch.bincount(owner[owner >= 0], minlength=count)
    # a fused token lives on at later sites, so that there may be several
    own = (owner >= 0) & (sizes[owner.clamp(min=0)] == 1)
    keep = own.view(side, side).numpy()
    fused = int((sizes > 1).sum())
    said = f"{count - fused} tokens" + (f" and {fused} fused" if fused else "")
    canvas.text(left, top, f"block {event.site.block}", bold=True)
    canvas.text(left + BOX, top + 3, said, size=SMALL, colour=QUIET, align="right")
    axes = canvas.image(left, top + LABEL, (BOX, BOX), paint(picture, keep))
    lines = find_borders(keep) * (len(picture) / side) - 0.5
    axes.add_collection(LineCollection(list(lines), colors=COLOURS[0], linewidths=1.0))


def draw(subject: Subject, title: str, pictures: dict[str, Pixels]) -> Canvas:
    """Draw one row for each picture: as it is, and behind each site."""
    found = {name: run(subject, picture) for name, picture in pictures.items()}
    columns = 1 + max(map(len, found.values()))
    row = LABEL + BOX + GAP
    canvas = make_canvas(
        2 * MARGIN + columns * BOX + (columns - 1) * GAP, HEAD + len(pictures) * row + MARGIN - GAP
    )
    canvas.text(MARGIN, 16, title, size=TITLE, bold=True)
    for number, (name, events) in enumerate(found.items()):
        top = HEAD + number * row
        cells = events[0].owner.shape[1]
        canvas.text(MARGIN, top, f"{name}, {cells} cells", bold=True)
        canvas.image(MARGIN, top + LABEL, (BOX, BOX), pictures[name])
        for site, event in enumerate(events, start=1):
            draw_site(canvas, MARGIN + site * (BOX + GAP), top, pictures[name], event)
    return canvas


def prepare(options: argparse.Namespace) -> tuple[Subject, str]:
    """Load a model, wrap it, and train what needs training."""
    if options.method == "evit":
        subject = load_clip(options.weights)
        adaptok.wrap(subject.model, stack=["evit"])
        return (
            subject,
            "EViT in CLIP ViT-B/16: grey cells have no token of their own, they are fused",
        )
    subject = load_saliency(options.weights)
    if options.adapter and (options.adapter / "adaptok.json").is_file():
        adaptok.load(subject.model, options.adapter)
        return subject, TITLES["dynamicvit"]
    adaptok.wrap(subject.model, stack=["dynamicvit"])
    train_predictors(subject, options.steps)
    if options.adapter:
        adaptok.save(subject.model, options.adapter)
    return subject, TITLES["dynamicvit"]


def main() -> int:
    """Draw and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=("evit", "dynamicvit"))
    parser.add_argument("--weights", type=Path, required=True, help="folder of the real weights")
    parser.add_argument("--output", type=Path, help="docs/pictures/METHOD.png unless given")
    parser.add_argument("--name", default="parrot", help="name of a shipped emoji")
    parser.add_argument("--steps", type=int, default=150, help="training steps of the predictors")
    parser.add_argument("--adapter", type=Path, help="folder of trained predictors")
    options = parser.parse_args()
    torch.manual_seed(0)
    try:
        subject, title = prepare(options)
        pictures = load_pictures(options.name)
        output = options.output or Path("docs/pictures") / f"{options.method}.png"
        save_figure(draw(subject, title, pictures).figure, output)
    except AdaptokError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
