"""The door of adaptok_prune."""

from typing import Any

from adaptok import hookimpl


@hookimpl
def adaptok_register(registry: Any) -> None:  # noqa: ANN401
    """Register the stages by their place, so that they are only loaded when asked for."""
    registry.stage("evit", "adaptok_prune.evit:EViT")
    registry.stage("dynamicvit", "adaptok_prune.dynamicvit:DynamicViT")
