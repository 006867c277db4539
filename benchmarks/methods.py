"""Claim: methods for tokens work on models with real weights, without training.

Features of the wrapped model are compared with a gallery of features of the unwrapped one: k-NN
accuracy on emoji categories and the cosine of centred features. Nothing is chosen on these
pictures: every method runs with its defaults. Three steps, each resumes where it stopped:

    python benchmarks/methods.py features --dtype bfloat16   # hours of CPU time, cached by setting
    python benchmarks/methods.py times                       # minutes, on a quiet machine
    python benchmarks/methods.py tables --output benchmarks/results/methods.json
"""

import argparse
import copy
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from emoji_knn.images import TARBALL, load_pictures, split_bases
from emoji_knn.intervals import bootstrap_difference, bootstrap_mean
from emoji_knn.measuring import count_flops, split_batches
from emoji_knn.models import MODELS, FeatureModel
from emoji_knn.scoring import Task
from method_tables.methods import METHODS, Setting
from safetensors.torch import load_file, save_file
from timing import describe_machine, time_interleaved

import adaptok
from adaptok.errors import AdaptokError
from adaptok.train.emoji import EmojiEntry, read_emoji_index

SHARED = Path(__file__).parents[2] / "shared"
FLOORS = {"tome": "random-drop", "evit": "random-drop", "dynamicvit": "random-drop"}


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """What is asked and what is known.

    Args:
        references: pictures whose class is known.
        queries: the others.
        classes: names of the classes.
    """

    references: tuple[EmojiEntry, ...]
    queries: tuple[EmojiEntry, ...]
    classes: tuple[str, ...]


def choose_pictures(references: int, limit: int) -> Pictures:
    """Return equally many references of each class, and the other base emoji as queries."""
    index = read_emoji_index()
    split = split_bases(index.entries, references, limit)
    other = (*split.report.references, *split.report.queries)
    asked = (*split.choice.queries, *other)
    return Pictures(split.choice.references, asked, tuple(index.classes))


def compute_features(host: FeatureModel, setting: Setting | None, pixels: Any,
                     options: argparse.Namespace) -> dict[str, torch.Tensor]:  # fmt: skip
    """Return the features of all pictures, for each seed of a setting."""
    dtype = getattr(torch, options.dtype)
    host = copy.copy(host)
    host.model = copy.deepcopy(host.model).to(dtype)
    found: dict[str, torch.Tensor] = {}
    if setting is not None:
        wrap_host(host, setting)
    for seed in setting.seeds if setting else (0,):
        torch.manual_seed(seed)
        with torch.inference_mode():
            parts = [
                host.extract(host.prepare(part).to(dtype)).float()
                for part in split_batches(pixels, options.batch)
            ]
        found[str(seed)] = torch.cat(parts).clone()
    return found


def wrap_host(host: FeatureModel, setting: Setting) -> None:
    """Wrap a model as a setting says."""
    stack = [copy.deepcopy(stage) for stage in setting.options.get("stack", ())]
    options = {**setting.options, "stack": stack, "budget": setting.budget or None}
    adaptok.wrap(host.model, **options, verify=False)


def list_settings(options: argparse.Namespace) -> list[Setting]:
    """Return the settings that were asked for."""
    found = [setting for method in METHODS for setting in method.list_settings()]
    if not options.only:
        return found
    return [one for one in found if {one.name, one.label} & set(options.only)]


def path_of(options: argparse.Namespace, model: str, label: str) -> Path:
    """Return where the features of a setting are kept."""
    return Path(options.cache) / f"{model}-{options.dtype}-{label.replace(' ', '_')}.safetensors"


def run_features(options: argparse.Namespace) -> None:
    """Compute what is not there yet."""
    chosen = choose_pictures(options.references, options.limit)
    Path(options.cache).mkdir(parents=True, exist_ok=True)
    for model in options.models:
        host = MODELS[model](SHARED)
        pixels = {
            side: load_pictures(getattr(chosen, side), SHARED, host.resolution, options.images)
            for side in ("references", "queries")
        }
        for side, picked in pixels.items():
            path = path_of(options, model, side)
            if not path.exists():
                save_file(compute_features(host, None, picked, options), path)
        for setting in list_settings(options):
            path = path_of(options, model, setting.label)
            if path.exists():
                continue
            start = time.perf_counter()
            try:
                found = compute_features(host, setting, pixels["queries"], options)
            except AdaptokError as reason:
                print(f"{model}: {setting.label}: {reason}", flush=True)
                continue
            save_file(found, path)
            print(f"{model}: {setting.label}: {time.perf_counter() - start:.0f} s", flush=True)


