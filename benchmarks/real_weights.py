"""Claim: without training, a wrapped ViT keeps its features with half of its tokens.

Wraps models with real weights by `chunker="dc"` and each untrained router, and measures at several
budgets the k-NN accuracy on emoji categories, the cosine of centred features to the unwrapped ones,
computed tokens, operations and milliseconds. Queries go through the wrapped model and references
through the unwrapped one, as when a gallery of features exists already. The router is chosen on
one half of the base emoji and reported on the other; random routing is the floor.

    python benchmarks/real_weights.py --output benchmarks/results/real_weights.json
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from emoji_knn.images import TARBALL, Half, load_pictures, split_bases
from emoji_knn.measuring import Pixels, RouterCase, RouterRuns, extract_features, run_router
from emoji_knn.models import MODELS, FeatureModel
from emoji_knn.scoring import FLOOR, Row, Task, choose_router, tabulate
from emoji_knn.tables import Unwrapped, format_rows, summarise_unwrapped
from timing import describe_machine

from adaptok.train.emoji import read_emoji_index

SHARED = Path(__file__).parents[2] / "shared"
CHOICE_KEEPS = (0.5, 0.3)
REPORT_KEEPS = (0.9, 0.7, 0.5, 0.3)
DEFAULT = "dc (default)"


@dataclass(frozen=True, slots=True)
class Setting:
    """What a figure must be read with.

    Args:
        k: references that vote.
        references: pictures of each class whose class is known.
        queries: most pictures of each class that are classified.
        span: blocks that run on few tokens; None takes all.
        batch: pictures of a batch.
        random_seeds: passes of random routing, whose mean is the floor.
        bootstrap_seed: seed of the intervals.
        variants: which pictures take part.
        split: how the halves are made.
        wrapped: which features come from the wrapped model.
    """

    k: int
    references: int
    queries: int
    span: tuple[int, int] | None
    batch: int
    random_seeds: tuple[int, ...]
    bootstrap_seed: int = 0
    variants: str = "8 categories without flags, no skin variants, one picture per base emoji"
    split: str = "by base emoji, SHA-256 order within a category, every other one"
    wrapped: str = "queries; references are features of the unwrapped model"


def list_cases(random_seeds: tuple[int, ...]) -> list[RouterCase]:
    """Return the untrained routers, the floor among them, and the default of the preset."""
    names = ("predictability", "cosine", "entropy", "norm")
    cases = [RouterCase(name, name) for name in names]
    return [*cases, RouterCase(FLOOR, FLOOR, random_seeds), RouterCase(DEFAULT, None)]


def make_task(host: FeatureModel, half: Half, classes: Sequence[str], setting: Setting,
              cache: Path) -> tuple[Task, Pixels]:  # fmt: skip
    """Return the k-NN task of a model on a half, and the pixels of its queries."""
    known, asked = (
        load_pictures(entries, SHARED, host.resolution, cache)
        for entries in (half.references, half.queries)
    )
    task = Task(
        extract_features(host, known, setting.batch),
        torch.tensor([classes.index(entry.category) for entry in half.references]),
        extract_features(host, asked, setting.batch),
        torch.tensor([classes.index(entry.category) for entry in half.queries]),
        setting.k,
        setting.bootstrap_seed,
    )
    return task, asked


def measure(host: FeatureModel, pictures: Pixels, cases: Sequence[RouterCase],
            keeps: Sequence[float], setting: Setting) -> dict[str, RouterRuns]:  # fmt: skip
    """Run all routers at all budgets."""
    runs = {}
    for case in cases:
        start = time.perf_counter()
        runs[case.name] = run_router(host, pictures, case, keeps, setting.span, setting.batch)
        print(f"<!-- {host.name}: {case.name}, {time.perf_counter() - start:.0f} s -->", flush=True)
    return runs


def describe_model(name: str, unwrapped: Mapping[str, Unwrapped]) -> dict[str, object]:
    """Return what the file says of a model."""
    model = MODELS[name]
    halves = {half: asdict(figures) for half, figures in unwrapped.items()}
    return {"name": model.name, "resolution": model.resolution, "unwrapped": halves}


def main() -> None:
    """Choose on one half, report on the other, print tables and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--limit", type=int, default=30, help="most queries of each class")
    parser.add_argument("--references", type=int, default=20, help="references of each class")
    parser.add_argument("--k", type=int, default=5, help="references that vote")
    parser.add_argument("--span", type=int, nargs=2, help="first block, and the end")
    parser.add_argument("--batch", type=int, default=8, help="pictures of a batch")
    parser.add_argument("--seeds", type=int, default=2, help="passes of random routing")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "adaptok-knn")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if not (SHARED / TARBALL).exists():
        print(f"skipped: {TARBALL} is not in the folder `shared` beside the repository")
        return
    setting = Setting(
        options.k,
        options.references,
        options.limit,
        None if options.span is None else tuple(options.span),
        options.batch,
        tuple(range(options.seeds)),
    )
    index = read_emoji_index()
    split = split_bases(index.entries, setting.references, setting.queries)
    cases = list_cases(setting.random_seeds)
    choice: dict[str, list[Row]] = {}
    report: dict[str, list[Row]] = {}
    unwrapped: dict[str, dict[str, Unwrapped]] = {}
    for name in options.models:
        host = MODELS[name](SHARED)
        task, pictures = make_task(host, split.choice, index.classes, setting, options.cache)
        choice[name] = tabulate(task, measure(host, pictures, cases, CHOICE_KEEPS, setting))
        unwrapped[name] = {"choice": summarise_unwrapped(task)}
        task, pictures = make_task(host, split.report, index.classes, setting, options.cache)
        report[name] = tabulate(task, measure(host, pictures, cases, REPORT_KEEPS, setting))
        unwrapped[name]["report"] = summarise_unwrapped(task)
        for half, rows in (("choice", choice[name]), ("report", report[name])):
            print(f"\n### {host.name}, {half} half\n\n{format_rows(rows, unwrapped[name][half])}\n")
    chosen = choose_router(list(choice.values()), CHOICE_KEEPS)
    print(
        f"Best router without training on the choice half, mean over models and budgets: {chosen}."
    )
    if options.output is not None:
        content = {
            "command": "python benchmarks/real_weights.py",
            "machine": describe_machine(torch.device("cpu")),
            "setting": asdict(setting),
            "models": {name: describe_model(name, unwrapped[name]) for name in options.models},
            "chosen": chosen,
            "choice": {name: [asdict(row) for row in rows] for name, rows in choice.items()},
            "report": {name: [asdict(row) for row in rows] for name, rows in report.items()},
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
