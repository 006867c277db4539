"""Write `docs/speed.md` and its picture from the result files of the speed benchmarks."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"
PICTURE = ROOT / "docs" / "pictures" / "speed.png"
COLOURS = {"packed": "#0072B2", "bucketed": "#D55E00", "fixed": "#009E73"}
STEPS = {
    "STEPS": "train-step-cpu-eager",
    "STEPS_COMPILED": "train-step-cpu-compiled",
    "STEPS_B": "train-step-b-cpu-compiled",
}
MODES = {"compiled": "both compiled", "eager": "both eager"}


def load(name: str) -> dict[str, Any]:
    """Read a result file."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def describe(result: dict[str, Any]) -> str:
    """Say where something was measured."""
    machine, settings = result["machine"], result["settings"]
    return (
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}; "
        f"{settings['dtype']}, batch {settings['batch']}, {settings['latent']} x "
        f"{settings['latent']} cells"
    )


def tabulate_models(result: dict[str, Any]) -> str:
    """Return the table of DC-DiT beside DiT."""
    lines = ["| model | tokens | FLOPs | time | ms |", "|---|---|---|---|---|"]
    for name, row in result["models"].items():
        lines.append(
            f"| {name} | {row['tokens']:g} | {row['flops_ratio']:.2f} | {row['time_ratio']:.2f} | "
            f"{row['ms']:.0f} |"
        )
    return "\n".join(lines)


def tabulate_steps(result: dict[str, Any]) -> str:
    """Return the table of training steps."""
    lines = [
        "| model | time | ms | activations and gradients, MB | with weights and optimiser |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["models"].items():
        time = f"{row['time_ratio']:.2f} | {row['ms']:.0f}" if "ms" in row else " | "
        lines.append(
            f"| {name} | {time} | {row['peak_mb']:.0f} ({row['peak_ratio']:.2f}) | "
            f"{row['memory_ratio']:.2f} |"
        )
    return "\n".join(lines)


def tabulate_report(result: dict[str, Any]) -> str:
    """Return the table of a benchmark report."""
    from adaptok.measure import BenchmarkReport

    return BenchmarkReport.model_validate(result).markdown()


def draw(results: dict[str, dict[str, Any]]) -> None:
    """Draw time and FLOPs of DC-DiT relative to DiT."""
    figure, axes = plt.subplots(1, len(results), figsize=(10, 4.2), sharey=True)
    for axis, (mode, result) in zip(axes, results.items(), strict=True):
        for layout, colour in COLOURS.items():
            rows = [row for name, row in result["models"].items() if f" {layout} " in name]
            tokens = [row["tokens"] for row in rows]
            axis.plot(tokens, [row["time_ratio"] for row in rows], "o-", color=colour, label=layout)
        axis.plot(
            tokens, [row["flops_ratio"] for row in rows], "--", color="#555555", label="FLOPs"
        )
        axis.axhline(1.0, color="#999999", lw=1)
        axis.annotate("DiT-S/2, 256 tokens", (tokens[-1], 1.01), color="#555555", fontsize=9)
        axis.set_title(MODES[mode], loc="left", fontweight="bold")
        axis.set_xlabel("tokens of an image, mean")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, None)
    axes[0].set_ylabel("relative to DiT-S/2")
    axes[0].legend(frameon=False, title="time by layout", loc="lower right")
    figure.suptitle("DC-DiT-S on two CPU cores", x=0.01, ha="left", fontweight="bold")
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    """Fill the tables into the page."""
    results = {mode: load(f"dcdit-s-cpu-{mode}") for mode in MODES}
    draw(results)
    values = {f"DCDIT_{mode.upper()}": tabulate_models(result) for mode, result in results.items()}
    values |= {f"WHERE_{mode.upper()}": describe(result) for mode, result in results.items()}
    values["REGIONS"] = ", ".join(
        f"{name} {ms:.0f}" for name, ms in results["compiled"]["ms_by_region"].items()
    )
    for name, file in STEPS.items():
        steps = load(file)
        values |= {name: tabulate_steps(steps), f"WHERE_{name}": describe(steps)}
    values["SMALL"] = "\n\n".join(
        f"Batch {batch}:\n\n{tabulate_models(load(f'dcdit-s-b{batch}-cpu-eager'))}"
        for batch in (1, 2)
    )
    values["VIT"] = tabulate_report(load("vit-compiled-cpu"))
    text = (ROOT / "benchmarks" / "speed_page.md").read_text()
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
