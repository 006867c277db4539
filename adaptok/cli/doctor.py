"""`adaptok doctor`: look at a model before it is wrapped."""

from typing import Annotated

import typer

from adaptok.cli.options import Device


def doctor(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FOLDER",
            help="A timm name such as vit_small_patch16_224, a folder with the config.json of a "
            "model of transformers or diffusers (of a pipeline, its transformer), or a model of "
            "adaptok's own: the name of one that ships with it, or its folder.",
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="Turns of the measurement; figures are medians.")
    ] = 5,
    device: Device = None,
) -> None:
    """Say whether a model can be wrapped, what works in it, and what a wrap costs.

    A model of another library is made with random weights: nothing is downloaded, and speed does
    not depend on them. Of a DC-DiT, which chooses its tokens itself, it says which stages work
    around its blocks. Ends with exit code 1 if the model cannot be wrapped.

    Example: `adaptok doctor vit_small_patch16_224`
    """
    from adaptok.cli.drawing import choose_device
    from adaptok.cli.examining import examine
    from adaptok.cli.opening import open_any
    from adaptok.cli.terminal import FAILED, show_waiting

    place = choose_device(device)
    with show_waiting(f"trying what works in {model}"):
        report = examine(open_any(model).to(place), repeats)
    # as text, without markup or wrapping: a reader may be a program
    typer.echo(report.to_json() if json else str(report))
    if not report.ok:
        raise typer.Exit(FAILED)
