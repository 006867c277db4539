"""Plug-ins: found at the first use of a name, loaded one by one, broken ones skipped.

Environment variables: `ADAPTOK_PLUGINS` lists the only plug-ins to load, by the names of their
entry points (empty: none but adaptok's own); `ADAPTOK_STRICT_PLUGINS=1` makes a broken plug-in an
error; `ADAPTOK_TRACE_PLUGINS=1` prints each hook call.
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import pluggy

from adaptok import hookspecs
from adaptok.errors import PluginError, PluginWarning, UnknownNameError
from adaptok.registry import INTERFACES, NOTEBOOK, Entry, Kind, Registry

GROUP = "adaptok"
# Methods and adapters of our own use the same door; without one the installation is stale.
OWN = {
    "dc": "adaptok.dc.plugin",
    "hosts": "adaptok.backbones.plugin",
    "routers": "adaptok.routers.plugin",
}
PLURALS: dict[str, Kind] = {f"{kind}s": kind for kind in INTERFACES}
Part = TypeVar("Part", bound=type[Any])


class PluginHost:
    """Holds the plug-ins and the names that they registered.

    Example:
        >>> host = PluginHost()
        >>> host.load_all()
        >>> "dc" in host.registry.names("router")
        True
    """

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.registry = Registry()
        self.loaded = False
        self.manager.hook.adaptok_register.call_historic(kwargs={"registry": self.registry})

    def load_all(self) -> None:
        """Load all announced plug-ins, once.

        Raises:
            PluginError: adaptok's own entry points are missing, or, in strict mode, a plug-in is
                broken.
        """
        if self.loaded:
            return
        self.loaded = True
        if os.environ.get("ADAPTOK_TRACE_PLUGINS") == "1":
            self.manager.add_hookcall_monitoring(print_call, lambda *_: None)
        for point in choose_plugins(list(entry_points(group=GROUP))):
            self.load_announced(point)
        missing = [name for name in OWN if not self.manager.has_plugin(name)]
        if missing:
            self.loaded = False
            raise PluginError(
                f"adaptok's own entry point {missing[0]!r} is not announced: the installation is "
                "stale, install adaptok again (`pip install -e .` in a checkout)"
            )

    def load_announced(self, point: EntryPoint) -> None:
        """Load one plug-in; a broken one is reported and skipped."""
        try:
            self.add(point.load(), point.name)
        except Exception as error:
            if os.environ.get("ADAPTOK_STRICT_PLUGINS") == "1":
                raise PluginError(
                    f"the plug-in {point.name!r} ({point.value}) cannot be loaded: {error!r}"
                ) from error
            self.registry.failures[point.name] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"the plug-in {point.name!r} ({point.value}) is skipped, since it cannot be "
                f"loaded: {error!r}; everything else works",
                PluginWarning,
                stacklevel=2,
            )

    def add(self, plugin: object, name: str) -> None:
        """Take in a plug-in: all that it registers, or nothing if it fails.

        Args:
            plugin: a module or an object with functions marked by `adaptok.hookimpl`.
            name: what it is called.

        Raises:
            PluginError: it implements no hook, one that does not exist, or its name is taken.
            RegistryError: a name that it registers is taken or badly spelt.
        """
        if self.manager.has_plugin(name):
            raise PluginError(f"a plug-in {name!r} is loaded already: choose another name")
        try:
            with self.registry.record(name):
                self.manager.register(plugin, name)  # calls adaptok_register, which is historic
                self.check_hooks(plugin)
        except BaseException:
            self.remove(plugin)
            raise

    def check_hooks(self, plugin: object) -> None:
        """Raise a `PluginError` unless a plug-in implements hooks, and only such as exist."""
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(
                f"{plugin!r} implements a hook that does not exist: {error}"
            ) from error
        if not self.manager.get_hookcallers(plugin):
            raise PluginError(
                f"{plugin!r} implements no hook: mark a function with @adaptok.hookimpl"
            )

    def remove(self, plugin: object) -> None:
        """Forget a plug-in that failed half-way."""
        if self.manager.is_registered(plugin):
            self.manager.unregister(plugin)


def choose_plugins(points: list[EntryPoint]) -> list[EntryPoint]:
    """Return the plug-ins that the environment allows, adaptok's own first."""
    allowed = os.environ.get("ADAPTOK_PLUGINS")
    if allowed is not None:
        names = {name.strip() for name in allowed.split(",")} | set(OWN)
        points = [point for point in points if point.name in names]
    unique = {(point.name, point.value): point for point in points}  # one path found twice
    return sorted(unique.values(), key=lambda point: (point.value not in OWN.values(), point.name))


