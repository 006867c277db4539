"""What a person sees: plain errors, progress with the time left, numbers with units."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

from adaptok.cli.wording import speak_options
from adaptok.errors import AdaptokError, StorageError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class SpeakingGroup(TyperGroup):
    """Commands whose expected errors end in one sentence and an exit code, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say_error("stopped by Ctrl-C")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader has left, typer knows what to do
        except StorageError as error:
            say_error(speak_options(str(error), self.list_options(ctx)))
            raise typer.Exit(FAILED) from None
        except AdaptokError as error:
            say_error(speak_options(str(error), self.list_options(ctx)))
            raise typer.Exit(BAD_INPUT) from None
        except OSError as error:
            say_error(f"a file cannot be read or written: {error}")
            raise typer.Exit(FAILED) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            say_error("the GPU has too little free memory: take a smaller batch or a smaller model")
            raise typer.Exit(FAILED) from None

    def list_options(self, ctx: Any) -> dict[str, str]:  # noqa: ANN401
        """Return the options of the command that ran, by their Python names."""
        command = self.commands.get(ctx.invoked_subcommand or "")
        found = {
            parameter.name: next((name for name in parameter.opts if name.startswith("--")), None)
            for parameter in (command.params if command is not None else ())
        }
        return {name: long for name, long in found.items() if name and long}


def say_error(message: object) -> None:
    """Write one error to the terminal, as text without markup."""
    err.print("[bold red]error:[/] ", end="")
    err.print(str(message), markup=False, soft_wrap=True)


@contextmanager
def show_progress(description: str, total: int) -> Iterator["Bar"]:
    """Show a bar with the time left while the block runs.

    Args:
        description: what is being done.
        total: number of steps.

    Yields:
        The bar.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", style="cyan"),
        TextColumn("[dim]time left"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with progress:
        yield Bar(progress, progress.add_task(description, total=total, note=""))


@contextmanager
def show_waiting(description: str) -> Iterator[None]:
    """Show that something runs whose end cannot be foretold, and for how long.

    Args:
        description: what is being done.
    """
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with progress:
        progress.add_task(description, total=None)
        yield


class Bar:
    """A bar that moves forward.

    Args:
        progress: where it is shown.
        task: its number there.
    """

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress = progress
        self.task = task

    def move_to(self, done: int, total: int, note: str = "") -> None:
        """Show how many steps are done; the signature is that of a progress callback."""
        self.progress.update(self.task, completed=done, total=total, note=note)

    def describe(self, description: str) -> None:
        """Say what is being done now."""
        self.progress.update(self.task, description=description)


def describe_seconds(seconds: float) -> str:
    """Say a duration in words.

    Args:
        seconds: how long.

    Returns:
        The two largest units.

    Example:
        >>> describe_seconds(8.4), describe_seconds(100), describe_seconds(200_000)
        ('8 s', '1 min 40 s', '2 d 7 h')
    """
    whole = round(seconds)
    units = {"d": 86_400, "h": 3_600, "min": 60, "s": 1}
    words: list[str] = []
    for unit, size in units.items():
        count, whole = divmod(whole, size)
        if count or words:
            words.append(f"{count} {unit}" if count else "")
    return " ".join(word for word in words[:2] if word) or "0 s"
