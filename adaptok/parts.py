"""Parts from names: a name, a mapping, a configuration or an instance becomes a module."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model
from torch import nn

from adaptok.config import Config, describe_problems
from adaptok.discovery import find_part, name_of_part
from adaptok.errors import ConfigError
from adaptok.registry import INTERFACES, Kind

# Parameters of a constructor that the host fills, and no user.
FACTS = ("width", "depth", "grid_axes")


class PartConfig(Config):
    """Which part is wanted, by its name, and the options that differ from their defaults.

    Args:
        name: a registered name.

    Raises:
        ConfigError: the name is missing.

    Example:
        >>> part = PartConfig(name="random", seed=3)
        >>> part.options
        {'seed': 3}
        >>> PartConfig.from_json(part.to_json()) == part
        True
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """The options, without the name."""
        return self.model_dump(exclude={"name"})


Spec = str | Mapping[str, Any] | Config | nn.Module


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a part may want to know of the host that it will work in.

    Args:
        width: features of a token.
        depth: number of blocks.
        grid_axes: axes of the grid, 2 for images and 3 for video.
    """

    width: int
    depth: int
    grid_axes: int


def build_part(kind: Kind, spec: Spec, facts: HostFacts) -> tuple[nn.Module, PartConfig | None]:
    """Make a part for a host.

    A constructor parameter named `width`, `depth` or `grid_axes` is filled from the host, unless
    the user gives it.

    Args:
        kind: what is wanted.
        spec: a name, a mapping with `name` and options, a configuration, or an instance.
        facts: what the host is like.

    Returns:
        The part, and the configuration that makes it again; None where an instance came whose
        class has no registered name or keeps options to itself.

    Raises:
        ConfigError: an option does not exist or has a wrong value, or the spec is of no such form.
        UnknownNameError: there is no such name.
    """
    interface = INTERFACES[kind]
    if isinstance(spec, interface):
        return spec, describe_instance(kind, spec)
    config = read_spec(kind, spec)
    cls = find_part(kind, config.name)
    options = config.options
    check_options(cls, options)
    parameters = inspect.signature(cls.__init__).parameters
    given = {
        name: getattr(facts, name) for name in FACTS if name in parameters and name not in options
    }
    made = cls(**given, **options)
    return made, config


def read_spec(kind: Kind, spec: object) -> PartConfig:
    """Turn a name, a mapping or a configuration into a configuration (see `build_part`)."""
    if isinstance(spec, str):
        return PartConfig(name=spec)
    if isinstance(spec, PartConfig):
        return spec
    if isinstance(spec, Config):
        return PartConfig(**spec.model_dump())
    if isinstance(spec, Mapping):
        if "name" not in spec:
            raise ConfigError(
                f'a {kind} as a mapping needs a name, as in {{"name": "dc"}}; got the keys '
                f"{', '.join(map(str, spec)) or 'none'}"
            )
        return PartConfig(**spec)
    interface = INTERFACES[kind].__name__
    shown = spec.__name__ + " (a class: make an instance of it)" if inspect.isclass(spec) else ""
    raise ConfigError(
        f"a {kind} is a name, a mapping, a configuration or an adaptok.{interface}, got "
        f"{shown or repr(spec)[:80]}"
    )


def options_of(cls: type[nn.Module]) -> type[Config]:
    """Return the configuration of a part, read off the constructor's annotations.

    Args:
        cls: class of the part.

    Returns:
        A frozen pydantic model with the options that a user may set.

    Example:
        >>> from adaptok.dc.host import HostChunker
        >>> sorted(options_of(HostChunker).model_fields)
        ['buckets', 'layout', 'target']
    """
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        if name in FACTS:
            fields[name] = (annotation | None, None)
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (annotation, default)
    visible = {name: field for name, field in fields.items() if name not in FACTS}
    return create_model(cls.__name__, __base__=Config, **visible)


def check_options(cls: type[nn.Module], options: Mapping[str, Any]) -> None:
    """Raise a `ConfigError` unless a constructor takes these options."""
    accepted = options_of(cls)
    known = inspect.signature(cls.__init__).parameters
    values = {name: value for name, value in options.items() if name not in {*FACTS} & {*known}}
    try:
        accepted.model_validate(values)
    except ConfigError:
        raise
    except ValidationError as error:
        raise ConfigError(describe_problems(cls.__name__, error)) from None


def describe_instance(kind: Kind, part: nn.Module) -> PartConfig | None:
    """Return the configuration that makes a part like this one again, if it can be read off it.

    Args:
        kind: what it is.
        part: the part; each option must be an attribute of the same name.
    """
    name = name_of_part(kind, type(part))
    if name is None:
        return None
    options = {}
    for option, field in options_of(type(part)).model_fields.items():
        if not hasattr(part, option):
            return None
        value = getattr(part, option)
        if value != field.default:
            options[option] = value
    try:
        return PartConfig(name=name, **options)
    except ConfigError:
        return None
