"""Write `docs/combinations.md` and its picture from the result file of `combinations.py`."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "combinations.json"
PAGE = ROOT / "docs" / "combinations.md"
PICTURE = ROOT / "docs" / "pictures" / "combinations.png"
TEMPLATE = ROOT / "benchmarks" / "combinations_page.md"
PLAIN = "DC-DiT"
HEADER = (
    "| | tokens | computed | GFLOPs | ms | KID x 1000 | change | dominates |\n"
    "|---|---|---|---|---|---|---|---|"
)
# colours that tell apart without hue, with a marker each
MARKS = {
    "teacache": ("#0072B2", "s"),
    "taylorseer": ("#56B4E9", "D"),
    "tome": ("#009E73", "^"),
    "exit": ("#E69F00", "v"),
    "width": ("#CC79A7", "P"),
}


def show(interval: dict[str, float], form: str, factor: float = 1.0) -> str:
    """Return a figure with its interval."""
    value, low, high = (format(factor * interval[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def tabulate(rows: dict[str, Any]) -> str:
    """Return the table, in the order in which combinations are listed."""
    lines = [HEADER]
    for label, row in rows.items():
        change = "" if label == PLAIN else show(row["change"], "+.1f", 100) + " %"
        lines.append(
            f"| {label} | {row['tokens']:.0f} | {100 * row['computed']:.0f} % "
            f"| {row['gflops']:.1f} | {row['ms']:,.0f} | {show(row['kid'], '.1f', 1000)} "
            f"| {change} | {'yes' if row['dominates'] else ''} |"
        )
    return "\n".join(lines)


def summarise(rows: dict[str, Any]) -> str:
    """Say which combinations dominate plain DC-DiT, and which lose for certain."""
    better = [label for label, row in rows.items() if row["dominates"]]
    worse = [label for label, row in rows.items() if row["change"]["low"] > 0]
    open_ones = [
        label for label, row in rows.items() if label not in (*better, *worse) and label != PLAIN
    ]
    said = [
        ("Dominating plain DC-DiT", better),
        ("Further away than plain DC-DiT for certain", worse),
        ("Not told apart from it", open_ones),
    ]
    return "\n".join(f"- {words}: {', '.join(some) or 'none'}." for words, some in said)


def compare_groups(groups: dict[str, float], counts: str) -> str:
    """Return what a stage that does nothing adds to the time, in percent."""
    return f"{100 * (groups[f'idle, {counts}'] / groups[f'plain, {counts}'] - 1):+.0f} %"


def find_mark(label: str) -> tuple[str, str]:
    """Return colour and marker of the first method of a combination."""
    return next((mark for name, mark in MARKS.items() if f"+ {name}" in label), ("#333333", "o"))


def draw(result: dict[str, Any]) -> None:
    """Draw the distance of each combination against its time."""
    rows = result["rows"]
    figure, axis = plt.subplots(figsize=(11.5, 5.6))
    curve = [row for label, row in rows.items() if "+" not in label]
    axis.plot([row["ms"] for row in curve], [1000 * row["kid"]["value"] for row in curve],
              color="#333333", lw=1, zorder=1)  # fmt: skip
    plain = 1000 * rows[PLAIN]["kid"]["value"]
    axis.axhline(plain, color="#999999", lw=0.8, ls=":", zorder=0)
    for number, (label, row) in enumerate(rows.items(), start=1):
        colour, marker = find_mark(label)
        value = 1000 * row["kid"]["value"]
        low, high = (1000 * row["difference"][key] for key in ("low", "high"))
        centre = 1000 * row["difference"]["value"]
        axis.errorbar(row["ms"], value, yerr=[[centre - low], [high - centre]], fmt=marker,
                      color=colour, ms=7, lw=1, capsize=2, label=f"{number}  {label}",
                      mfc=colour if row["dominates"] or label == PLAIN else "white")  # fmt: skip
        axis.annotate(str(number), (row["ms"], value), xytext=(6, 5), textcoords="offset points",
                      fontsize=9, color=colour)  # fmt: skip
    axis.set_xlabel("milliseconds of an image, whole walk (measured)")
    axis.set_ylabel("KID-EffLite0 x 1000 to the training images (less is better)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(
        "The shipped DC-DiT with other methods around its blocks\n"
        "filled: faster, and a loss of more than 2 % is excluded; bars: paired difference",
        loc="left", fontweight="bold", fontsize=11,
    )  # fmt: skip
    figure.legend(loc="center right", frameon=False, fontsize=8.5)
    figure.tight_layout(rect=(0, 0, 0.68, 1))
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    """Fill the table into the page."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    draw(result)
    setting, machine, fitted = result["setting"], result["machine"], result["fitted"]
    values = {
        "MODEL": f"`{setting['model']}`",
        "SAMPLES": str(setting["seeds"] * setting["count"]),
        "SEEDS": str(setting["seeds"]),
        "COUNT": str(setting["count"]),
        "REAL": f"{setting['real']:,}",
        "HELD_OUT": show(result["floor"]["held_out"], ".1f", 1000),
        "LOSS": f"{100 * setting['loss_excluded']:g}",
        "STEPS": str(setting["steps"]),
        "WALK": str(setting["timed_images"]),
        "MACHINE": f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}",
        "R2": f"{fitted['r2']:.2f}",
        "EXIT_FIRST": f"{fitted['exit_losses'][0]:.4f}",
        "EXIT_LAST": f"{fitted['exit_losses'][1]:.4f}",
        "WIDTH": f"{100 * fitted['width_share']:.0f} %",
        "IDLE_DIFFER": compare_groups(result["groups"], "counts differ"),
        "IDLE_ONE": compare_groups(result["groups"], "one count"),
        "TABLE": tabulate(result["rows"]),
        "SUMMARY": summarise(result["rows"]),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
