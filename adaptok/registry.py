"""Names of routers, chunkers, dechunkers, stages and backbones, and the classes behind them."""

import difflib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from adaptok.chunking import Chunker, Dechunker
from adaptok.errors import MissingPackageError, PluginError, RegistryError, UnknownNameError
from adaptok.hosts import Backbone
from adaptok.routing import Router
from adaptok.stages import Stage

Kind = Literal["router", "chunker", "dechunker", "stage", "backbone"]
Target = type[Any] | str

INTERFACES: dict[Kind, type[Any]] = {
    "router": Router,
    "chunker": Chunker,
    "dechunker": Dechunker,
    "stage": Stage,
    "backbone": Backbone,
}
NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
METHODS: tuple[Kind, ...] = ("chunker", "stage")  # a stack and `chunker=` take names of both
NOTEBOOK = "__main__"


@dataclass(frozen=True, slots=True)
class Entry:
    """A name and what it stands for.

    Args:
        kind: `"router"`, `"chunker"`, `"dechunker"`, `"stage"` or `"backbone"`.
        name: the name.
        target: a class, or `"module:Class"`, imported when it is first asked for.
        origin: the plug-in that registered it.
        install: the command that installs what the target needs.
    """

    kind: Kind
    name: str
    target: Target
    origin: str
    install: str | None = None

    @property
    def path(self) -> str:
        """Where the class is, as `module:Class`."""
        if isinstance(self.target, str):
            return self.target
        return f"{self.target.__module__}:{self.target.__qualname__}"

    def load(self) -> type[Any]:
        """Import the class and check that it is of its kind.

        Returns:
            The class.

        Raises:
            MissingPackageError: a package that it needs is not installed.
            PluginError: the target is not there, or is of another kind.
        """
        target = self.target
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            try:
                target = getattr(import_module(module), attribute)
            except ImportError as error:
                hint = f": run `{self.install}`" if self.install else ""
                raise MissingPackageError(
                    f"the {self.kind} {self.name!r} of {self.origin} needs what cannot be "
                    f"imported ({error}){hint}"
                ) from error
            except AttributeError as error:
                raise PluginError(
                    f"the {self.kind} {self.name!r} of {self.origin} is said to be {self.target}, "
                    f"and there is none: {error}"
                ) from error
        check_interface(self.kind, self.name, target)
        return target


