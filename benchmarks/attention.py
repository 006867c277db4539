"""Claim: on a CPU one call per sample is the fastest way to attend over packed tokens.

Times the rungs of the attention ladder on packed tokens of several length patterns; on a GPU
also the variable-length kernel, in bfloat16.

    python benchmarks/attention.py --output benchmarks/results/attention-cpu.json
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from timing import describe_machine, time_interleaved

from adaptok.attention import Ragged, Rung, attend_packed
from adaptok.tokens import starts_of

HEADS, FEATURES = 4, 56
PATTERNS = {
    "16 samples of 256 tokens": [256] * 16,
    "16 samples of 100 to 500 tokens": [100 + 25 * sample for sample in range(16)],
    "64 samples of 30 to 60 tokens": [30 + sample % 31 for sample in range(64)],
    "4 samples of 1,024 tokens": [1024] * 4,
}


def make_call(lengths: list[int], rung: Rung, device: torch.device) -> Callable[[], object]:
    """Return one attention call over packed tokens."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    counts = torch.tensor(lengths, device=device)
    batch = torch.arange(len(lengths), device=device).repeat_interleave(counts)
    ragged = Ragged(batch, starts_of(counts), tuple(lengths), rung)
    qkv = torch.randn(3, sum(lengths), HEADS, FEATURES, device=device).to(dtype)
    return lambda: attend_packed(qkv[0], qkv[1], qkv[2], ragged)


def main() -> None:
    """Measure all patterns, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="interleaved repeats")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rungs: tuple[Rung, ...] = ("padded", "loop")
    if device.type == "cuda":
        rungs = ("varlen", *rungs)
    figures = {}
    for name, lengths in PATTERNS.items():
        calls = {rung: make_call(lengths, rung, device) for rung in rungs}
        with torch.no_grad():
            timings = time_interleaved(calls, arguments.rounds, device)
        figures[name] = {rung: asdict(timing) for rung, timing in timings.items()}
        row = "".join(f"{rung:>10} {timing.median:8.2f} ms" for rung, timing in timings.items())
        print(f"{name:34}{row}")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "command": "python benchmarks/attention.py",
            "machine": describe_machine(device),
            "unit": f"ms a call, {HEADS} heads of {FEATURES}, median and quartiles",
            "figures": figures,
        }
        arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
