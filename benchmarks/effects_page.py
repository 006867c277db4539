"""Write `docs/effects.md` and its picture from the result file of `effects.py`."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from effect_runs.variants import BASELINE, FULL

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "effects.json"
PAGE = ROOT / "docs" / "effects.md"
PICTURE = ROOT / "docs" / "pictures" / "effects.png"
TEMPLATE = ROOT / "benchmarks" / "effects_page.md"
CARD = "../adaptok/zoo/dcdit-emoji32/README.md"
ONE_BUDGET = "one budget in training"
ABLATIONS = (ONE_BUDGET, "cosine router (H-Net)", "no smoothing")
PATCHES = (FULL, BASELINE, "DiT, patch 4")
PAPER = {ONE_BUDGET: 1.04, "cosine router (H-Net)": 1.23, "no smoothing": 3.06}  # FID over 56.73
HEADER = (
    "| | steps | tokens | GFLOPs | ms | KID x 1000 | minus {0}, x 1000 |\n"
    "|---|---|---|---|---|---|---|"
)
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"


def show(interval: dict[str, float], form: str = ".1f", factor: float = 1000.0) -> str:
    """Return a figure with its interval."""
    value, low, high = (format(factor * interval[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def show_time(row: dict[str, Any]) -> str:
    """Return the median time of a call with its quartiles."""
    return f"{row['ms']:.1f} [{row['ms_low']:.1f}, {row['ms_high']:.1f}]"


def show_tokens(row: dict[str, Any], result: dict[str, Any]) -> str:
    """Return how many tokens the blocks ran on, the mean over a walk; with its interval."""
    if "tokens" in row:
        found = row["tokens"]
        return f"{found['mean']:.0f} [{found['low']:.0f}, {found['high']:.0f}]"
    side = result["setting"]["image_size"] // result["setting"]["space_to_depth"]
    return str((side // int(row["variant"][-1])) ** 2)  # "DiT, patch 4"


def pick(result: dict[str, Any], name: str, drop: float = 0.0) -> dict[str, Any]:
    """Return the row of a variant at a budget."""
    row: dict[str, Any] = result["rows"][f"{name} {drop:g}"]
    return row


def tabulate(result: dict[str, Any], names: tuple[str, ...], against: str) -> str:
    """Return a table of variants at their natural budget."""
    key = "minus_full" if against == FULL else "minus_baseline"
    lines = [HEADER.format(against)]
    for name in names:
        row = pick(result, name)
        difference = "" if name == against else show(row[key], "+.1f")
        lines.append(
            f"| {name} | {row['steps']:,} | {show_tokens(row, result)} | {row['gflops']:.2f} "
            f"| {show_time(row)} | {show(row['kid'])} | {difference} |"
        )
    return "\n".join(lines)


def tabulate_budgets(result: dict[str, Any]) -> str:
    """Return the distance of both trainings at each tail-drop fraction."""
    drops = [row["drop"] for row in result["rows"].values() if row["variant"] == FULL]
    lines = [
        "| tail drop | trained with | tokens | GFLOPs | ms | KID x 1000 |",
        "|---|---|---|---|---|---|",
    ]
    for drop in drops:
        for name, label in ((FULL, "all budgets"), (ONE_BUDGET, "one")):
            row = pick(result, name, drop)
            lines.append(
                f"| {drop:g} | {label} | {show_tokens(row, result)} | {row['gflops']:.2f} "
                f"| {show_time(row)} | {show(row['kid'])} |"
            )
    return "\n".join(lines)


def say_kept(result: dict[str, Any]) -> str:
    """Say how many cells are kept at both ends of the way."""
    kept = pick(result, FULL)["kept_by_step"]
    first, last = kept[0], kept[-1]
    ratio = pick(result, FULL)["cleanest_over_noisiest"]
    return (
        f"{100 * first['mean']:.1f} % [{100 * first['low']:.1f}, {100 * first['high']:.1f}] of the "
        f"cells at the noisiest step, {100 * last['mean']:.1f} % [{100 * last['low']:.1f}, "
        f"{100 * last['high']:.1f}] at the cleanest; a sample keeps {ratio['mean']:.2f} "
        f"[{ratio['low']:.2f}, {ratio['high']:.2f}] times as many in its cleanest quarter as in "
        "its noisiest. In the paper 22.3 % and 45.1 % of one sample."
    )


def say_negative(result: dict[str, Any]) -> str:
    """List what the paper reports and these runs do not show."""
    lines = []
    row = pick(result, FULL)["minus_baseline"]
    if row["high"] >= 0:
        word = "is further away than" if row["low"] > 0 else "cannot be told apart from"
        lines.append(f"- DC-DiT {word} {BASELINE} ({show(row, '+.1f')}).")
    for name in ABLATIONS:
        row = pick(result, name)["minus_full"]
        if row["low"] <= 0:
            word = "is nearer than" if row["high"] < 0 else "cannot be told apart from"
            lines.append(
                f"- {name}: {word} the full model ({show(row, '+.1f')}); in the paper it costs "
                f"{PAPER[name]:g} of FID."
            )
    return "\n".join(lines) or "Everything that was looked for."


def draw(result: dict[str, Any]) -> None:
    """Draw the elastic curve, the kept share over the way, and all differences."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), width_ratios=(1, 1, 1.25))
    for name, colour in ((FULL, BLUE), (ONE_BUDGET, ORANGE)):
        rows = [row for row in result["rows"].values() if row["variant"] == name]
        kid = [1000 * row["kid"]["value"] for row in rows]
        error = [
            [1000 * (row["kid"]["value"] - row["kid"]["low"]) for row in rows],
            [1000 * (row["kid"]["high"] - row["kid"]["value"]) for row in rows],
        ]
        label = "all budgets" if name == FULL else "one budget"
        axes[0].errorbar([row["ms"] for row in rows], kid, yerr=error, fmt="o-", color=colour,
                         capsize=2, ms=5, label=f"trained with {label}")  # fmt: skip
    beyond = pick(result, "DiT, patch 4")
    for name, colour in ((BASELINE, GREY),):
        row = pick(result, name)
        value, low, high = (1000 * row["kid"][key] for key in ("value", "low", "high"))
        axes[0].errorbar([row["ms"]], [value], yerr=[[value - low], [high - value]], fmt="s",
                         color=colour, capsize=2, label=name)  # fmt: skip
    axes[0].set_xlabel("ms of a step of one image (measured)")
    axes[0].set_ylabel("KID-EffLite0 x 1000")
    axes[0].text(0.02, 0.98, f"DiT, patch 4: {show(beyond['kid'], '.0f')}, {beyond['ms']:.1f} ms",
                 transform=axes[0].transAxes, va="top", fontsize=8, color=GREY)  # fmt: skip
    axes[0].margins(y=0.12)
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    axes[0].set_title("Budgets: tail drop 0 to .6", loc="left", fontweight="bold", fontsize=10)
    kept = pick(result, FULL)["kept_by_step"]
    place = [step / (len(kept) - 1) for step in range(len(kept))]
    axes[1].plot(place, [100 * step["mean"] for step in kept], color=BLUE)
    low, high = ([100 * step[key] for step in kept] for key in ("low", "high"))
    axes[1].fill_between(place, low, high, color=BLUE, alpha=0.25, lw=0)
    axes[1].set_xlabel("way from noise (0) to image (1)")
    axes[1].set_ylabel("kept cells, %")
    axes[1].set_title("Kept cells over the way", loc="left", fontweight="bold", fontsize=10)
    names = [*ABLATIONS, *PATCHES[1:]]
    edge = 1000 * max(abs(pick(result, name)["minus_full"]["low"]) for name in names[:-1])
    for number, name in enumerate(reversed(names)):
        row = pick(result, name)["minus_full"]
        value, left, right = (1000 * row[key] for key in ("value", "low", "high"))
        if left > 2 * edge:  # would press all others together
            axes[2].text(1.2 * edge, number, f"{show(row, '+.0f')} $\\rightarrow$", ha="right",
                         va="center", color=GREY)  # fmt: skip
            continue
        axes[2].errorbar(value, number, xerr=[[value - left], [right - value]], fmt="o",
                         color=ORANGE if name in ABLATIONS else GREY, capsize=2)  # fmt: skip
    axes[2].set_yticks(range(len(names)), list(reversed(names)))
    axes[2].set_ylim(-0.5, len(names) - 0.5)
    axes[2].set_xlim(-1.2 * edge, 1.2 * edge)
    axes[2].axvline(0, color="#999999", lw=0.8)
    axes[2].set_xlabel("KID minus that of DC-DiT, x 1000 (right: worse)")
    axes[2].set_title("What each part is worth", loc="left", fontweight="bold", fontsize=10)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    """Fill the figures into the page."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    draw(result)
    setting, machine = result["setting"], result["machine"]
    seeds = setting["seeds"]
    values = {
        "TRAIN": f"{setting['train_images']:,}",
        "PIXELS": str(setting["image_size"]),
        "SIDE": str(setting["image_size"] // setting["space_to_depth"]),
        "WIDTH": str(setting["hidden_size"]),
        "DEPTH": str(setting["depth"]),
        "HEADS": str(setting["num_heads"]),
        "BATCH": str(setting["batch_size"]),
        "SEEDS": "one run of each" if seeds == 1 else f"{seeds} runs of each",
        "SAMPLES": str(setting["samples"]),
        "TIMED": str(setting["timed_images"]),
        "EULER": str(setting["euler_steps"]),
        "HELD_OUT": show(result["held_out"]),
        "MACHINE": f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}",
        "PATCHES": tabulate(result, PATCHES, BASELINE),
        "BUDGETS": tabulate_budgets(result),
        "KEPT": say_kept(result),
        "COMMAND": result["command"],
        "CARD": CARD,
        "ABLATIONS": tabulate(result, (FULL, *ABLATIONS), FULL),
        "NEGATIVE": say_negative(result),
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
