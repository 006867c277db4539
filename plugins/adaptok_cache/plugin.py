"""The door of adaptok_cache."""

from typing import Any

from adaptok import hookimpl


@hookimpl
def adaptok_register(registry: Any) -> None:  # noqa: ANN401
    """Register the stages by their place, so that they are only loaded when asked for."""
    registry.stage("teacache", "adaptok_cache.teacache:TeaCache")
    registry.stage("firstblock", "adaptok_cache.firstblock:FirstBlockCache")
    registry.stage("taylorseer", "adaptok_cache.taylorseer:TaylorSeer")
