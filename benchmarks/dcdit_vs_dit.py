"""Claim: the FLOPs that DC-DiT saves are saved milliseconds.

Times DC-DiT beside the fixed-patch DiT that a user would otherwise run, on equal tokens and at
several tail drops, interleaved in one run, both compiled or both eager. Kept counts are given, as
spread over the samples as those of a trained router; the router itself runs all the same.

    python benchmarks/dcdit_vs_dit.py --scale S --batch 4 --output results/dcdit-s-cpu.json
    python benchmarks/dcdit_vs_dit.py --scale XL --batch 32 --device cuda --dtype bfloat16
    python benchmarks/dcdit_vs_dit.py --scale XL --latent 64 --batch 16 --device cuda \
        --dtype bfloat16
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timing import describe_machine
from torch import Tensor

import adaptok
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DiTConfig
from adaptok.measure import count_flops, measure_interleaved

PATCH = 2
SPREAD = 0.25  # coefficient of variation of the kept counts; a trained router has at least .2
LAYOUTS = ("packed", "bucketed", "fixed")


class GivenRouter(adaptok.Router):
    """Runs a router, and answers with other probabilities.

    Args:
        router: what is run.
        keep_prob: the answer, `(b n)`.
    """

    def __init__(self, router: adaptok.Router, keep_prob: Tensor) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("keep_prob", keep_prob)

    def forward(self, tokens: adaptok.Tokens, context: adaptok.Context) -> adaptok.Routing:
        """Judge the cells, and answer with what was given."""
        routing = self.router(tokens, context)
        return adaptok.Routing(self.keep_prob + 0.0 * routing.keep_prob)


def spread_counts(b: int, n: int, mean: int, spread: float) -> Tensor:
    """Return kept counts with a given mean and coefficient of variation, in a shuffled order."""
    if b == 1:
        return torch.tensor([mean])
    steps = torch.linspace(-1, 1, b)
    counts = (mean * (1 + spread * steps / steps.std(unbiased=False))).round().long()
    counts[0] += mean * b - counts.sum()
    return counts[torch.randperm(b, generator=torch.Generator().manual_seed(0))].clamp(1, n)


def make_probabilities(counts: Tensor, n: int) -> Tensor:
    """Return keep probabilities of which so many are above the threshold, at random cells."""
    generator = torch.Generator().manual_seed(1)
    rank = torch.rand(len(counts), n, generator=generator).argsort(1).argsort(1)
    inside = rank < counts[:, None]
    noise = torch.rand(len(counts), n, generator=generator)
    return torch.where(inside, 0.55 + 0.4 * noise, 0.05 + 0.4 * noise)


def fill(model: torch.nn.Module) -> None:
    """Give every trainable weight a value that is not zero."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)