def print_call(
    hook: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]
) -> None:
    """Print a hook call to standard error."""
    names = ", ".join(implementation.plugin_name for implementation in implementations)
    print(f"adaptok: {hook} -> {names or 'nobody'}", file=sys.stderr)


HOST = PluginHost()


def find_part(kind: Kind, name: str) -> type[Any]:
    """Return the class that a name stands for.

    Args:
        kind: `"router"`, `"chunker"` or `"dechunker"`.
        name: its name.

    Returns:
        The class.

    Raises:
        UnknownNameError: there is no such name.
        MissingPackageError: it needs a package that is not installed.

    Example:
        >>> find_part("router", "dc").__name__
        'HostRouter'
    """
    HOST.load_all()
    return HOST.registry.find(kind, name).load()


def name_of_part(kind: Kind, cls: type[object]) -> str | None:
    """Return the name that a class is registered by, or None.

    Args:
        kind: `"router"`, `"chunker"`, `"dechunker"`, `"stage"` or `"backbone"`.
        cls: the class.
    """
    HOST.load_all()
    path = f"{cls.__module__}:{cls.__qualname__}"
    entries = HOST.registry.entries.values()
    return next((e.name for e in entries if e.kind == kind and e.path == path), None)


def available(kinds: str | None = None) -> tuple[str, ...] | dict[str, tuple[str, ...]]:
    """Return the names that can be used.

    Args:
        kinds: `"routers"`, `"chunkers"`, `"dechunkers"`, `"stages"` or `"backbones"`; None means
            all kinds.

    Returns:
        The sorted names, or the names by kind.

    Raises:
        UnknownNameError: there is no such kind.

    Example:
        >>> "dc" in available("routers")
        True
    """
    HOST.load_all()
    if kinds is None:
        return {plural: HOST.registry.names(kind) for plural, kind in PLURALS.items()}
    if kinds not in PLURALS:
        raise UnknownNameError(f"there is no kind {kinds!r}: kinds are {', '.join(PLURALS)}")
    return HOST.registry.names(PLURALS[kinds])


@dataclass(frozen=True, slots=True)
class Description:
    """What a name stands for, in each of its kinds.

    Args:
        name: the name.
        entries: what it stands for.
        summaries: the first sentence of each class, or why it cannot be imported.
    """

    name: str
    entries: tuple[Entry, ...]
    summaries: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"{entry.kind} {self.name!r} ({entry.origin}, {entry.path}): {summary}"
            for entry, summary in zip(self.entries, self.summaries, strict=True)
        )


def describe(name: str) -> Description:
    """Say what a name stands for, who registered it, and where it is.

    Args:
        name: a name of any kind.

    Returns:
        The description; print it.

    Raises:
        UnknownNameError: nothing has that name.

    Example:
        >>> print(describe("dc"))
        router 'dc' (dc, adaptok.dc.host:HostRouter): Ranks cells by an untrained router, plus ...
        chunker 'dc' (dc, adaptok.dc.host:HostChunker): Keeps the cells that routing and budget ...
        dechunker 'dc' (dc, adaptok.dc.host:HostDechunker): Kept cells take what came of their ...
    """
    HOST.load_all()
    entries = tuple(
        entry
        for kind in INTERFACES
        if (entry := HOST.registry.entries.get((kind, name))) is not None
    )
    if not entries:
        problems = [HOST.registry.explain_unknown(kind, name) for kind in INTERFACES]
        raise UnknownNameError("; ".join(problems))
    return Description(name, entries, tuple(summarise(entry) for entry in entries))


