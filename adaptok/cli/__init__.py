"""The command line: `adaptok demo`, `encode`, `train`, `sample`, `tune`, `doctor`, `bench` ...

What a command computes with is imported when it runs, so that `--help` stays quick.
"""

from typing import Annotated

import typer

from adaptok.cli.bench import bench
from adaptok.cli.calibrate import calibrate
from adaptok.cli.demo import demo
from adaptok.cli.distill import distill
from adaptok.cli.doctor import doctor
from adaptok.cli.encode import encode
from adaptok.cli.evaluate import evaluate
from adaptok.cli.explain import explain
from adaptok.cli.gallery import gallery
from adaptok.cli.parts import describe_part, list_parts
from adaptok.cli.plan import plan
from adaptok.cli.report import report
from adaptok.cli.sample import sample
from adaptok.cli.terminal import SpeakingGroup, out
from adaptok.cli.train import train
from adaptok.cli.tune import tune

app = typer.Typer(
    name="adaptok",
    cls=SpeakingGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        from adaptok import __version__

        out.print(f"adaptok {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Vision and diffusion transformers that spend their tokens where the image needs them.

    Start with `adaptok demo`: it needs no data and no GPU, and takes about two minutes.
    """


LOOK, CHOOSE, MEASURE, TRAIN = "Look", "Choose a method", "Measure and set", "Train"

app.command(rich_help_panel=LOOK)(demo)
app.command(rich_help_panel=LOOK)(sample)
app.command(rich_help_panel=LOOK)(report)
app.command(rich_help_panel=LOOK)(gallery)
app.command("list", rich_help_panel=CHOOSE)(list_parts)
app.command("describe", rich_help_panel=CHOOSE)(describe_part)
app.command(rich_help_panel=CHOOSE)(doctor)
app.command(rich_help_panel=CHOOSE)(explain)
app.command(rich_help_panel=MEASURE)(bench)
app.command(rich_help_panel=MEASURE)(plan)
app.command(rich_help_panel=MEASURE)(calibrate)
app.command(rich_help_panel=MEASURE)(evaluate)
app.command(rich_help_panel=TRAIN)(encode)
app.command(rich_help_panel=TRAIN)(train)
app.command(rich_help_panel=TRAIN)(tune)
app.command(rich_help_panel=TRAIN)(distill)

__all__ = ["app"]
