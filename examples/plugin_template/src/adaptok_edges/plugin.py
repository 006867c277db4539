"""What this package gives to adaptok. Nothing heavy is imported here: names lead to classes."""

from typing import Any

from adaptok import hookimpl


@hookimpl
def adaptok_register(registry: Any) -> None:  # noqa: ANN401
    """Register the parts."""
    registry.router("edges", "adaptok_edges.router:EdgeRouter")
    registry.chunker("similar", "adaptok_edges.chunker:SimilarChunker")
