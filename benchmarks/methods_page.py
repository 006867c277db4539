"""Write `docs/measured.md` and its picture from the result file of `benchmarks/methods.py`."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from method_tables.methods import METHODS, Method

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "methods.json"
PAGE = ROOT / "docs" / "measured.md"
PICTURE = ROOT / "docs" / "pictures" / "measured.png"
TEMPLATE = ROOT / "benchmarks" / "methods_page.md"
HEADER = (
    "| | tokens | GFLOPs (of plain) | ms (of plain) | k-NN accuracy | lost, points "
    "| over random, points | cosine |\n|---|---|---|---|---|---|---|---|"
)
# colours that tell apart without hue, in the order of METHODS without the floors
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C510A")
FLOORS = ("random", "random-drop")


def show(interval: dict[str, float], form: str, factor: float = 1.0) -> str:
    """Return a mean with its interval."""
    mean, low, high = (format(factor * interval[key], form) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def list_rows(method: Method, settings: dict[str, Any]) -> list[str]:
    """Return the lines of a method that were measured, the largest budget first."""
    rows = []
    for setting in method.list_settings():
        row = settings.get(setting.label)
        if row is None:
            continue
        over = show(row["over_floor"], "+.1f", 100) if "over_floor" in row else ""
        rows.append(
            f"| {setting.label.removeprefix(method.name).strip()} | {row['tokens']:.0f} "
            f"| {row['gflops']:.1f} ({row['flops_ratio']:.2f}) "
            f"| {row['ms']:.0f} ({row['time_ratio']:.2f}) | {show(row['accuracy'], '.3f')} "
            f"| {show(row['lost'], '+.1f', 100)} | {over} | {row['cosine']['mean']:.3f} |"
        )
    return rows


def summarise(result: dict[str, Any], budget: str = "keep=0.5") -> str:
    """Return one line per method at one budget, beside each other for all models."""
    models = list(result["models"].values())
    head = " | ".join(f"{m['name']}: ms (of plain) | lost, points" for m in models)
    lines = [f"| | {head} |", "|---" * (1 + 2 * len(models)) + "|"]
    for method in METHODS:
        cells = []
        for model in models:
            row = model["settings"].get(f"{method.name} {budget}")
            cells += (
                [f"{row['ms']:.0f} ({row['time_ratio']:.2f})", show(row["lost"], "+.1f", 100)]
                if row
                else ["", ""]
            )
        lines.append(f"| `{method.name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def tabulate(result: dict[str, Any]) -> str:
    """Return all tables, method by method."""
    parts = []
    for method in METHODS:
        lines = [f"### `{method.name}`" + (f": {method.note}" if method.note else ""), ""]
        for model in result["models"].values():
            rows = list_rows(method, model["settings"])
            missing = [s.label for s in method.list_settings() if s.label not in model["settings"]]
            if rows:
                lines += [f"{model['name']}:", "", HEADER, *rows, ""]
            if missing:
                lines += [f"Not measured on {model['name']}: {', '.join(missing)}.", ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def draw(result: dict[str, Any]) -> None:
    """Draw what each method loses against the time that it takes."""
    models = list(result["models"].values())
    figure, axes = plt.subplots(1, len(models), figsize=(11, 4.6), squeeze=False)
    own = [method for method in METHODS if method.name not in FLOORS]
    for axis, model in zip(axes[0], models, strict=True):
        for method in METHODS:
            rows = [model["settings"].get(one.label) for one in method.list_settings()]
            points = sorted((row["time_ratio"], row["accuracy"]["mean"]) for row in rows if row)
            if not points:
                continue
            floor = method.name in FLOORS
            colour = "#999999" if floor else COLOURS[own.index(method)]
            style = {"random": ":", "random-drop": "--"}.get(method.name, "-")
            axis.plot(*zip(*points, strict=True), style, marker="o", ms=4, color=colour,
                      label=method.name)  # fmt: skip
        axis.axhline(model["accuracy"]["mean"], color="#444444", lw=1)
        axis.set_title(model["name"], loc="left", fontweight="bold")
        axis.set_xlabel("time, relative to the plain model")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("k-NN accuracy")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, title="method")
    figure.suptitle(
        "Emoji told apart by features of untouched models, at the budgets that were measured",
        x=0.01, ha="left", fontweight="bold",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 0.88, 1))
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    """Fill the tables into the page."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    draw(result)
    setting, machine = result["setting"], result["machine"]
    plain = "; ".join(
        f"{model['name']} {show(model['accuracy'], '.3f')}" for model in result["models"].values()
    )
    batches = ", ".join(sorted({str(model["batch"]) for model in result["models"].values()}))
    values = {
        "TABLES": tabulate(result),
        "SUMMARY": summarise(result),
        "PLAIN": plain,
        "QUERIES": str(setting["queries"]),
        "REFERENCES": str(setting["references"]),
        "K": str(setting["k"]),
        "PICTURES": setting["pictures"],
        "DTYPE": setting["features"],
        "MACHINE": f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}",
        "BATCH": batches,
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
