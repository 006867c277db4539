"""Whether blocks that are not run are time that is not spent: a ViT whose images leave apart.

`python benchmarks/exit_speed.py --output benchmarks/results/exit-cpu.json` times a timm ViT-S/16 at
batch 16 whose images leave at a half and three quarters of the depth in several mixtures, against
the same wrapped model from which nobody leaves, and the unwrapped one, in turns. Who leaves is laid
down by thresholds between the confidences of heads of random weights; the heads run in every case.
Two clocks are read: the wall, and the time that the process itself worked (`work`), which other
processes on a busy machine do not lengthen. Shares are medians over rounds of neighbours.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from adaptok_exit.confidence import ConfidenceExit
from timing import describe_machine
from torch import Tensor, nn

import adaptok
from adaptok.testing.models import fill_weights
from adaptok.trace_step import TraceStep

LIMIT = 0.8  # of the share of time saved over the share of FLOPs saved
# images of 16 that leave at the first and at the second exit
MIXTURES = {"quarter": (2, 2), "half": (4, 4), "most": (8, 4), "all": (16, 0)}


@dataclass(frozen=True, slots=True)
class Taken:
    """What one run took, in seconds.

    Args:
        wall: by the clock on the wall.
        work: by the clock of the process, over all its threads.
    """

    wall: float
    work: float


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    plain = timm.create_model(options.model).eval()
    model = timm.create_model(options.model).eval()
    model.load_state_dict(plain.state_dict())
    adaptok.wrap(model, stack=["exit"])
    stage = model.blocks.adaptok["exit"]
    fill_weights(stage)
    images = torch.randn(16, 3, 224, 224)
    images *= torch.linspace(0.3, 3.0, 16)[:, None, None, None]
    with torch.no_grad():
        assert torch.equal(plain(images), model(images))
        thresholds = {"nobody": None} | {
            name: divide(model, stage, images, first, second)
            for name, (first, second) in MIXTURES.items()
        }
        load = os.getloadavg()[0]
        calls: dict[str, Callable[[], object]] = {"plain": lambda: plain(images)}
        for name, threshold in thresholds.items():
            calls[name] = partial(run, model, stage, images, threshold)
        turns = take_turns(calls, options.repeats)
        result: dict[str, Any] = {
            "model": options.model,
            "batch": 16,
            "machine": describe_machine(torch.device("cpu")),
            "load_before": round(load, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "repeats": options.repeats,
            "limit": LIMIT,
            "plain_ms": round(1000 * median(turn["plain"].wall for turn in turns), 1),
            "heads_cost": round(-saved(turns, "plain", "nobody", "work"), 4),
            "cases": {},
        }
        whole = trace_once(model, stage, images, None)
        for name, threshold in thresholds.items():
            step = trace_once(model, stage, images, threshold)
            assert step.depths is not None
            flops_saved = 1 - step.flops / whole.flops
            case = {
                "left_at": {
                    str(d): step.depths.tolist().count(d) for d in step.depths.unique().tolist()
                },
                "wall_ms": round(1000 * median(turn[name].wall for turn in turns), 1),
                "work_ms": round(1000 * median(turn[name].work for turn in turns), 1),
                "gflops": round(step.flops / 1e9, 2),
                "flops_saved": round(flops_saved, 4),
            }
            if name != "nobody":
                for clock in ("wall", "work"):
                    share = saved(turns, "nobody", name, clock)
                    case[f"{clock}_saved"] = round(share, 4)
                    case[f"{clock}_ratio"] = round(share / flops_saved, 3)
            result["cases"][name] = case
    for clock in ("wall", "work"):
        found = [case.get(f"{clock}_ratio") for case in result["cases"].values()]
        result[f"smallest_{clock}_ratio"] = min(ratio for ratio in found if ratio is not None)
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


def take_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> list[dict[str, Taken]]:
    """Run everything in turns, and return what each run took; two rounds are not counted."""
    turns = []
    for number in range(repeats + 2):
        turn = {}
        for name, call in calls.items():
            wall, work = time.perf_counter(), time.process_time()
            call()
            turn[name] = Taken(time.perf_counter() - wall, time.process_time() - work)
        if number >= 2:
            turns.append(turn)
    return turns


def saved(turns: Sequence[Mapping[str, Taken]], first: str, second: str, clock: str) -> float:
    """Return the share of the time of one call that another one saves, a median over the rounds."""
    return median(1 - getattr(turn[second], clock) / getattr(turn[first], clock) for turn in turns)


def divide(
    model: nn.Module, stage: ConfidenceExit, images: Tensor, first: int, second: int
) -> tuple[float, float]:
    """Return thresholds with which so many images leave at each exit."""
    with stage.record() as records:
        model(images)
    sure = [
        judge(call).sigmoid().double()
        for judge, call in zip(stage.judges, records[0].exits, strict=True)
    ]
    order = sure[0].argsort(descending=True)
    return (
        cut(sure[0][order], first),
        cut(sure[1][order[first:]].sort(descending=True)[0], second),
    )


def cut(falling: Tensor, count: int) -> float:
    """Return a threshold above which so many lie."""
    if count == 0:
        return 1.0
    edges = torch.cat([falling, falling.new_zeros(1)])
    return float((edges[count - 1] + edges[count]) / 2)


def run(
    model: nn.Module, stage: ConfidenceExit, images: Tensor, threshold: tuple[float, float] | None
) -> Tensor:
    """Run the model with a threshold."""
    stage.set_threshold(threshold)
    out: Tensor = model(images)
    return out


def trace_once(
    model: nn.Module, stage: ConfidenceExit, images: Tensor, threshold: tuple[float, float] | None
) -> TraceStep:
    """Return what a pass did."""
    with adaptok.trace(model) as seen:
        run(model, stage, images, threshold)
    return seen.steps[0]


if __name__ == "__main__":
    main()
