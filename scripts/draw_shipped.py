"""Draw the pictures of the shipped model that the README shows: two of those of `adaptok demo`.

Usage: python scripts/draw_shipped.py [--output docs/pictures]

Writes keep-maps.png (where tokens go along one trajectory) and samples-by-budget.png (the same
seeds under five budgets, with milliseconds of this machine). Takes a few minutes on a CPU.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from adaptok.cli.settings import Tour
from adaptok.cli.tour import give_tour

PICTURES = {
    "1_samples_by_budget.png": "samples-by-budget.png",
    "2_keep_probability.png": "keep-maps.png",
}


def main() -> int:
    """Run the demo in a folder of its own, and take its pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"), help="folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        give_tour(Tour(output=demo, model="dcdit-emoji32", seed=0, steps=20, train_steps=2))
        for name, target in PICTURES.items():
            shutil.copyfile(demo / name, options.output / target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
