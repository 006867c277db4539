"""The command line: `adaptok demo`, `train`, `sample`, `tune`, `distill`, `doctor`, `bench` ...

What a command computes with is imported when it runs, so that `--help` stays quick.
"""

from typing import Annotated

import typer

from adaptok.cli.bench import bench
from adaptok.cli.calibrate import calibrate
from adaptok.cli.demo import demo
from adaptok.cli.distill import distill
from adaptok.cli.doctor import doctor
from adaptok.cli.evaluate import evaluate
from adaptok.cli.explain import explain
from adaptok.cli.plan import plan
from adaptok.cli.sample import sample
from adaptok.cli.terminal import SpeakingGroup, out
from adaptok.cli.train import train
from adaptok.cli.tune import tune

app = typer.Typer(
    name="adaptok",
    cls=SpeakingGroup,
    no_args_is_help=True,
    add_completion=False,
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
    """Diffusion transformers that spend their tokens where the image needs them.

    Start with `adaptok demo`: it needs no data and no GPU, and takes about two minutes.
    """


app.command()(demo)
app.command()(train)
app.command()(sample)
app.command()(tune)
app.command()(distill)
app.command()(doctor)
app.command()(explain)
app.command()(evaluate)
app.command()(bench)
app.command()(plan)
app.command()(calibrate)

__all__ = ["app"]
