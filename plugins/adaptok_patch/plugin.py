"""The door of adaptok_patch."""

from typing import Any

from adaptok import hookimpl


@hookimpl
def adaptok_register(registry: Any) -> None:  # noqa: ANN401
    """Register the parts of adaptok_patch."""
    registry.router("apt", "adaptok_patch.router:AptRouter")
    registry.chunker("apt", "adaptok_patch.chunker:AptChunker")
    registry.dechunker("apt", "adaptok_patch.dechunker:AptDechunker")
