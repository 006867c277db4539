"""`adaptok plan`: the budget that meets a time on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from adaptok.cli.options import Batch, Chunker, Device, Dtype, MeasuredModel, Router, Size, Threads


def plan(
    model: MeasuredModel,
    target_ms: Annotated[
        float | None,
        typer.Option(
            "--target-ms",
            metavar="MS",
            help="Milliseconds that a call of the whole batch may take. Default: none, the times "
            "of all budgets are shown.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            metavar="0..1",
            help="A share of the cells whose time is asked for, instead of a target.",
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
        bool, typer.Option("--compile", help="Measure the compiled model; takes minutes to start.")
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="Measured calls of a budget in each of two rounds.")
    ] = 7,
    points: Annotated[int, typer.Option(min=2, help="Budgets of the first round.")] = 5,
    threads: Threads = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the plan as JSON; - prints nothing else."
        ),
    ] = None,
) -> None:
    """Find the budget that meets a time here, and say what does not pay.

    The model without its stages and some budgets take turns in one run; a second round looks
    closer at the answer. Plans hold for this machine, precision, batch and size only.

    Example: `adaptok plan vit_small_patch16_224 --target-ms 120 --batch 4`
    """
    from adaptok.cli.planning import Planning, run_plan

    run_plan(
        Planning(
            model=model,
            target_ms=target_ms,
            keep=keep,
            chunker=chunker,
            router=router,
            batch=batch,
            size=size,
            device=device,
            dtype=dtype,
            compile=compile,
            repeats=repeats,
            points=points,
            threads=threads,
            json=json,
        )
    )
