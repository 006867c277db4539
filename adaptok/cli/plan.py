"""`adaptok plan`: the budget that meets a time on this machine."""

from pathlib import Path
from typing import Annotated

import typer


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FOLDER",
            help="A timm name such as vit_small_patch16_224, a folder with the config.json of a "
            "model of transformers or diffusers, or a DCDiT: the name of one that ships with "
            "adaptok, or its folder.",
        ),
    ],
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
    chunker: Annotated[
        str | None, typer.Option(help="Chunker, by name. Default: dc.", show_default=False)
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(help="Router, by name. Default: that of the chunker.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a call.")] = 8,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Side of an image in pixels, or of a latent in cells. Default: what the model is "
            "made for.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:1. Default: a GPU if there is one.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="Precision of model and inputs.")
    ] = "float32",
    compile: Annotated[
        bool, typer.Option("--compile", help="Measure the compiled model; takes minutes to start.")
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="Measured calls of a budget in each of two rounds.")
    ] = 7,
    points: Annotated[int, typer.Option(min=2, help="Budgets of the first round.")] = 5,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Threads of an operation. Default: PyTorch's.", show_default=False
        ),
    ] = None,
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