class Registry:
    """Names by kind; each name has one meaning.

    A plug-in gets it in `adaptok_register`, and calls the method of the kind.

    Example:
        >>> registry = Registry()
        >>> with registry.record("my-plugin"):
        ...     registry.router("dc", "adaptok.dc:DCRouter")
        >>> registry.names("router"), registry.find("router", "dc").origin
        (('dc',), 'my-plugin')
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[Kind, str], Entry] = {}
        self.failures: dict[str, str] = {}  # plug-ins that could not be loaded, and why
        self.origin = NOTEBOOK

    def router(self, name: str, target: Target, *, install: str | None = None) -> None:
        """Register a router.

        Args:
            name: lower-case letters, digits, hyphens and underscores.
            target: a subclass of `Router`, or `"module:Class"`.
            install: the command that installs what the target needs.

        Raises:
            RegistryError: the name is taken or badly spelt, or the target does not fit.
        """
        self.add("router", name, target, install)

    def chunker(self, name: str, target: Target, *, install: str | None = None) -> None:
        """Register a chunker; see `router`."""
        self.add("chunker", name, target, install)

    def dechunker(self, name: str, target: Target, *, install: str | None = None) -> None:
        """Register a dechunker; see `router`."""
        self.add("dechunker", name, target, install)

    def stage(self, name: str, target: Target, *, install: str | None = None) -> None:
        """Register a stage; see `router`."""
        self.add("stage", name, target, install)

    def backbone(self, name: str, target: Target, *, install: str | None = None) -> None:
        """Register the adapter of a family of hosts; see `router`."""
        self.add("backbone", name, target, install)

    def add(self, kind: Kind, name: str, target: Target, install: str | None = None) -> None:
        """Register a name of any kind; see `router`."""
        if not NAME.fullmatch(str(name)):
            raise RegistryError(
                f"the name of a {kind} has lower-case letters, digits, hyphens and underscores and "
                f"begins with a letter, got {name!r}"
            )
        if isinstance(target, str):
            if not re.fullmatch(r"[\w.]+:\w+", target):
                raise RegistryError(
                    f"the target of {kind} {name!r} is a class or 'module:Class', got {target!r}"
                )
        else:
            check_interface(kind, name, target)
        entry = Entry(kind, name, target, self.origin, install)
        for other in METHODS if kind in METHODS else ():
            if other != kind and (other, name) in self.entries:
                raise RegistryError(
                    f"the {kind} {name!r} of {entry.origin} ({entry.path}) cannot be registered: "
                    f"there is a {other} of that name, and a method has one; choose another name"
                )
        known = self.entries.get((kind, name))
        if known is not None and not is_same_cell(known, entry):
            raise RegistryError(
                f"the {kind} {name!r} of {entry.origin} ({entry.path}) cannot be registered: "
                f"{known.origin} has that name already ({known.path}); choose another name"
            )
        self.entries[kind, name] = entry

    @contextmanager
    def record(self, origin: str) -> Iterator[None]:
        """Register names on behalf of a plug-in: all of them, or none if it fails.

        Args:
            origin: name of the plug-in.
        """
        before, outer = dict(self.entries), self.origin
        self.origin = origin
        try:
            yield
        except BaseException:
            self.entries = before
            raise
        finally:
            self.origin = outer

    def names(self, kind: Kind) -> tuple[str, ...]:
        """Return the names of a kind, sorted."""
        return tuple(sorted(name for known, name in self.entries if known == kind))

    def find(self, kind: Kind, name: str) -> Entry:
        """Return what a name stands for.

        Args:
            kind: `"router"`, `"chunker"`, `"dechunker"`, `"stage"` or `"backbone"`.
            name: its name.

        Returns:
            The entry; `entry.load()` gives the class.

        Raises:
            UnknownNameError: no such name; the message lists those there are, the nearest one,
                and plug-ins that could not be loaded.
        """
        entry = self.entries.get((kind, name))
        if entry is None:
            raise UnknownNameError(self.explain_unknown(kind, name))
        return entry

    def explain_unknown(self, kind: Kind, name: str) -> str:
        """Say that a name is unknown, and what might have been meant."""
        names = self.names(kind)
        message = f"there is no {kind} {name!r}: known are {', '.join(names) or 'none'}"
        for other in METHODS if kind in METHODS else ():
            if other != kind and self.names(other):
                message += f", and the {other}s {', '.join(self.names(other))}"
                names += self.names(other)
        close = difflib.get_close_matches(name, names, n=1)
        if close:
            message += f"; did you mean {close[0]!r}?"
        others = [other for other, known in self.entries if known == name and other != kind]
        if others:
            message += f"; {name!r} is a {' and a '.join(others)}"
        for plugin, reason in self.failures.items():
            message += f"; the plug-in {plugin!r} could not be loaded ({reason})"
        return message


def is_same_cell(known: Entry, new: Entry) -> bool:
    """Say whether a notebook cell was run again: then the newer class takes the name."""
    from_notebook = {known.origin, new.origin} == {NOTEBOOK}
    return from_notebook and known.path == new.path


def check_interface(kind: Kind, name: str, target: object) -> None:
    """Raise a `RegistryError` unless a class implements the interface of its kind."""
    interface = INTERFACES[kind]
    if not (inspect.isclass(target) and issubclass(target, interface)):
        raise RegistryError(
            f"the {kind} {name!r} needs a subclass of adaptok.{interface.__name__}, got {target!r}"
        )
