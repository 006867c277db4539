"""The door of adaptok_width."""

from typing import Any

from adaptok import hookimpl


@hookimpl
def adaptok_register(registry: Any) -> None:  # noqa: ANN401
    """Register the stage by its place, so that it is only loaded when asked for."""
    registry.stage("width", "adaptok_width.stage:DynamicWidth")