@contextmanager
def precision(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Run in a precision, by autocast."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        yield


def make_calls(
    options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Callable[[], object]], dict[str, dict[str, Any]]]:
    """Return what is timed, and what is known of it, by name."""
    side, b = options.latent, options.batch
    cells, patches = side * side, (side // PATCH) ** 2
    counts = spread_counts(b, cells, patches, SPREAD)
    prob = make_probabilities(counts, cells).to(device)
    x = torch.randn(b, 4, side, side, device=device)
    t = torch.randint(0, 1000, (b,), device=device)
    y = torch.randint(0, 1000, (b,), device=device)
    dit_config = DiTConfig(scale=options.scale, patch_size=PATCH, latent_size=side)
    dit: Any = DiT(dit_config).eval().to(device)
    fill(dit)
    if options.mode == "compiled":
        dit.compile()
    calls: dict[str, Callable[[], object]] = {f"DiT/{PATCH}": lambda: dit(x, t, y)}
    base = count_flops(dit_config, (side, side), [patches] * b)
    facts = {f"DiT/{PATCH}": {"tokens": patches, "variation": 0.0, "flops_ratio": 1.0}}
    shared = None
    for layout in options.layouts:
        sigma = 1.0 if side <= 32 else 2.0
        config = adaptok.DCDiTConfig(
            scale=options.scale, latent_size=side, layout=layout, dechunk_sigma=sigma
        )
        model = adaptok.DCDiT(config).eval().to(device)
        if shared is None:
            fill(model)
            shared = model.state_dict()
        model.load_state_dict(shared)
        model.router = GivenRouter(model.router, prob)
        if options.mode == "compiled":
            graphs = "reduce-overhead" if layout == "fixed" and device.type == "cuda" else None
            adaptok.compile(model, mode=graphs)
        for rho in options.rho:
            kept = counts - (rho * counts.float()).floor().long()
            if layout == "fixed":
                kept = torch.full_like(counts, round(float(kept.float().mean())))
            budget = {"tokens": int(kept[0])} if layout == "fixed" else {"drop": rho}
            name = f"DC-DiT {layout} rho {rho:g}"
            calls[name] = lambda model=model, budget=budget: model(x, t, y, **budget)
            flops = count_flops(config, (side, side), kept.tolist())
            facts[name] = {
                "tokens": round(float(kept.float().mean()), 1),
                "variation": round(
                    float(kept.float().std(unbiased=False) / kept.float().mean()), 3
                ),
                "flops_ratio": round(flops / base, 3),
            }
    return calls, facts


def profile_regions(options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Return the milliseconds of each region of the packed model at the first tail drop."""
    seen: dict[str, list[float]] = {}
    calls, _ = make_calls(options, device)
    call = calls[f"DC-DiT {options.layouts[0]} rho {options.rho[0]:g}"]
    model = call.__defaults__[0]

    def timed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def run_timed(*args: Any, **kwargs: Any) -> Any:
            out: list[Any] = []
            one = measure_interleaved(
                {name: lambda: out.append(run(*args, **kwargs))}, repeats=1, warmup=0
            )
            seen.setdefault(name, []).append(one[name].median_ms)
            return out[0]

        return run_timed

    for part in (model, model.chunker):
        for name in part.regions:
            part.compiled_regions[name] = timed(name, part.region(name))
    with torch.inference_mode(), precision(device, getattr(torch, options.dtype)):
        whole = measure_interleaved({"whole": call}, repeats=5, warmup=3)["whole"]
    parts = {name: sorted(values)[len(values) // 2] for name, values in seen.items()}
    rest = whole.median_ms - sum(parts.values())
    return {name: round(ms, 2) for name, ms in (parts | {"the rest": rest}).items()}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="S")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent in cells")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--mode", choices=("compiled", "eager"), default="compiled")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--rho", nargs="+", type=float, default=[0.0, 0.2, 0.4, 0.6])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    calls, facts = make_calls(options, device)
    with torch.inference_mode(), precision(device, getattr(torch, options.dtype)):
        times = measure_interleaved(calls, repeats=options.repeats, warmup=3)
    base = times[f"DiT/{PATCH}"].median_ms
    print(f"{'':28} tokens  variation  FLOPs   time     ms  spread")
    for name, timing in times.items():
        known = facts[name]
        known |= {
            "ms": round(timing.median_ms, 2),
            "spread": round(timing.spread, 3),
            "time_ratio": round(timing.median_ms / base, 3),
        }
        print(
            f"{name:28} {known['tokens']:6g}  {known['variation']:9.2f}  "
            f"{known['flops_ratio']:5.2f}  {known['time_ratio']:5.2f}  {known['ms']:6.1f}  "
            f"{known['spread']:6.2f}"
        )
    profile = profile_regions(options, device)
    print("ms by region:", ", ".join(f"{name} {ms:g}" for name, ms in profile.items()))
    if options.output:
        settings = {k: v for k, v in vars(options).items() if k not in ("output", "rho", "layouts")}
        result = {
            "settings": settings,
            "machine": describe_machine(device),
            "models": facts,
            "ms_by_region": profile,
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
