"""`adaptok distill`: a trained DiT becomes a DC-DiT."""

from pathlib import Path
from typing import Annotated

import typer

from adaptok.cli.train import option

MODEL, RECIPE, RUN = "Model", "Recipe", "Run"


def distill(
    host: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A DiT that `adaptok train --model dit` wrote: its model folder."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder of the run: checkpoints, log and the trained model."
        ),
    ],
    distill_steps: Annotated[
        int,
        typer.Option(min=1, help="Steps at the start in which the new parts learn from the DiT."),
    ] = 5000,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of the whole run, distillation included.")
    ] = 15_000,
    target: Annotated[
        float | None,
        option(MODEL, "Compression to aim at, above 1.", "as many tokens as the DiT has", min=1),
    ] = None,
    data: Annotated[
        str | None, option(RUN, "Images to learn from.", "those of the DiT", metavar="SPEC")
    ] = None,
    batch_size: Annotated[
        int | None, option(RECIPE, "Images per step.", "the DiT's", min=1)
    ] = None,
    learning_rate: Annotated[
        float | None, option(RECIPE, "Learning rate.", "the DiT's", "--lr", min=0)
    ] = None,
    budget_warmup: Annotated[
        int | None,
        option(RECIPE, "Steps without tail drop.", "those of the distillation", min=0),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    log_every: Annotated[int | None, option(RUN, "Steps between two reports.", 50, min=1)] = None,
    checkpoint_every: Annotated[
        int | None, option(RUN, "Steps between two checkpoints.", 1000, min=1)
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Refuse to go on with a run that is there.")
    ] = False,
) -> None:
    """Put the blocks of a trained DiT into the scaffold of DC-DiT, distil, then fine-tune.

    First each new part learns to reproduce what it replaces, then the whole is trained with the
    diffusion loss and tail drops. Images and objective are those of the DiT. The same command
    goes on after Ctrl-C, a crash or a kill.

    Example: `adaptok distill runs/dit/model -o runs/upcycled --distill-steps 500 --steps 2000`
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from adaptok.cli.distilling import run_distilling

    run_distilling(given)
