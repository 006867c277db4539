"""Write `docs/choosing.md` and the figures of README.md from the result files.

Usage: python benchmarks/choosing_page.py [--check]

A figure that is not in a result file is not in the page: the cell says so.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "choosing.md"
TEMPLATE = ROOT / "benchmarks" / "choosing_page.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- figures: benchmarks/choosing_page.py -->\n", "<!-- end of figures -->"
MODEL, OTHER = "vit-s", "clip"  # of methods.json
FLOORS = ("random", "random-drop")
COMPARED = ("dc", "hnet", "apt", "graph", "tome", "tomesd", "evit", "dynamicvit", *FLOORS)
NOTHING = "\N{EN DASH}"
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decision:
    """A line of the first table.

    Args:
        have: the model.
        wish: what is wanted of it.
        method: what to try, as Markdown, with the page that describes it.
        measured: tokens, FLOPs and time.
        lost: quality, where it was measured.
    """

    have: str
    wish: str
    method: str
    measured: str = NOTHING
    lost: str = NOTHING

    def __str__(self) -> str:
        cells = (self.have, self.wish, self.method, self.measured, self.lost)
        return f"| {' | '.join(cells)} |"


def load(name: str) -> Result:
    """Read a result file."""
    result: Result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def show_points(interval: dict[str, float]) -> str:
    """Return a difference of accuracies in points, with its interval."""
    mean, low, high = (100 * interval[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def show_cost(subject: str, row: Result, before: float) -> str:
    """Return FLOPs and milliseconds of one setting beside those of the plain model."""
    return (
        f"{subject}: {row['flops_ratio']:.2f} of the FLOPs, {row['ms']:.0f} of {before:.0f} ms "
        f"({row['time_ratio']:.2f})"
    )


def name_model(found: Result) -> str:
    """Return the name of a model without its remark."""
    name: str = found["name"]
    return name.split(" (")[0]


def show_setting(methods: Result, label: str, model: str = MODEL) -> tuple[str, str]:
    """Return cost and loss of a setting of `methods.json`, or that there is none."""
    found = methods["models"][model]
    row = found["settings"].get(label)
    if row is None:
        return NOTHING, NOTHING
    subject = f"{name_model(found)}, {label.split()[1]}"
    return show_cost(subject, row, row["plain_ms"]), f"{show_points(row['lost'])} points"


def show_exit(result: Result) -> str:
    """Return what leaving early saves where half of the images leave."""
    case = result["cases"]["half"]
    left = sum(n for block, n in case["left_at"].items() if block != "12")
    ratio = case["wall_ms"] / result["plain_ms"]
    row = {"flops_ratio": 1 - case["flops_saved"], "ms": case["wall_ms"], "time_ratio": ratio}
    subject = f"ViT-S/16, {left} of {result['batch']} images leave early"
    return show_cost(subject, row, result["plain_ms"])


def show_tuned(result: Result) -> str:
    """Return how near the cells come to those of the unwrapped model, before and after."""
    cells = result["runs"]["router and dechunker"]["keep"]["0.5"]["cells"]
    before, after = (cells[key]["mean"] for key in ("untuned", "tuned"))
    return f"cosine of cells {before:.2f} before, {after:.2f} after"


def show_reference(result: Result, name: str) -> str:
    """Return what DC-DiT costs beside DiT with some tail drop."""
    row, base = result["models"][f"DC-DiT {name}"], result["models"]["DiT/2"]
    subject = f"S beside DiT-S/2, {row['tokens']:.0f} of {base['tokens']:.0f} tokens"
    return show_cost(subject, row, base["ms"])


def list_decisions(methods: Result) -> list[Decision]:
    """Return the lines of the first table."""
    tome, tome_loss = show_setting(methods, "tome r=13")
    clip, clip_loss = show_setting(methods, "tome r=13", OTHER)
    dc, dc_loss = show_setting(methods, "dc keep=0.5")
    evit, evit_loss = show_setting(methods, "evit keep=0.5")
    apt, apt_loss = show_setting(methods, "apt keep=0.5")
    dit = show_reference(load("dcdit-s-cpu-eager"), "packed rho 0.6")
    share = load("upcycling")["share_of_flops_by_loss"]["0.4"]
    upcycled = f"{share:.2f} of the training FLOPs down to a loss of .4, on a small model"
    vit, trained = "a trained ViT", "a trained DiT"
    tome_page, exits = "[`tome`](methods/tome.md)", "methods/exit.md"
    caches = "[`teacache`, `firstblock`, `taylorseer`](methods/caches.md)"
    return [
        Decision(vit, "no training, the least loss", tome_page, tome, tome_loss),
        Decision("CLIP's image tower", "the same", tome_page, clip, clip_loss),
        Decision(vit, "no training, half of the time", "[`dc`](methods/dc.md)", dc, dc_loss),
        Decision(vit, "few tokens where pixels are smooth", "[`apt`](methods/apt.md)", apt,
                 apt_loss),
        Decision("a ViT, class token", "no training, what the class token attends to",
                 "[`evit`](methods/evit.md)", evit, evit_loss),
        Decision("a ViT, unlabelled images", "easy images leave early", f"[`exit`]({exits})",
                 show_exit(load("exit-cpu"))),
        Decision("a ViT, and a training run", "a trained predictor that drops tokens",
                 "[`dynamicvit`](methods/dynamicvit.md)"),
        Decision(vit, "a wrap that fits it better", "[`adaptok tune`](training.md)",
                 lost=show_tuned(load("tune"))),
        Decision(trained, "fewer tokens, every cell back after each block",
                 "[`tomesd`](methods/tomesd.md)"),
        Decision(trained, "many steps, some of them reused", caches),
        Decision(trained, "fewer blocks at noisy steps", f"[`schedule`]({exits})"),
        Decision("a DiT, and a training run", "fewer heads and channels by step",
                 "[`width`](methods/dydit.md)"),
        Decision(trained, "tokens finer than its patches", "[`adaptok.upcycle`](training.md)",
                 upcycled),
        Decision("nothing yet, and images", "a diffusion model with any budget",
                 "[`DCDiT`](speed.md)", dit),
    ]  # fmt: skip


def compare(methods: Result) -> str:
    """Return the lines of the second table: all methods at half of the tokens, by their loss."""
    settings = methods["models"][MODEL]["settings"]
    found = [(name, settings[f"{name} keep=0.5"]) for name in COMPARED
             if f"{name} keep=0.5" in settings]  # fmt: skip
    found.sort(key=lambda one: one[1]["lost"]["mean"])
    lines = []
    for name, row in found:
        over = "" if name in FLOORS else show_points(row["over_floor"])
        lines.append(
            f"| {'*' if name in FLOORS else '`'}{name}{'*' if name in FLOORS else '`'} "
            f"| {row['tokens']:.0f} | {row['flops_ratio']:.2f} | {row['ms']:.0f} "
            f"| {row['time_ratio']:.2f} | {show_points(row['lost'])} | {over} |"
        )
    return "\n".join(lines)


def name_missing(methods: Result) -> str:
    """Say which methods were not measured at half of the tokens."""
    settings = methods["models"][MODEL]["settings"]
    missing = [name for name in COMPARED if f"{name} keep=0.5" not in settings]
    if not missing:
        return "All methods of the kind were measured."
    return f"Not measured at half of the tokens: {', '.join(f'`{name}`' for name in missing)}."


def render() -> str:
    """Return the page."""
    methods, overhead, compiled = load("methods"), load("overhead"), load("vit-compiled-cpu")
    model, machine = methods["models"][MODEL], methods["machine"]
    full = next(row for row in compiled["rows"] if row["name"] == "keep=1")
    equal = load("dcdit-s-cpu-compiled")["models"]["DC-DiT packed rho 0"]
    values = {
        "DECISIONS": "\n".join(map(str, list_decisions(methods))),
        "SIDE_BY_SIDE": compare(methods),
        "MISSING": name_missing(methods),
        "MODEL": model["name"],
        "QUERIES": str(methods["setting"]["queries"]),
        "MACHINE": f"{machine['device']}, {machine['threads']} thread",
        "BATCH": str(model["batch"]),
        "PLAIN": f"{model['accuracy']['mean']:.3f}",
        "OVERHEAD": f"{overhead['ratio']['wrapped, all kept']:.3f}",
        "OVERHEAD_COMPILED": f"{full['ms'] / compiled['base']['ms']:.2f}",
        "EQUAL_FLOPS": f"{equal['flops_ratio']:.2f}",
        "EQUAL_TIME": f"{equal['time_ratio']:.2f}",
        "UPCYCLING": f"{load('upcycling')['share_of_flops_with_the_dit']:.2f}",
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def show_row(what: str, tokens: str, flops: float, before: float, after: float) -> str:
    """Return a line of the table of README.md."""
    cells = (what, tokens, f"{flops:.2f}", f"{before:,.0f}", f"{after:,.0f}")
    return f"| {' | '.join(cells)} | {after / before:.2f} |"


def render_figures() -> str:
    """Return the table of README.md: what was timed beside the plain model, where it loses too."""
    tome, leaving = load("tome-speed-vits-cpu"), load("exit-cpu")
    graphs, eager = load("vit-compiled-cpu"), load("dcdit-s-cpu-eager")
    compiled = load("dcdit-s-cpu-compiled")
    half = leaving["cases"]["half"]
    rows = [
        "| model and method | tokens | FLOPs | ms, plain | ms | time |",
        "|---|---|---|---|---|---|",
        show_row("ViT-S/16, batch 16: `tome`, r=13", "40 of 196 at the end",
                 tome["gflops"]["r=13"] / tome["gflops"]["plain"], tome["ms"]["plain"],
                 tome["ms"]["r=13"]),
        show_row("ViT-S/16, batch 16: `exit`, half of the images leave early", "all",
                 1 - half["flops_saved"], leaving["plain_ms"], half["wall_ms"]),
    ]  # fmt: skip
    for row in graphs["rows"]:
        name = f"ViT-B/16, batch {graphs['batch']}, compiled: `dc`, {row['name']}"
        tokens = f"{row['computed']['mean']:.0f} of {graphs['cells']}"
        flops = row["gflops"] / graphs["base"]["gflops"]
        rows.append(show_row(name, tokens, flops, graphs["base"]["ms"], row["ms"]))
    for mode, result, drops in (("eager", eager, ("0.6",)), ("compiled", compiled, ("0.6", "0"))):
        base = result["models"]["DiT/2"]
        for drop in drops:
            row = result["models"][f"DC-DiT packed rho {drop}"]
            name = f"DC-DiT-S beside DiT-S/2, batch 4, {mode}: drop {drop}"
            tokens = f"{row['tokens']:.0f}, DiT {base['tokens']:.0f}"
            rows.append(show_row(name, tokens, row["flops_ratio"], base["ms"], row["ms"]))
    return "\n".join(rows) + "\n"


def insert_figures(text: str) -> str:
    """Return a text with the table between its two marks."""
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise ValueError(f"README.md needs the lines {BEGIN.strip()} and {END}")
    return head + BEGIN + "\n" + render_figures() + "\n" + END + tail


def main() -> int:
    """Write page and table, or say whether they are as the result files are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it differs")
    options = parser.parse_args()
    wanted = {PAGE: render(), README: insert_figures(README.read_text(encoding="utf-8"))}
    if options.check:
        return int(any(path.read_text(encoding="utf-8") != text for path, text in wanted.items()))
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
