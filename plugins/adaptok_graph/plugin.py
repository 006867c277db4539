"""The door of adaptok_graph."""

from typing import Any

from adaptok import hookimpl


@hookimpl
def adaptok_register(registry: Any) -> None:  # noqa: ANN401
    """Register the parts of adaptok_graph."""
    registry.router("graph", "adaptok_graph.router:GraphRouter")
    registry.chunker("graph", "adaptok_graph.chunker:GraphChunker")
    registry.dechunker("graph", "adaptok_graph.dechunker:GraphDechunker")
