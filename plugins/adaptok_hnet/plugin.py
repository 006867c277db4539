"""The door of adaptok_hnet."""

from typing import Any

from adaptok import hookimpl


@hookimpl
def adaptok_register(registry: Any) -> None:  # noqa: ANN401
    """Register the parts of adaptok_hnet."""
    registry.router("hnet", "adaptok_hnet.router:HNetRouter")
    registry.chunker("hnet", "adaptok_hnet.chunker:HNetChunker")
    registry.dechunker("hnet", "adaptok_hnet.dechunker:HNetDechunker")
