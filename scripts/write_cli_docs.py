"""Write the page of all commands and options from the commands themselves.

Usage: python scripts/write_cli_docs.py [--check]

The page is docs/api/command-line.md. With --check nothing is written: the exit code says whether
the page is what would be written.
"""

import argparse
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from typer.models import ArgumentInfo, CommandInfo, OptionInfo

from adaptok.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "api" / "command-line.md"
HEAD = """# Command line

`adaptok --help` and `adaptok COMMAND --help` say the same in a terminal. Exit codes: 0 all is
well, 1 a file or a device failed, 2 an input is wrong, 130 stopped by Ctrl-C. This page is written
by `scripts/write_cli_docs.py`.

"""


def flatten(text: str) -> str:
    """Bring a text to one line."""
    return " ".join(text.split())


def show_default(parameter: inspect.Parameter, info: ArgumentInfo | OptionInfo) -> str:
    """Return what holds where an option is not given."""
    value = parameter.default
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or value is False or not info.show_default:
        return ""
    if value is True:
        return "default: on"
    values = value if isinstance(value, list | tuple) else [value]
    return "default " + " ".join(f"`{getattr(one, 'value', one)}`" for one in values)


def find_kind(annotation: Any) -> type:  # noqa: ANN401
    """Return the type of one value: of `list[str] | None` it is `str`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [one for one in typing.get_args(annotation) if one is not type(None)]
        return find_kind(rest[0])
    inner = typing.get_args(annotation)
    return find_kind(inner[0]) if inner else annotation


def describe_values(kind: type, info: ArgumentInfo | OptionInfo) -> str:
    """Return what an option takes: choices, bounds, or the name of its values."""
    if kind is bool:
        return ""
    if issubclass(kind, Enum):
        return " or ".join(f"`{one.value}`" for one in kind)
    names = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}
    words = info.metavar or names.get(kind, kind.__name__)
    takes = " or ".join(f"`{word}`" for word in words.split("|"))
    low = f" from {info.min:g}" if info.min is not None else ""
    high = f" to {info.max:g}" if info.max is not None else ""
    return takes + low + high


def name_option(name: str, kind: type, info: OptionInfo) -> str:
    """Return the words of an option."""
    plain = name.replace("_", "-")
    first = info.default  # an annotation gives its first word so
    words = [first] if isinstance(first, str) and first.startswith("-") else []
    words += info.param_decls or ()
    if not words:
        words = [f"--{plain}", f"--no-{plain}"] if kind is bool else [f"--{plain}"]
    split = [part for word in words for part in word.split("/")]
    return ", ".join(f"`{part.strip()}`" for part in split)


def write_item(name: str, takes: str, default: str, meaning: str) -> str:
    """Return the line of an option or an argument."""
    facts = [part for part in (takes, default) if part]
    return f"- **{name}** {', '.join(facts)}".rstrip() + f"<br>{flatten(meaning)}"


def write_command(name: str, callback: Callable[..., Any], level: int) -> Iterator[str]:
    """Yield the lines of one command."""
    hints = typing.get_type_hints(callback, include_extras=True)
    words, items = [], []
    for key, parameter in inspect.signature(callback).parameters.items():
        if typing.get_origin(hints[key]) is not typing.Annotated:
            continue  # typer.Context
        annotation, info = typing.get_args(hints[key])[:2]
        if not isinstance(info, ArgumentInfo | OptionInfo) or info.hidden:
            continue
        kind = find_kind(annotation)
        default, meaning = show_default(parameter, info), info.help or ""
        if isinstance(info, ArgumentInfo):
            words.append(info.metavar or key.upper())
            items.append(write_item(f"`{words[-1]}`", "", default, meaning))
        else:
            takes = describe_values(kind, info)
            items.append(write_item(name_option(key, kind, info), takes, default, meaning))
    yield f"{'#' * level} `{' '.join([name, *words])}`"
    yield ""
    yield inspect.cleandoc(callback.__doc__ or "").replace("\b\n", "")
    yield ""
    yield from items
    yield ""


def write_group(name: str, group: typer.Typer) -> Iterator[str]:
    """Yield the lines of all commands of a group, under the headings that `--help` shows."""
    shown = [command for command in group.registered_commands if not command.hidden]
    panels: dict[str, list[CommandInfo]] = {}
    for command in shown:
        panel = command.rich_help_panel
        panels.setdefault(panel if isinstance(panel, str) else "", []).append(command)
    for panel, commands in panels.items():
        if panel:
            yield from [f"## {panel}", ""]
        for command in commands:
            assert command.callback is not None
            word = command.name or command.callback.__name__.replace("_", "-")
            yield from write_command(f"{name} {word}", command.callback, 3 if panel else 2)
    for below in group.registered_groups:
        assert below.typer_instance is not None
        word = below.name or below.typer_instance.info.name
        yield from write_group(f"{name} {word}", below.typer_instance)


def write_page() -> str:
    """Return the page."""
    return HEAD + "\n".join(write_group("adaptok", app)).rstrip() + "\n"


def main() -> int:
    """Write the page, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    page = write_page()
    if options.check:
        if PAGE.read_text() != page:
            print(f"{PAGE.name} is out of date: run python scripts/write_cli_docs.py")
            return 1
        return 0
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
