"""The stages of a wrap, made from whatever form they were given in, and put in order."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from adaptok.chunk_stage import ChunkStage
from adaptok.chunking import Chunker, Dechunker
from adaptok.config import Config
from adaptok.discovery import HOST
from adaptok.errors import ConfigError, StackError
from adaptok.hosts import Backbone
from adaptok.parts import HostFacts, PartConfig, Spec, build_part, options_of, read_spec
from adaptok.registry import Kind
from adaptok.routing import Router
from adaptok.solving import StackEntry, check_stack, sort_stack
from adaptok.stages import Stage
from adaptok.wrap_config import WrapConfig


def build_stages(
    chunker: Spec | None,
    router: Spec | None,
    dechunker: Spec | None,
    stack: Sequence[Spec],
    facts: HostFacts,
    host: Backbone,
) -> tuple[dict[str, Stage], WrapConfig]:
    """Make the stages of a wrap, outermost first, and the configuration that makes them again."""
    stages: list[tuple[str, Stage]] = []
    configs: dict[str, PartConfig | None] = {"chunker": None, "router": None, "dechunker": None}
    if isinstance(stack, str | Mapping | Config | nn.Module):
        raise ConfigError(f'stack is a list of stages, as in stack=["dc"], got {stack!r:.80}')
    if chunker is not None and names_stage(chunker):
        if router is not None or dechunker is not None:
            raise ConfigError(
                f"router= and dechunker= change parts of a chunker, and {chunker!r:.80} is a stage "
                "that has neither"
            )
        stack, chunker = [chunker, *stack], None
    if chunker is not None:
        name, chunks, configs = build_chunk_stage(chunker, router, dechunker, facts)
        stages.append((name, chunks))
    elif router is not None or dechunker is not None:
        raise ConfigError("router= and dechunker= change parts of a chunker: give chunker= too")
    listed: list[PartConfig | None] = []
    for spec in stack:
        name, stage, config = build_stacked(spec, facts)
        stages.append((name, stage))
        listed.append(config)
    complete = None not in listed and (chunker is None or None not in configs.values())
    return order_stages(stages, host), WrapConfig(
        backbone=host.name,
        chunker=configs["chunker"],
        router=configs["router"],
        dechunker=configs["dechunker"],
        stack=tuple(config for config in listed if config is not None),
        complete=complete,
    )


def build_chunk_stage(
    chunker: Spec, router: Spec | None, dechunker: Spec | None, facts: HostFacts
) -> tuple[str, ChunkStage, dict[str, PartConfig | None]]:
    """Make a stage of a chunker and its router and dechunker."""
    middle, middle_config = build_part("chunker", chunker, facts)
    assert isinstance(middle, Chunker)
    name = middle_config.name if middle_config else type(middle).__name__
    made: dict[str, nn.Module] = {}
    configs = {"chunker": middle_config}
    for kind, spec in (("router", router), ("dechunker", dechunker)):
        wanted = getattr(middle, kind, None) if spec is None else spec
        if wanted is None:
            raise ConfigError(f"the chunker {name!r} has no {kind} of its own: give {kind}=")
        made[kind], configs[kind] = build_part(kind, wanted, facts)  # type: ignore[arg-type]
    front, back = made["router"], made["dechunker"]
    assert isinstance(front, Router)
    assert isinstance(back, Dechunker)
    return name, ChunkStage(front, middle, back, name), configs


def build_stacked(spec: Spec, facts: HostFacts) -> tuple[str, Stage, PartConfig | None]:
    """Make one stage of a stack: a stage of that name, or a chunker with its own parts."""
    if names_chunker(spec):
        name, stage, configs = build_chunk_stage(spec, None, None, facts)
        complete = None not in configs.values()  # its router and dechunker can be made again, too
        return name, stage, configs["chunker"] if complete else None
    part, config = build_part("stage", spec, facts)
    assert isinstance(part, Stage)
    return (config.name if config else type(part).__name__), part, config


def names_stage(spec: Spec) -> bool:
    """Say whether what was given as a chunker is a stage: a method has one name."""
    if isinstance(spec, nn.Module):
        return isinstance(spec, Stage)
    HOST.load_all()
    wanted = read_spec("chunker", spec).name
    names = HOST.registry.names
    return wanted in names("stage") and wanted not in names("chunker")


def names_chunker(spec: Spec) -> bool:
    """Say whether a member of a stack is a chunker, and not a stage of that name."""
    if isinstance(spec, nn.Module):
        return isinstance(spec, Chunker)
    HOST.load_all()
    wanted = read_spec("stage", spec).name
    names = HOST.registry.names
    return wanted not in names("stage") and wanted in names("chunker")


def order_stages(stages: Sequence[tuple[str, Stage]], host: Backbone) -> dict[str, Stage]:
    """Return stages by name, in the order that their effects ask for.

    Plug-ins may change the order or veto it (`adaptok_order_stages`).

    Args:
        stages: names and stages, as given.
        host: the adapter of the model.

    Returns:
        The stages, the outermost first.

    Raises:
        StackError: they cannot run together, or a plug-in says so.
    """
    ranked = sort_stack([StackEntry(name, stage) for name, stage in stages])
    names: dict[int, str] = {}
    for entry in ranked:
        taken = set(names.values())
        number = 2
        unique = entry.name.lower()
        while unique in taken:
            unique, number = f"{entry.name.lower()}-{number}", number + 1
        names[id(entry.stage)] = unique
    order = [entry.stage for entry in ranked]
    if len(order) > 1:
        answer = HOST.manager.hook.adaptok_order_stages(stages=tuple(order), backbone=host)
        if answer is not None:
            if {id(stage) for stage in answer} != set(names) or len(answer) != len(order):
                raise StackError(
                    "a plug-in's adaptok_order_stages returned other stages than it was given"
                )
            order = list(answer)
    check_stack([StackEntry(names[id(stage)], stage) for stage in order], host)
    return {names[id(stage)]: stage for stage in order}


def spell_out(config: WrapConfig) -> dict[str, str]:
    """Return the parts of a wrap with all their options, defaults too, as comparable text."""
    text = {}
    kinds: Iterable[tuple[Kind, PartConfig | None]] = (
        ("chunker", config.chunker),
        ("router", config.router),
        ("dechunker", config.dechunker),
    )
    for kind, part in kinds:
        text[kind] = spell_part(kind, part)
    HOST.load_all()
    stages = HOST.registry.names("stage")
    stacked = [
        spell_part("stage" if part.name in stages else "chunker", part) for part in config.stack
    ]
    return text | {"stack": ", ".join(stacked) or "nothing"}


def spell_part(kind: Kind, part: PartConfig | None) -> str:
    """Return the name and all options of a part as comparable text."""
    if part is None:
        return "nothing"
    fields = options_of(HOST.registry.find(kind, part.name).load()).model_fields
    defaults = {name: field.default for name, field in fields.items() if not field.is_required()}
    options: dict[str, Any] = defaults | part.model_dump(mode="json", exclude={"name"})
    return f"{part.name} {json.dumps(options, sort_keys=True, default=str)}"
