"""`adaptok explain`: in which order the stages of a stack would run in a model, and why."""

from typing import Annotated, Any

import typer


def explain(
    model: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FOLDER",
            help="A timm name such as vit_small_patch16_224, a folder with the config.json of a "
            "model of transformers or diffusers, or a model of adaptok's own: the name of one "
            "that ships with it, or its folder.",
        ),
    ],
    stack: Annotated[
        list[str],
        typer.Argument(
            metavar="STAGE...",
            help="Stages by name, with options behind a colon: dc tome:r=8 exit:threshold=0.9",
        ),
    ],
    keep: Annotated[
        float | None,
        typer.Option(metavar="0..1", help="Share of the cells to keep.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say in which order stages run in a model, where they act, and why; or why they cannot.

    The model is not run, and one of another library is made with random weights. A DC-DiT has its
    own router and chunker; stages stand around the blocks behind them. Ends with exit code 2 if
    the stages cannot run together; the message names the nearest stack that can.

    Example: `adaptok explain vit_small_patch16_224 dc tome:r=8 exit`
    """
    from adaptok.cli.opening import open_any
    from adaptok.cli.terminal import show_waiting
    from adaptok.explaining import explain as explain_model
    from adaptok.wrapping import wrap

    stages = [read_stage(text) for text in stack]
    with show_waiting(f"making {model}"):
        explanation = explain_model(wrap(open_any(model), stack=stages, budget=keep, verify=False))
    # as text, without markup or wrapping: a reader may be a program
    typer.echo(explanation.to_json() if json else str(explanation))


def read_stage(text: str) -> dict[str, Any]:
    """Return a stage with its options.

    Args:
        text: a name, or `name:option=value,option=value`; values are read as YAML.

    Returns:
        The mapping that `adaptok.wrap` takes.

    Raises:
        ConfigError: an option has no value, or its value is not readable.

    Example:
        >>> read_stage("tome:r=8,restore=update")
        {'name': 'tome', 'r': 8, 'restore': 'update'}
    """
    import yaml

    from adaptok.errors import ConfigError

    name, _, options = text.partition(":")
    found: dict[str, Any] = {"name": name}
    for option in options.split(",") if options else ():
        key, sign, value = option.partition("=")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            sign = ""
        if not sign or not key.strip():
            raise ConfigError(
                f"options of a stage are written name:option=value,option=value, got {text!r}"
            )
    return found
