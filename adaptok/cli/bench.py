"""`adaptok bench`: what budgets cost and save on this machine."""

from pathlib import Path
from typing import Annotated

import typer


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FOLDER",
            help="A timm name such as vit_small_patch16_224, a folder with the config.json of a "
            "model of transformers or diffusers, or a DCDiT: the name of one that ships with "
            "adaptok, or its folder.",
        ),
    ],
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
        bool, typer.Option("--compile", help="Run both sides compiled; takes minutes to start.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds; figures are medians.")] = 10,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Threads of an operation. Default: PyTorch's.", show_default=False
        ),
    ] = None,
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
