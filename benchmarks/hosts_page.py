"""The page `docs/hosts.md`, made from `benchmarks/results/hosts.json`.

`python -m benchmarks.hosts_page` writes it; a test keeps page and results together.
"""

import json
from pathlib import Path

from benchmarks.hosts import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "hosts.md"
HEAD = """# Hosts

Which architectures `adaptok.wrap` knows, and what was seen on each. Made by `python -m benchmarks.hosts
--save` and `python -m benchmarks.hosts_page` with {versions}; do not edit by hand.

Each host is built at its smallest from its library's own class, all parameters filled with values that
matter (gates, LayerScale and final layers too), and called with three unlike samples on a grid that
is not square. {runs} of {total} run, {refused} are refused, {broken} are broken.

| column | what was seen |
|---|---|
| identity | largest difference to the host, relative, with every cell kept and router, chunker and dechunker run |
| kept at .5 | tokens computed of those there are; the output moved by more than 1 % |
| unwrap | the host bit for bit, its keys, hooks and attributes |
| copies | deepcopy and pickle compute the same, with weights of their own |
| state dict | goes round; the host's own checkpoint loads with only keys of adaptok missing |
| fullgraph | `torch.compile(fullgraph=True)` captures one graph with the same values |
| router gradient | largest gradient of the router's last layer |
| batch of one | largest difference of a sample alone to itself in a batch that keeps 20, 50 and 90 % |
| positions | whether samples that keep other cells run together, or one by one |
| checkpointed peak | live memory of a checkpointed training step over that of the host (at most 1.2); the gradients are the same |
| options refused | what reaches into single blocks and raises by name |

Class and keys are the host's own in every row.

"""


def write_page(content: dict) -> str:
    """Return the page."""
    rows = content["rows"]
    columns = [name for name in content["checks"] if name != "class and keys"]
    counts = content["counts"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [
        HEAD.format(versions=versions, total=len(rows), **counts),
        "| host | " + " | ".join(columns) + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    for row in rows:
        if row["state"] != "refused":
            cells = [row["cells"].get(name, "not run") for name in columns]
            lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    lines += ["", "Refused, with the reason:", ""]
    lines += [f"- **{row['name']}**: {row['reason']}" for row in rows if row["state"] == "refused"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(write_page(json.loads(RESULTS.read_text())))
