"""Claim: what the DC-DiT paper reports of its parts can be looked for on a small real data set.

Trains, at equal operations, DC-DiT, its three ablations (one budget in training, cosine router, no
smoothing) and fixed patches of 2 and 4, on emoji of 32 px cut into 16 x 16 cells. Samples of equal
seeds and labels are compared in pairs. Steps, each resumes where it stopped:

    python benchmarks/effects.py train     # an hour or two of CPU time
    python benchmarks/effects.py sample
    python benchmarks/effects.py tables --output benchmarks/results/effects.json
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from effect_runs.variants import (
    BASELINE,
    FULL,
    VARIANTS,
    Size,
    Variant,
    count_step,
    count_steps,
    make_model_config,
    make_run,
    name_folder,
)
from emoji_knn.intervals import bootstrap_mean
from safetensors.torch import load_file, save_file
from timing import describe_machine
from torch import Tensor

from adaptok import DCDiT, DCDiTConfig
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DiTConfig
from adaptok.diffusion import Samples, make_objective, sample
from adaptok.measure import (
    compare_pairs,
    count_flops,
    extract_features,
    load_extractor,
    measure_floor,
    measure_interleaved,
)
from adaptok.train.data import ImageSet, load_emoji
from adaptok.train.pixels import depth_to_space, to_uint8
from adaptok.train.trainer import train
from adaptok.zoo.models import load_zoo_model

EXTRACTOR = Path(__file__).parents[2] / "shared" / "weights" / "efficientnet_lite0.safetensors"
STEPS = 20  # of the Euler walk
TIMED = 8  # images of a walk that is timed


def load_images(size: Size, split: Any = "train") -> ImageSet:
    """Return the images that the runs see, or those held out."""
    return load_emoji(size=size.image_size, skin_variants=False, split=split)


def run_train(options: argparse.Namespace) -> None:
    """Train what is not trained yet."""
    size = Size(steps=options.steps)
    for seed in range(options.seeds):
        for variant in choose(options):
            folder = name_folder(options.cache, variant, seed)
            config, start = make_run(variant, size, seed), time.perf_counter()

            def note(report: Any, name: str = variant.name) -> None:
                if report.step % 500 == 0:
                    print(
                        f"{name}: {report.step}: loss {report.loss:.4f}, kept {report.kept:.2f}",
                        flush=True,
                    )

            done = train(config, folder, on_step=note)
            print(
                f"{variant.name}, seed {seed}: {done.step} steps, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )


def choose(options: argparse.Namespace) -> list[Variant]:
    """Return the variants that were asked for."""
    return [one for one in VARIANTS if not options.only or one.name in options.only]


def run_sample(options: argparse.Namespace) -> None:
    """Draw from every run at each of its budgets; features and kept counts are kept."""
    size, extractor = Size(steps=options.steps), load_extractor("efficientnet-lite0", EXTRACTOR)
    known = load_images(size).labels.numpy()
    for seed in range(options.seeds):
        labels = [int(one) for one in np.random.default_rng(seed).choice(known, options.count)]
        for variant in choose(options):
            trained = load_zoo_model(name_folder(options.cache, variant, seed))
            for drop in variant.budgets:
                path = name_samples(options, variant, seed, drop)
                if path.exists():
                    continue
                images, kept = [], []
                for first in range(0, options.count, options.batch):
                    places = range(first, min(first + options.batch, options.count))
                    drawn = walk(
                        trained.model,
                        [labels[place] for place in places],
                        [10_000 * seed + place for place in places],
                        drop,
                        trace=True,
                    )
                    images.append(to_uint8(depth_to_space(drawn.latents, size.space_to_depth)))
                    if drawn.steps[0].kept is not None:
                        kept.append(
                            torch.stack([s.kept for s in drawn.steps if s.kept is not None])
                        )
                features = extract_features(extractor, torch.cat(images).split(64))
                found = {"features": features, "images": torch.cat(images)[:16].contiguous()}
                if kept:
                    found["kept"] = torch.cat(kept, dim=1).T.contiguous()
                save_file(found, path)
                print(f"{variant.name}, seed {seed}, drop {drop:g}", flush=True)


def name_samples(options: argparse.Namespace, variant: Variant, seed: int, drop: float) -> Path:
    """Return where the samples of a run lie."""
    folder = name_folder(options.cache, variant, seed)
    return folder / f"samples-{drop:g}-{options.count}.safetensors"


def read_samples(options: argparse.Namespace, variant: Variant, drop: float) -> dict[str, Tensor]:
    """Return the samples of all seeds."""
    parts = [load_file(name_samples(options, variant, seed, drop)) for seed in range(options.seeds)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def walk(
    model: DCDiT | DiT, labels: list[int], seeds: list[int], drop: float, *, trace: bool = False
) -> Samples:
    """Draw images, all runs and budgets alike."""
    return sample(
        model, labels, objective=make_objective("flow"), scheduler="flow-euler", steps=STEPS,
        seed=seeds, clip=1.0, trace=trace, **({"drop": drop} if drop else {}),
    )  # fmt: skip


def time_models(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time whole walks of every model and budget in turns; of one image, and one step of it."""
    labels, seeds, calls = [place % 8 for place in range(TIMED)], list(range(TIMED)), {}
    for variant in choose(options):
        model = load_zoo_model(name_folder(options.cache, variant, 0)).model
        for drop in variant.budgets:
            calls[f"{variant.name} {drop:g}"] = lambda m=model, d=drop: walk(m, labels, seeds, d)
    found = measure_interleaved(
        calls, repeats=options.repeats, warmup=1, device=torch.device("cpu")
    )
    return {
        name: {
            "ms": timing.median_ms / TIMED / STEPS,
            "ms_low": timing.first_ms / TIMED / STEPS,
            "ms_high": timing.third_ms / TIMED / STEPS,
        }
        for name, timing in found.items()
    }


