"""Claim: a training step of DC-DiT takes hardly longer than one of the fixed-patch DiT.

Times forward and backward pass with the losses of training, both models on equal tokens,
interleaved in one run, both compiled or both eager; and the peak memory of each.

    python benchmarks/train_step.py --scale S --batch 4 --output results/train-step-cpu.json
    python benchmarks/train_step.py --scale B --batch 32 --device cuda --dtype bfloat16
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dcdit_vs_dit import (
    PATCH,
    SPREAD,
    GivenRouter,
    fill,
    make_probabilities,
    precision,
    spread_counts,
)
from timing import describe_machine

import adaptok
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DiTConfig
from adaptok.losses import ratio_loss
from adaptok.measure import measure_interleaved, measure_peak


def make_models(options: argparse.Namespace, device: torch.device) -> dict[str, torch.nn.Module]:
    """Return both models, and each once more with parts that are computed again."""
    side, b = options.latent, options.batch
    counts = spread_counts(b, side * side, (side // PATCH) ** 2, SPREAD)
    prob = make_probabilities(counts, side * side).to(device)
    models: dict[str, torch.nn.Module] = {}
    for checkpointed in (False, True):
        behind = ", checkpointed" if checkpointed else ""
        shared: dict[str, Any] = {
            "scale": options.scale,
            "latent_size": side,
            "gradient_checkpointing": checkpointed,
        }
        models[f"DiT/{PATCH}{behind}"] = DiT(DiTConfig(patch_size=PATCH, **shared))
        adaptive = adaptok.DCDiT(adaptok.DCDiTConfig(**shared))
        models[f"DC-DiT{behind}"] = adaptive
    shared["gradient_checkpointing"] = "convolutions"
    models["DC-DiT, convolutions again"] = adaptok.DCDiT(adaptok.DCDiTConfig(**shared))
    for name, model in models.items():
        model.to(device).train()
        fill(model)
        if isinstance(model, adaptok.DCDiT):
            model.router = GivenRouter(model.router, prob)
            if options.mode == "compiled":
                adaptok.compile(model)
        elif options.mode == "compiled":
            model.compile()
        models[name] = model
    return models


def make_step(
    model: torch.nn.Module, options: argparse.Namespace, device: torch.device
) -> Callable[[], None]:
    """Return one forward and backward pass."""
    side, b = options.latent, options.batch
    x = torch.randn(b, 4, side, side, device=device)
    t = torch.randint(0, 1000, (b,), device=device)
    y = torch.randint(0, 1000, (b,), device=device)
    target = torch.randn_like(x)
    dtype = getattr(torch, options.dtype)

    def step() -> None:
        with precision(device, dtype):
            out, routing = model(x, t, y, return_routing=True)
            loss = (out[:, :4].float() - target).square().mean()
            if routing is not None:
                loss = loss + 0.03 * ratio_loss(routing, 4.0)
        loss.backward()
        model.zero_grad()

    return step


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="B")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent in cells")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mode", choices=("compiled", "eager"), default="compiled")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    models = make_models(options, device)
    steps = {name: make_step(model, options, device) for name, model in models.items()}
    plain = {name: step for name, step in steps.items() if "checkpointed" not in name}
    times = measure_interleaved(plain, repeats=options.repeats, warmup=2)
    weights = {name: sum(p.nbytes for p in model.parameters()) for name, model in models.items()}
    rows: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        rows[name] = {
            "weights_mb": round(weights[name] / 1e6, 1),
            "peak_mb": round(measure_peak(step, device) / 1e6, 1),
        }
        if name in times:
            rows[name]["ms"] = round(times[name].median_ms, 1)
            rows[name]["spread"] = round(times[name].spread, 3)
    dense = rows[f"DiT/{PATCH}"]
    for name, row in rows.items():
        beside = rows[f"DiT/{PATCH}, checkpointed"] if "checkpointed" in name else dense
        # gradients are in the peak; weights and both moments of the optimiser are there, too
        held = [3 * known["weights_mb"] + known["peak_mb"] for known in (row, beside)]
        row["memory_ratio"] = round(held[0] / held[1], 3)
        row["peak_ratio"] = round(row["peak_mb"] / beside["peak_mb"], 3)
        if "ms" in row:
            row["time_ratio"] = round(row["ms"] / dense["ms"], 3)
        print(name, row)
    if options.output:
        settings = {k: v for k, v in vars(options).items() if k != "output"}
        result = {"settings": settings, "machine": describe_machine(device), "models": rows}
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
