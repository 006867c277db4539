"""`adaptok bench`: what budgets cost and save on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from adaptok.cli.options import Batch, Chunker, Device, Dtype, MeasuredModel, Router, Size, Threads


def bench(
    model: MeasuredModel,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="KEEP|KIND=VALUE",
            help="0.5, keep=0.5, tokens=98, drop=0.3, drop=0,uncond_drop=0.9 or natural; may be "
            "given several times. Default: 1, 0.7, 0.5 and 0.3.",
            show_default=False,
        ),
    ] = None,
    chunker: Chunker = None,
    router: Router = None,
    batch: Batch = 8,
    size: Size = None,
    device: Device = None,
    dtype: Dtype = "float32",
    compile: Annotated[
        bool, typer.Option("--compile", help="Run both sides compiled; takes minutes to start.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds; figures are medians.")] = 10,
    threads: Threads = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the report as JSON; - prints nothing else."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw the report: .png, .svg or .pdf."),
    ] = None,
) -> None:
    """Measure what budgets cost and save: tokens, FLOPs, time, memory and agreement.

    The model without its stages and all budgets take turns in one run. A model that is not a
    trained DCDiT has random weights: speed does not depend on them, agreement does.

    Example: `adaptok bench vit_small_patch16_224 --budget 0.5 --budget 0.3`
    """
    from adaptok.cli.benching import Benching, run_bench

    run_bench(
        Benching(
            model=model,
            budgets=tuple(budget or ()),
            chunker=chunker,
            router=router,
            batch=batch,
            size=size,
            device=device,
            dtype=dtype,
            compile=compile,
            repeats=repeats,
            threads=threads,
            json=json,
            plot=plot,
        )
    )
