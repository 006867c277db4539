"""The hooks that a plug-in may implement.

A plug-in package names a module under the entry-point group `adaptok`, and marks functions in it
with `adaptok.hookimpl`. Arguments are passed by name, so that an implementation may leave some out.
"""

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from adaptok.registry import Registry

PROJECT = "adaptok"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(historic=True)
def adaptok_register(registry: "Registry") -> None:
    """Register the routers, chunkers and dechunkers of a plug-in under their names.

    Called once for each plug-in, at the first use of a name; a plug-in that comes later is called
    when it comes. Targets are best given as text, so that nothing heavy is imported.

    Args:
        registry: has one method a kind: `registry.router(name, target)` and so on.
    """
