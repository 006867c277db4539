"""DC-DiT's parts enter through the same door as everybody else's."""

from typing import TYPE_CHECKING

from adaptok.hookspecs import hookimpl

if TYPE_CHECKING:
    from adaptok.registry import Registry


@hookimpl
def adaptok_register(registry: "Registry") -> None:
    """Register router, chunker and dechunker."""
    registry.router("dc", "adaptok.dc:DCRouter")
    registry.chunker("dc", "adaptok.dc:DCChunker")
    registry.dechunker("dc", "adaptok.dc:DCDechunker")
