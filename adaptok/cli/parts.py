"""`adaptok list` and `adaptok describe`: which methods there are, and what each one is."""

import json as jsonlib
from typing import Annotated, Any

import typer

KINDS = ("routers", "chunkers", "dechunkers", "stages", "backbones", "models")


def complete_kind(incomplete: str) -> list[str]:
    """Return the kinds that begin so, for the shell."""
    return [kind for kind in KINDS if kind.startswith(incomplete)]


def complete_name(incomplete: str) -> list[str]:
    """Return the registered names that begin so, for the shell."""
    return sorted({row["name"] for row in list_entries(None) if row["name"].startswith(incomplete)})


def list_parts(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help=f"One of {', '.join(KINDS)}; all without it.",
            autocompletion=complete_kind,
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List what can be used by name: methods, adapters of model families, shipped models.

    A name stands in `adaptok.wrap(model, chunker="NAME")`, `stack=["NAME"]` or `router="NAME"`. A
    plug-in that cannot be imported is listed with its reason.

    Example: `adaptok list stages`
    """
    from rich.table import Table

    from adaptok.cli.terminal import out
    from adaptok.errors import UnknownNameError

    if kind is not None and kind not in KINDS:
        raise UnknownNameError(f"there is no kind {kind!r}: kinds are {', '.join(KINDS)}")
    rows = list_entries(kind)
    if json:
        typer.echo(jsonlib.dumps(rows, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("kind", "name", "from", "what it does"):
        table.add_column(column, overflow="fold", no_wrap=column in ("kind", "name"))
    for row in rows:
        table.add_row(row["kind"], row["name"], row["origin"], row["summary"], end_section=False)
    out.print(table, markup=False)


def list_entries(kind: str | None) -> list[dict[str, str]]:
    """Return one row per registered part and shipped model.

    Args:
        kind: of which kind; None means all.
    """
    from adaptok.discovery import PLURALS, available, describe
    from adaptok.zoo.models import list_zoo_models, load_zoo_model

    rows = []
    found = available()
    assert isinstance(found, dict)
    for plural, names in found.items():
        if kind not in (None, plural):
            continue
        for name in names:
            description = describe(name)
            for entry, summary in zip(description.entries, description.summaries, strict=True):
                if entry.kind == PLURALS[plural]:
                    rows.append(
                        {
                            "kind": entry.kind,
                            "name": name,
                            "origin": entry.origin,
                            "path": entry.path,
                            "summary": shorten(summary),
                        }
                    )
    for name in list_zoo_models() if kind in (None, "models") else ():
        trained = load_zoo_model(name)
        rows.append(
            {
                "kind": "model",
                "name": name,
                "origin": "adaptok",
                "path": f"zoo/{name}",
                "summary": f"a trained {type(trained.model).__name__}: {trained.card.limits}",
            }
        )
    return rows


def shorten(summary: str) -> str:
    """Return the first sentence of a summary.

    Example:
        >>> shorten("Keeps cells. More of it.")
        'Keeps cells.'
    """
    head, stop, _ = summary.partition(". ")
    return head + stop.strip()


def describe_part(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A name of `adaptok list`.", autocompletion=complete_name
        ),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a name stands for: what it does, its options, and what its stage declares.

    Example: `adaptok describe tome`
    """
    from adaptok.cli.terminal import out
    from adaptok.discovery import describe
    from adaptok.zoo.models import list_zoo_models

    if name in list_zoo_models():
        describe_model(name, json)
        return
    description = describe(name)
    found = [
        describe_entry(entry, summary)
        for entry, summary in zip(description.entries, description.summaries, strict=True)
    ]
    if json:
        typer.echo(jsonlib.dumps({"name": name, "entries": found}, indent=2))
        return
    for entry in found:
        out.print(f"[bold]{entry['kind']} {name}[/] [dim]{entry['origin']}, {entry['path']}[/]")
        out.print(entry["summary"], markup=False, soft_wrap=True)
        for option in entry["options"]:
            out.print(f"  {option['name']} = {option['default']}", markup=False, soft_wrap=True)
        if entry["effects"]:
            shown = ", ".join(f"{key}={value}" for key, value in entry["effects"].items())
            out.print(f"  declares {shown}", markup=False, soft_wrap=True)


def describe_model(name: str, json: bool) -> None:
    """Print what a shipped model is.

    Args:
        name: of the model.
        json: print it as JSON.
    """
    from adaptok.cli.terminal import out
    from adaptok.zoo.models import load_zoo_model

    trained = load_zoo_model(name)
    parameters = sum(p.numel() for p in trained.model.parameters())
    found = {
        "name": name,
        "kind": type(trained.model).__name__,
        "parameters": parameters,
        "config": trained.model.config.model_dump(mode="json"),
        "card": trained.card.model_dump(mode="json"),
    }
    if json:
        typer.echo(jsonlib.dumps(found, indent=2))
        return
    out.print(f"[bold]model {name}[/] [dim]{found['kind']}, {parameters / 1e6:.1f} M parameters[/]")
    out.print(trained.card.limits, markup=False, soft_wrap=True)
    out.print(f"  classes: {', '.join(trained.card.class_names)}", markup=False, soft_wrap=True)
    out.print(f"  adaptok sample --model {name}", markup=False)


def describe_entry(entry: Any, summary: str) -> dict[str, Any]:  # noqa: ANN401
    """Return what is known of a registered part, as plain values.

    Args:
        entry: of the registry.
        summary: its first sentence, or why it cannot be imported.

    Returns:
        Kind, origin, path, summary, options with their defaults, and declared effects.
    """
    from dataclasses import asdict

    from pydantic_core import PydanticUndefined

    from adaptok.errors import PluginError
    from adaptok.parts import options_of

    options: list[dict[str, str]] = []
    effects: dict[str, Any] = {}
    try:
        cls = entry.load()
    except (ImportError, PluginError):
        cls = None
    if cls is not None and entry.kind != "backbone":
        for option, known in options_of(cls).model_fields.items():
            needed = known.default is PydanticUndefined
            options.append({"name": option, "default": "needed" if needed else repr(known.default)})
        declared: Any = getattr(cls, "effects", None)
        effects = asdict(declared) if hasattr(declared, "__dataclass_fields__") else {}
    return {
        "kind": entry.kind,
        "origin": entry.origin,
        "path": entry.path,
        "summary": summary,
        "options": options,
        "effects": {key: value for key, value in effects.items() if value},
    }