def summarise(entry: Entry) -> str:
    """Return the first sentence of a class, or why it cannot be imported."""
    try:
        text = entry.load().__doc__ or "no description"
    except (ImportError, PluginError) as error:
        return f"cannot be used: {error}"
    return " ".join(text.strip().split("\n\n")[0].split())


def register_part(kind: Kind, name: str) -> Callable[[Part], Part]:
    """Return a decorator that registers a class under a name.

    The notebook door: running the same cell again replaces the class.

    Args:
        kind: `"router"`, `"chunker"` or `"dechunker"`.
        name: its name.

    Returns:
        The decorator.
    """

    def register(part: Part) -> Part:
        HOST.load_all()  # so that a name of an installed plug-in is not taken unawares
        with HOST.registry.record(NOTEBOOK if part.__module__ == NOTEBOOK else part.__module__):
            HOST.registry.add(kind, name, part)
        return part

    return register


def register_router(name: str) -> Callable[[Part], Part]:
    """Register a router class under a name, for notebooks and scripts.

    Args:
        name: lower-case letters, digits, hyphens and underscores.

    Returns:
        A decorator.

    Raises:
        RegistryError: the name is taken or badly spelt, or the class is no `adaptok.Router`.

    Example:
        >>> import adaptok
        >>> @register_router("first-half")
        ... class FirstHalf(adaptok.Router):
        ...     def forward(self, tokens, context):
        ...         prob = tokens.x.new_zeros(tokens.x.shape[:2])
        ...         prob[:, : prob.shape[1] // 2] = 1.0
        ...         return adaptok.Routing(prob)
        >>> "first-half" in available("routers")
        True
    """
    return register_part("router", name)


def register_chunker(name: str) -> Callable[[Part], Part]:
    """Register a chunker class under a name; otherwise as `register_router`.

    Example:
        >>> from adaptok.dc import DCChunker
        >>> @register_chunker("by-thirds")
        ... class ByThirds(DCChunker):
        ...     def __init__(self):
        ...         super().__init__("bucketed", buckets=3)
        >>> "by-thirds" in available("chunkers")
        True
    """
    return register_part("chunker", name)


def register_dechunker(name: str) -> Callable[[Part], Part]:
    """Register a dechunker class under a name; otherwise as `register_router`.

    Example:
        >>> from adaptok.dc import DCDechunker
        >>> @register_dechunker("wide")
        ... class Wide(DCDechunker):
        ...     def __init__(self, width):
        ...         super().__init__(width, sigma=2.0)
        >>> "wide" in available("dechunkers")
        True
    """
    return register_part("dechunker", name)


def register_stage(name: str) -> Callable[[Part], Part]:
    """Register a stage class under a name; otherwise as `register_router`.

    Example:
        >>> import adaptok
        >>> @register_stage("nothing")
        ... class Nothing(adaptok.Stage):
        ...     effects = adaptok.Effects("tokens")
        ...     def forward(self, inner, call):
        ...         return inner(call)
        >>> "nothing" in available("stages")
        True
    """
    return register_part("stage", name)


def register_backbone(name: str) -> Callable[[Part], Part]:
    """Register a backbone class under a name; otherwise as `register_router`.

    Backbones that are registered later are asked first by `adaptok.wrap`.

    Example:
        >>> from adaptok.backbones.plain import ListBackbone
        >>> @register_backbone("mine")
        ... class Mine(ListBackbone):
        ...     name = "mine"
        >>> "mine" in available("backbones")
        True
    """
    return register_part("backbone", name)