def run_times(options: argparse.Namespace) -> None:
    """Time all settings in turns with the model itself, and count tokens and operations."""
    pictures = choose_pictures(options.references, options.limit)
    rows: dict[str, Any] = {"machine": describe_machine(torch.device("cpu")), "models": {}}
    for model in options.models:
        host = MODELS[model](SHARED)
        entries = pictures.queries[:: len(pictures.queries) // options.batch][: options.batch]
        images = host.prepare(load_pictures(entries, SHARED, host.resolution, options.images))
        lines: dict[str, Any] = {}
        for name in dict.fromkeys(setting.name for setting in list_settings(options)):
            settings = [one for one in list_settings(options) if one.name == name]
            try:
                lines |= time_settings(host, settings, images, options.repeats)
            except AdaptokError as reason:
                print(f"{model}: {name}: {reason}", flush=True)
        rows["models"][model] = {"batch": len(images), "settings": lines}
    path = Path(options.times)
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def time_settings(
    host: FeatureModel, settings: list[Setting], images: torch.Tensor, repeats: int
) -> dict[str, Any]:
    """Time the budgets of one method and the model itself in turns."""
    wrapped = {}
    for setting in settings:
        twin = copy.copy(host)
        twin.model = copy.deepcopy(host.model)
        wrap_host(twin, setting)
        wrapped[setting.label] = twin
    with torch.inference_mode():
        timings = time_interleaved(
            {"plain": lambda: host.extract(images)}
            | {label: lambda one=twin: one.extract(images) for label, twin in wrapped.items()},
            repeats,
            images.device,
        )
    plain, flops = timings["plain"].median, count_flops(host, images)
    rows = {}
    for label, twin in wrapped.items():
        with torch.no_grad(), adaptok.trace(twin.model) as seen:
            twin.extract(images)
        own = count_flops(twin, images)
        rows[label] = {
            "tokens": float(seen.steps[0].kept.float().mean()) + host.prefix,
            "gflops": own / 1e9,
            "flops_ratio": own / flops,
            "ms": timings[label].median / len(images),
            "plain_ms": plain / len(images),
            "time_ratio": timings[label].median / plain,
        }
        print(f"{label}: {rows[label]}", flush=True)
    return rows


def run_tables(options: argparse.Namespace) -> None:
    """Score what is there, and write it with the times."""
    chosen = choose_pictures(options.references, options.limit)
    times = json.loads(Path(options.times).read_text(encoding="utf-8"))
    result: dict[str, Any] = {
        "command": "python benchmarks/methods.py features|times|tables",
        "machine": times["machine"],
        "setting": {
            "k": options.k,
            "references": len(chosen.references),
            "queries": len(chosen.queries),
            "features": options.dtype,
            "times": "float32",
            "pictures": "8 categories without flags, no skin variants, one picture per base emoji",
        },
        "models": {},
    }
    for model in options.models:
        task = make_task(options, model, chosen)
        lines = {}
        scores = {}
        for setting in list_settings(options):
            path = path_of(options, model, setting.label)
            measured = times["models"][model]["settings"].get(setting.label)
            if path.exists() and measured:
                runs = load_file(path).values()
                scores[setting.label] = torch.stack([task.score(found) for found in runs]).mean(0)
                cosine = torch.stack([task.compare(found) for found in runs]).mean(0)
                lines[setting.label] = {
                    **measured,
                    "accuracy": asdict(bootstrap_mean(scores[setting.label], task.seed)),
                    "cosine": asdict(bootstrap_mean(cosine, task.seed)),
                }
        plain = task.score(task.queries)
        for label, hits in scores.items():
            lines[label]["lost"] = asdict(bootstrap_difference(plain, hits, task.seed))
            name, _, budget = label.partition(" ")
            floor = scores.get(f"{FLOORS.get(name, 'random')} {budget}".strip())
            if floor is not None:
                difference = bootstrap_difference(hits, floor, task.seed)
                lines[label]["over_floor"] = asdict(difference)
        result["models"][model] = {
            "name": MODELS[model].name,
            "accuracy": asdict(bootstrap_mean(plain, task.seed)),
            "batch": times["models"][model]["batch"],
            "settings": lines,
        }
    Path(options.output).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_task(options: argparse.Namespace, model: str, chosen: Pictures) -> Task:
    """Return the k-NN task of a model from its cached features."""
    known, asked = (
        load_file(path_of(options, model, side))["0"] for side in ("references", "queries")
    )
    labels = [
        torch.tensor([chosen.classes.index(entry.category) for entry in entries])
        for entries in (chosen.references, chosen.queries)
    ]
    return Task(known, labels[0], asked, labels[1], options.k, 0)


def main() -> None:
    """Run one of the three steps."""
    folder = Path(tempfile.gettempdir()) / "adaptok-knn"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("features", "times", "tables"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+", help="names of methods, or of lines")
    parser.add_argument("--dtype", default="bfloat16", help="of the features; times are float32")
    parser.add_argument("--references", type=int, default=20, help="references of each class")
    parser.add_argument("--limit", type=int, default=10**6, help="most queries of a class and half")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cache", type=Path, default=folder / "features")
    parser.add_argument("--images", type=Path, default=folder, help="cache of decoded pictures")
    parser.add_argument("--times", type=Path, default=folder / "times.json")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/methods.json"))
    options = parser.parse_args()
    if not (SHARED / TARBALL).exists():
        print(f"skipped: {TARBALL} is not in the folder `shared` beside the repository")
        return
    {"features": run_features, "times": run_times, "tables": run_tables}[options.step](options)


if __name__ == "__main__":
    main()
