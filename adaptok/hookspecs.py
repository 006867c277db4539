"""The hooks that a plug-in may implement.

A plug-in package names a module under the entry-point group `adaptok`, and marks functions in it
with `adaptok.hookimpl`. Arguments are passed by name, so that an implementation may leave some out.
"""

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adaptok.hosts import Backbone
    from adaptok.registry import Registry
    from adaptok.stages import Stage
    from adaptok.trace_step import TraceStep

PROJECT = "adaptok"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(historic=True)
def adaptok_register(registry: "Registry") -> None:
    """Register the parts of a plug-in under their names.

    Called once for each plug-in, at the first use of a name; a plug-in that comes later is called
    when it comes. Targets are best given as text, so that nothing heavy is imported.

    Args:
        registry: has one method a kind: `registry.router(name, target)` and so on.
    """


@hookspec(firstresult=True)
def adaptok_order_stages(
    stages: "Sequence[Stage]", backbone: "Backbone"
) -> "Sequence[Stage] | None":
    """Change or veto the order in which the stages of a stack run.

    Called once for each `adaptok.wrap` of more than one stage, after they were sorted by their
    effects. A veto is an `adaptok.AdaptokError` that says why.

    Args:
        stages: the stages, outermost first.
        backbone: the adapter of the host.

    Returns:
        The same stages in another order, or None to leave the order to others.
    """


@hookspec
def adaptok_observe(event: "TraceStep") -> None:
    """Look at one forward pass of a wrapped model.

    Called at the end of each pass of the block list, only while an `adaptok.trace` is open.

    Args:
        event: what the stages decided, tokens kept, FLOPs and milliseconds.
    """
