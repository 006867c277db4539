"""Claim: the shipped model draws emoji that can be told apart, and spends its tokens late.

Four questions: do 64 uncurated samples of consecutive seeds show their class (CLIP k-NN, always
8-way, references shrunk like the samples, held-out real images beside it); how far are samples
from the training images (KID-EffLite0, with the floor of held-out images); how many more cells are
kept at the cleanest quarter of the way than at the noisiest; how near is each sample to a training
image. The picture shows every sample beside its nearest training image.

    python benchmarks/shipped_model.py draw   # an hour of CPU time, cached
    python benchmarks/shipped_model.py judge --output benchmarks/results/shipped-model.json
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from combined.fitting import Subject
from einops import rearrange
from emoji_knn.intervals import bootstrap_mean
from emoji_knn.models import MODELS
from emoji_knn.neighbours import match_labels
from safetensors.torch import load_file, save_file
from timing import describe_machine
from torch import Tensor

from adaptok.diffusion import make_objective, sample
from adaptok.measure import compare_features, extract_features, load_extractor, measure_floor
from adaptok.train.data import ImageSet, load_emoji
from adaptok.train.pixels import depth_to_space, to_uint8

SHARED = Path(__file__).parents[2] / "shared"
EXTRACTOR = SHARED / "weights" / "efficientnet_lite0.safetensors"
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "shipped-samples.png"
SHOWN = 64
CLASSES = 8


def list_labels(count: int, seed: int = 0) -> list[int]:
    """Return the classes of the samples: the first 64 in turn, the others as often as in training.

    Args:
        count: samples in all.
        seed: of the draw.
    """
    first = [place % CLASSES for place in range(min(count, SHOWN))]
    known = load_emoji(size=32).labels.numpy()
    rest = np.random.default_rng(seed).choice(known, max(0, count - SHOWN))
    return [*first, *(int(label) for label in rest)]


def run_draw(options: argparse.Namespace) -> None:
    """Draw samples of consecutive seeds, with what was kept in each step."""
    subject = Subject.load(options.model, options.steps)
    card = subject.trained.card
    options.cache.mkdir(parents=True, exist_ok=True)
    labels = list_labels(options.count)
    for first in range(0, options.count, options.batch):
        places = range(first, min(first + options.batch, options.count))
        path = name_part(options, first)
        if path.exists():
            continue
        drawn = sample(
            subject.model, [labels[place] for place in places],
            objective=make_objective(card.objective), scheduler="flow-euler", steps=options.steps,
            seed=list(places), guidance_scale=options.guidance, guided_channels=3, clip=1.0,
            trace=True,
        )  # fmt: skip
        images = to_uint8(depth_to_space(drawn.latents, card.space_to_depth))
        kept = torch.stack([step.kept for step in drawn.steps], dim=1)
        save_file({"images": images.contiguous(), "kept": kept}, path)
        print(f"{places.stop} of {options.count}", flush=True)


def name_part(options: argparse.Namespace, first: int) -> Path:
    """Return where a batch is kept."""
    name = f"{options.steps}-{options.guidance:g}-{first}-{options.batch}.safetensors"
    return Path(options.cache) / name


def read_drawn(options: argparse.Namespace) -> dict[str, Tensor]:
    """Return everything that was drawn."""
    firsts = range(0, options.count, options.batch)
    parts = [load_file(name_part(options, first)) for first in firsts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def choose_balanced(images: ImageSet, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return as many images of each class, and their classes."""
    generator, picked = np.random.default_rng(seed), []
    for label in range(CLASSES):
        members = (images.labels == label).nonzero()[:, 0].numpy()
        picked.append(generator.permutation(members)[:count])
    places = torch.from_numpy(np.concatenate(picked))
    return images.take(places), images.labels[places]


