"""The table of hosts: every promise of a wrap, tried on every architecture of the catalogue.

`python -m benchmarks.hosts --save` prints the table and writes `benchmarks/results/hosts.json`;
`python -m benchmarks.hosts_page` makes `docs/hosts.md` of it. Hosts are built at their smallest,
with weights that all matter.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from adaptok.errors import AdaptokError, HostOptionError
from benchmarks.architectures import CASES, HostCase
from benchmarks.host_checks import CHECKS, BrokenPromiseError, quietly, wrap_case

LIBRARIES = ("torch", "timm", "diffusers", "transformers")
RESULTS = Path(__file__).parent / "results" / "hosts.json"


@dataclass(slots=True)
class Row:
    """What was seen on one host.

    Args:
        name: the architecture.
        state: "runs", "refused" (with the reason) or "broken".
        reason: why it was refused, or what is broken.
        cells: findings by check.
        broken: failures by check.
        seconds: how long it took.
    """

    name: str
    state: str = "runs"
    reason: str = ""
    cells: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def try_host(case: HostCase, checks: list[str]) -> Row:
    """Wrap a host and run every check."""
    row, start = Row(case.name), time.perf_counter()
    try:
        wrapped = wrap_case(case)
        for name in checks:
            try:
                row.cells[name] = quietly(lambda name=name: CHECKS[name](wrapped))
            except HostOptionError as error:  # said at the first call: this input is not served
                row.state, row.reason = "refused", f"{type(error).__name__}: {error}"
                break
            except BrokenPromiseError as broken:
                row.cells[name], row.broken[name] = "BROKEN", str(broken)
            except Exception as error:
                row.cells[name], row.broken[name] = "BROKEN", f"{type(error).__name__}: {error}"
    except AdaptokError as error:
        row.state, row.reason = "refused", f"{type(error).__name__}: {error}".splitlines()[0]
    if row.broken:
        row.state = "broken"
        row.reason = "; ".join(f"{k}: {v.splitlines()[0]}" for k, v in row.broken.items())
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def format_table(rows: list[Row]) -> str:
    """Return a Markdown table."""
    names = list(CHECKS)
    lines = ["| host | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for row in rows:
        if row.state == "refused":
            lines.append(f"| {row.name} | refused: {row.reason} |" + " |" * (len(names) - 1))
            continue
        cells = [row.cells.get(name, "not run") for name in names]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Try the hosts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the names to try")
    parser.add_argument("--checks", default="", help="checks to run, separated by commas")
    parser.add_argument("--candidates", action="store_true", help="try unsupported ones too")
    parser.add_argument("--save", action="store_true", help="write the results")
    options = parser.parse_args()
    checks = [c for c in CHECKS if not options.checks or c in options.checks.split(",")]
    rows = []
    for case in CASES:
        wanted = options.candidates or case.family != "diffusers-extra"
        if wanted and options.only in case.name:
            row = try_host(case, checks)
            rows.append(row)
            print(f"{row.state:8} {row.seconds:5.1f} s  {row.name}  {row.reason}", flush=True)
    counts = {state: sum(row.state == state for row in rows) for state in ("runs", "refused")}
    counts["broken"] = len(rows) - sum(counts.values())
    print(format_table(rows))
    print(", ".join(f"{state} {count}" for state, count in counts.items()))
    if options.save:
        content = {
            "versions": {name: version(name) for name in LIBRARIES},
            "checks": checks,
            "counts": counts,
            "rows": [asdict(row) for row in rows],
        }
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