def count_passes(config: DCDiTConfig | DiTConfig, size: Size, kept: Tensor | None) -> float:
    """Return the operations of one pass of one image, the mean over what the samples kept."""
    if kept is None:
        return count_step(config, size)
    counts = kept.flatten().tolist()
    return float(count_flops(config, (size.side, size.side), counts)) / len(counts)


def run_tables(options: argparse.Namespace) -> None:
    """Compare all runs with DC-DiT and with patch 2, pair by pair."""
    size, extractor = Size(steps=options.steps), load_extractor("efficientnet-lite0", EXTRACTOR)
    real = extract_features(extractor, load_images(size).images.split(64))
    held_out = extract_features(extractor, load_images(size, "test").images.split(64))
    by_name = {variant.name: variant for variant in VARIANTS}
    against = {name: read_samples(options, by_name[name], 0.0)["features"]
               for name in (FULL, BASELINE)}  # fmt: skip
    times, rows = time_models(options), {}
    for variant in choose(options):
        config = make_model_config(variant, size)
        for drop in variant.budgets:
            found = read_samples(options, variant, drop)
            row: dict[str, Any] = {
                "variant": variant.name,
                "drop": drop,
                "steps": count_steps(variant, size),
                "gflops": count_passes(config, size, found.get("kept")) / 1e9,
                **times[f"{variant.name} {drop:g}"],
            }
            for name, features in against.items():
                pairs = compare_pairs(features, found["features"], real)
                key = "full" if name == FULL else "baseline"
                row["kid"] = pairs.second.model_dump()
                row[f"minus_{key}"] = pairs.difference.model_dump()
                row[f"minus_{key}_by_seed"] = [
                    compare_pairs(a, b, real, resamples=2).difference.value
                    for a, b in zip(
                        features.split(options.count),
                        found["features"].split(options.count),
                        strict=True,
                    )
                ]
            if "kept" in found:
                shares = found["kept"].float() / size.side**2
                row["kept_by_step"] = [
                    asdict(bootstrap_mean(shares[:, step], 0, 2000)) for step in range(STEPS)
                ]
                quarter = STEPS // 4
                ratio = shares[:, -quarter:].mean(1) / shares[:, :quarter].mean(1)
                row["tokens"] = asdict(bootstrap_mean(found["kept"].float().mean(1), 0, 2000))
                row["cleanest_over_noisiest"] = asdict(bootstrap_mean(ratio, 0, 2000))
            rows[f"{variant.name} {drop:g}"] = row
    result = {
        "command": f"python benchmarks/effects.py train|sample|tables --steps {options.steps}",
        "machine": describe_machine(torch.device("cpu")),
        "setting": asdict(size) | {
            "seeds": options.seeds, "samples": options.count, "euler_steps": STEPS,
            "timed_images": TIMED, "repeats": options.repeats,
            "train_images": len(real), "held_out_images": len(held_out),
        },
        "held_out": compare_pairs(held_out, held_out, real).first.model_dump(),
        "floor": measure_floor(real).kid.model_dump(),
        "rows": rows,
    }  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("train", "sample", "tables"))
    parser.add_argument("--only", nargs="+", help="variants by name")
    parser.add_argument("--steps", type=int, default=3000, help="training steps of DC-DiT")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant")
    parser.add_argument("--count", type=int, default=512, help="samples of each run and budget")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    folder = Path(tempfile.gettempdir()) / "adaptok-effects"
    parser.add_argument("--cache", type=Path, default=folder)
    parser.add_argument("--output", default="benchmarks/results/effects.json")
    options = parser.parse_args()
    if options.step != "train" and not EXTRACTOR.exists():
        print(f"skipped: {EXTRACTOR.name} is not in the folder `shared` beside the repository")
        return
    {"train": run_train, "sample": run_sample, "tables": run_tables}[options.step](options)


if __name__ == "__main__":
    main()