def judge_classes(samples: Tensor, labels: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Classify samples and held-out images by CLIP and the training images nearest to them."""
    host = MODELS["clip"](SHARED)

    def embed(images: Tensor) -> Tensor:
        large = torch.nn.functional.interpolate(
            images.float(), (host.resolution,) * 2, mode="bicubic", antialias=True
        )
        pixels = rearrange(large.clamp(0, 255).round().to(torch.uint8), "b c h w -> b h w c")
        with torch.inference_mode():
            parts = [host.extract(host.prepare(part.numpy())) for part in pixels.split(16)]
        return torch.cat(parts)

    plain = {"size": 32, "skin_variants": False}
    known, known_labels = choose_balanced(load_emoji(split="train", **plain), options.references)
    other, other_labels = choose_balanced(load_emoji(split="test", **plain), options.held_out)
    references = embed(known)
    found = {}
    for name, images, truth in (
        ("samples", samples, labels),
        ("held_out", other, other_labels),
    ):
        hits = match_labels(embed(images), truth, references, known_labels, 5).float()
        by_class = [float(hits[truth == label].mean()) for label in range(CLASSES)]
        found[name] = {
            "count": len(hits),
            "accuracy": asdict(bootstrap_mean(hits, 0)),
            "by_class": by_class,
        }
    return {**found, "references": len(known), "k": 5}


def find_nearest(samples: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the training image nearest to each sample, and its distance in grey levels."""
    far = torch.cdist(samples.flatten(1).float(), images.flatten(1).float())
    distance, place = far.min(1)
    return place, distance / samples[0].numel() ** 0.5


def share_of_quarters(kept: Tensor, cells: int) -> dict[str, Any]:
    """Return the kept share in each quarter of the way, the noisiest first."""
    quarters = [part.float().mean(1) / cells for part in kept.chunk(4, dim=1)]
    ratio = quarters[-1] / quarters[0]
    return {
        "kept_by_quarter": [asdict(bootstrap_mean(part, 0)) for part in quarters],
        "cleanest_over_noisiest": asdict(bootstrap_mean(ratio, 0)),
    }


def draw_pairs(samples: Tensor, nearest: Tensor, title: str) -> None:
    """Draw every sample beside its nearest training image."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = 8
    figure, axes = plt.subplots(8, columns, figsize=(11, 6.6))
    for place, axis in enumerate(axes.flat):
        gap = torch.full((3, 32, 2), 255, dtype=torch.uint8)
        pair = torch.cat([samples[place], gap, nearest[place]], dim=2)
        axis.imshow(pair.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_axis_off()
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.93, wspace=0.06, hspace=0.04)
    figure.savefig(PICTURE, dpi=130)


def run_judge(options: argparse.Namespace) -> None:
    """Answer the four questions from what was drawn."""
    drawn, labels = read_drawn(options), torch.tensor(list_labels(options.count))
    train, test = load_emoji(size=32), load_emoji(size=32, split="test")
    extractor = load_extractor("efficientnet-lite0", EXTRACTOR)
    features = {
        name: extract_features(extractor, images.split(64))
        for name, images in (
            ("train", train.images), ("test", test.images), ("samples", drawn["images"][SHOWN:]),
        )
    }  # fmt: skip
    distances = compare_features(features["samples"], features["train"])
    held_out = compare_features(features["test"], features["train"])
    place, far = find_nearest(drawn["images"], train.images)
    _, usual = find_nearest(test.images, train.images)
    shown = drawn["images"][:SHOWN]
    draw_pairs(
        shown, train.images[place[:SHOWN]],
        f"Seeds 0 to 63, uncurated (left), and the training image nearest in pixels (right); "
        f"{options.steps} Euler steps, guidance {options.guidance:g}",
    )  # fmt: skip
    result = {
        "command": "python benchmarks/shipped_model.py draw|judge",
        "machine": describe_machine(torch.device("cpu")),
        "setting": {
            "model": options.model, "steps": options.steps, "guidance": options.guidance,
            "drop": 0.0, "shown": SHOWN, "samples": options.count - SHOWN,
            "train": len(train), "test": len(test),
        },
        "classes": judge_classes(shown, labels[:SHOWN], options),
        "kid": distances.kid.model_dump(),
        "frechet": distances.frechet.model_dump(),
        "held_out_kid": held_out.kid.model_dump(),
        "held_out_frechet": held_out.frechet.model_dump(),
        "floor": measure_floor(features["train"]).kid.model_dump(),
        **share_of_quarters(drawn["kept"], 32 * 32),
        "nearest": {
            "samples_rms": asdict(bootstrap_mean(far, 0)),
            "held_out_rms": asdict(bootstrap_mean(usual, 0)),
            "nearer_than_half_of_held_out": float((far < usual.median()).float().mean()),
        },
    }  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("draw", "judge"))
    parser.add_argument("--model", default="dcdit-emoji32", help="a shipped model, or a folder")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--count", type=int, default=SHOWN + 256, help="samples in all")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--references", type=int, default=40, help="of each class")
    parser.add_argument("--held-out", type=int, default=20, help="of each class")
    folder = Path(tempfile.gettempdir()) / "adaptok-shipped"
    parser.add_argument("--cache", type=Path, default=folder)
    parser.add_argument("--output", default="benchmarks/results/shipped-model.json")
    options = parser.parse_args()
    if options.step == "judge" and not EXTRACTOR.exists():
        print(f"skipped: {EXTRACTOR.name} is not in the folder `shared` beside the repository")
        return
    {"draw": run_draw, "judge": run_judge}[options.step](options)


if __name__ == "__main__":
    main()
