"""Claim: other dynamic methods stack with DC-DiT, and what each of them is worth on real samples.

The shipped model draws the same seeds and labels with a second method (or two) around its blocks:
kernel distance to the training images against measured milliseconds, in pairs with plain DC-DiT.
Steps, each resumes where it stopped:

    python benchmarks/combinations.py fit      # polynomial, thresholds, adapters, routers
    python benchmarks/combinations.py sample   # hours of CPU time, cached by combination and seed
    python benchmarks/combinations.py times    # on a quiet machine
    python benchmarks/combinations.py groups   # there, too: what a stage costs that does nothing
    python benchmarks/combinations.py tables --output benchmarks/results/combinations.json
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from combined.fitting import Fitted, Subject, apply, find, fit_exit, fit_teacache, fit_width
from combined.settings import COMBINATIONS, Combination
from safetensors.torch import load_file, save_file
from timing import describe_machine
from torch.utils.flop_counter import FlopCounterMode

import adaptok
from adaptok.measure import (
    compare_pairs,
    extract_features,
    load_extractor,
    measure_floor,
    measure_interleaved,
)
from adaptok.train.data import load_emoji
from adaptok.train.pixels import depth_to_space, to_uint8

SHARED = Path(__file__).parents[2] / "shared"
EXTRACTOR = SHARED / "weights" / "efficientnet_lite0.safetensors"
SEED_STRIDE = 10_000
LOSS = 0.02  # a combination dominates only if its interval excludes a larger loss
WALK = 8  # images of a walk that is timed


def slug(label: str) -> str:
    """Return a label as a file name."""
    return label.replace(" + ", "+").replace(" ", "_")


def draw_labels(seed: int, count: int) -> list[int]:
    """Return classes as often as the training images have them."""
    labels = load_emoji(size=32, categories=None, skin_variants=True).labels.numpy()
    return [int(one) for one in np.random.default_rng(seed).choice(labels, count)]


def run_fit(options: argparse.Namespace) -> None:
    """Fit what has to be fitted, and keep it."""
    found, weights = {}, {}
    for fit, size in ((fit_teacache, 6), (fit_exit, options.batches), (fit_width, options.batches)):
        start = time.perf_counter()
        made: Any = fit(Subject.load(options.model, options.steps), size)
        values, own = made if isinstance(made, tuple) else (made, {})
        found |= values
        weights |= own
        print(f"{fit.__name__}: {time.perf_counter() - start:.0f} s, {values}", flush=True)
    options.cache.mkdir(parents=True, exist_ok=True)
    (options.cache / "fitted.json").write_text(Fitted(**found).to_json(), encoding="utf-8")
    save_file(weights, options.cache / "fitted.safetensors")


def open_subject(options: argparse.Namespace, one: Combination) -> Subject:
    """Return the model with the stages of a combination around its blocks."""
    fitted = Fitted.from_json((options.cache / "fitted.json").read_text(encoding="utf-8"))
    subject = Subject.load(options.model, options.steps)
    apply(subject, one, fitted, load_file(options.cache / "fitted.safetensors"))
    return subject


def budget_of(one: Combination) -> dict[str, float]:
    """Return the budget for the sampler."""
    return {"drop": one.drop} if one.drop else {}


def run_samples(options: argparse.Namespace) -> None:
    """Draw what is not there yet; the features are kept, and the images of the first walk."""
    extractor = load_extractor("efficientnet-lite0", EXTRACTOR)
    for seed in range(options.seeds):
        labels = draw_labels(seed, options.count)
        for one in choose(options):
            path = options.cache / f"{slug(one.label)}-{seed}-{options.count}.safetensors"
            if path.exists():
                continue
            subject, start, parts = open_subject(options, one), time.perf_counter(), []
            for first in range(0, options.count, options.batch):
                places = range(first, min(first + options.batch, options.count))
                latents = subject.draw(
                    [seed * SEED_STRIDE + place for place in places],
                    [labels[place] for place in places],
                    **budget_of(one),
                )
                cell = subject.trained.card.space_to_depth
                parts.append(to_uint8(depth_to_space(latents.cpu(), cell)))
            images = torch.cat(parts)
            features = extract_features(extractor, images.split(64))
            save_file({"features": features, "images": images[:16].contiguous()}, path)
            print(f"seed {seed}: {one.label}: {time.perf_counter() - start:.0f} s", flush=True)


def choose(options: argparse.Namespace) -> list[Combination]:
    """Return the combinations that were asked for."""
    return [one for one in COMBINATIONS if not options.only or one.label in options.only]


def run_times(options: argparse.Namespace) -> None:
    """Time whole walks in turns, and count what they do."""
    seeds = range(800_000, 800_000 + WALK)
    labels = draw_labels(99, WALK)
    subjects = {one.label: (open_subject(options, one), budget_of(one)) for one in COMBINATIONS}
    timings = measure_interleaved(
        {
            label: lambda s=subject, b=budget: s.draw(seeds, labels, **b)
            for label, (subject, budget) in subjects.items()
        },
        repeats=options.repeats,
        warmup=1,
        device=torch.device("cpu"),
    )
    rows = {}
    for one in COMBINATIONS:
        print(f"{one.label}: {timings[one.label].median_ms / WALK:.0f} ms", flush=True)
    for one in COMBINATIONS:
        subject, budget = subjects[one.label]
        with FlopCounterMode(display=False) as counter:
            subject.draw(seeds, labels, **budget)
        rows[one.label] = {
            "ms": timings[one.label].median_ms / WALK,
            "ms_low": timings[one.label].first_ms / WALK,
            "ms_high": timings[one.label].third_ms / WALK,
            "gflops": counter.get_total_flops() / 1e9 / WALK,
            "tokens": count_tokens(subject, one, seeds, labels),
            "computed": count_computed(subject),
        }
        print(f"{one.label}: {rows[one.label]}", flush=True)
    result = {"machine": describe_machine(torch.device("cpu")), "walk": WALK, "rows": rows}
    (options.cache / "times.json").write_text(json.dumps(result, indent=2), encoding="utf-8")


def run_groups(options: argparse.Namespace) -> None:
    """Time what it costs that a stage runs samples by their counts: one that does nothing."""
    seeds, labels = range(800_000, 800_000 + WALK), draw_labels(99, WALK)
    plain, idle = (Subject.load(options.model, options.steps) for _ in range(2))
    adaptok.wrap(idle.model, stack=[{"name": "taylorseer", "interval": 1}])
    timings = measure_interleaved(
        {
            f"{name}, {counts}": lambda s=subject, b=budget: s.draw(seeds, labels, **b)
            for name, subject in (("plain", plain), ("idle", idle))
            for counts, budget in (("counts differ", {}), ("one count", {"keep": 0.25}))
        },
        repeats=options.repeats,
        warmup=1,
        device=torch.device("cpu"),
    )
    found = {name: timing.median_ms / WALK for name, timing in timings.items()}
    print(found)
    (options.cache / "groups.json").write_text(json.dumps(found, indent=2), encoding="utf-8")


def count_tokens(subject: Subject, one: Combination, seeds: range, labels: list[int]) -> float:
    """Return the tokens left behind the blocks, on the mean of the steps in which they ran."""
    if not one.stages:
        drawn = adaptok.diffusion.sample(
            subject.model, labels, objective=adaptok.diffusion.make_objective("flow"),
            scheduler="flow-euler", steps=subject.steps, seed=list(seeds), clip=1.0, trace=True,
            **budget_of(one),
        )  # fmt: skip
        return float(torch.stack([step.kept for step in drawn.steps]).float().mean())
    with adaptok.trace(subject.model) as seen:
        subject.draw(seeds, labels, **budget_of(one))
    kept = torch.stack([step.kept for step in seen.steps]).float()
    ran = torch.stack(
        [step.kept > 0 if step.reused is None else ~step.reused for step in seen.steps]
    )
    return float(kept[ran].mean())


def count_computed(subject: Subject) -> float:
    """Return the share of steps in which the blocks ran."""
    if not adaptok.is_wrapped(subject.model):
        return 1.0
    for name in ("teacache", "taylorseer"):
        try:
            stage: Any = find(subject.model, name)
        except StopIteration:
            continue
        return float(stage.computed / (stage.computed + stage.reused))
    return 1.0


def run_tables(options: argparse.Namespace) -> None:
    """Compare every combination with plain DC-DiT, pair by pair."""
    extractor = load_extractor("efficientnet-lite0", EXTRACTOR)
    real = extract_features(extractor, load_emoji(size=32).images.split(64))
    held_out = extract_features(extractor, load_emoji(size=32, split="test").images.split(64))
    times = json.loads((options.cache / "times.json").read_text(encoding="utf-8"))
    fitted = Fitted.from_json((options.cache / "fitted.json").read_text(encoding="utf-8"))
    plain, rows = read_features(options, COMBINATIONS[0]), {}
    assert plain is not None
    for one in COMBINATIONS:
        features = read_features(options, one)
        if features is None:
            print(f"not drawn yet: {one.label}")
            continue
        found = compare_pairs(plain, features, real)
        faster = times["rows"][one.label]["ms"] < times["rows"][COMBINATIONS[0].label]["ms"]
        rows[one.label] = {
            **times["rows"][one.label],
            "kid": found.second.model_dump(),
            "difference": found.difference.model_dump(),
            "change": found.change.model_dump(),
            "by_seed": [
                compare_pairs(a, b, real, resamples=2).difference.value
                for a, b in zip(
                    plain.split(options.count), features.split(options.count), strict=True
                )
            ],
            "dominates": bool(one.stages or one.drop) and faster and found.loses_less_than(LOSS),
        }
    floor = compare_pairs(held_out, held_out, real).first
    result = {
        "command": "python benchmarks/combinations.py fit|sample|times|groups|tables",
        "machine": times["machine"],
        "setting": {
            "model": options.model, "steps": options.steps, "scheduler": "flow-euler",
            "guidance": 1.0, "seeds": options.seeds, "count": options.count,
            "timed_images": times["walk"], "real": len(real), "held_out": len(held_out),
            "loss_excluded": LOSS,
        },
        "fitted": fitted.model_dump(),
        "floor": {"held_out": floor.model_dump(), "halves": measure_floor(real).kid.model_dump()},
        "groups": json.loads((options.cache / "groups.json").read_text(encoding="utf-8")),
        "rows": rows,
    }  # fmt: skip
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_features(options: argparse.Namespace, one: Combination) -> torch.Tensor | None:
    """Return the features of all seeds of a combination; None if some are missing."""
    parts = []
    for seed in range(options.seeds):
        path = options.cache / f"{slug(one.label)}-{seed}-{options.count}.safetensors"
        if not path.exists():
            return None
        parts.append(load_file(path)["features"])
    return torch.cat(parts)


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("fit", "sample", "times", "groups", "tables"))
    parser.add_argument("--model", default="dcdit-emoji32", help="a shipped model, or a folder")
    parser.add_argument("--only", nargs="+", help="combinations by label")
    parser.add_argument("--steps", type=int, default=20, help="Euler steps")
    parser.add_argument("--seeds", type=int, default=3, help="sets of seeds")
    parser.add_argument("--count", type=int, default=96, help="images of each set")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=200, help="of 8 images, to fit with")
    parser.add_argument("--repeats", type=int, default=3)
    folder = Path(tempfile.gettempdir()) / "adaptok-combinations"
    parser.add_argument("--cache", type=Path, default=folder)
    parser.add_argument("--output", default="benchmarks/results/combinations.json")
    options = parser.parse_args()
    if options.step in ("sample", "tables") and not EXTRACTOR.exists():
        print(f"skipped: {EXTRACTOR.name} is not in the folder `shared` beside the repository")
        return
    steps = {
        "fit": run_fit, "sample": run_samples, "times": run_times, "groups": run_groups,
        "tables": run_tables,
    }  # fmt: skip
    steps[options.step](options)


if __name__ == "__main__":
    main()
