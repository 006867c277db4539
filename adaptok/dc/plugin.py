"""DC-DiT's parts enter through the same door as everybody else's."""

from typing import TYPE_CHECKING

from adaptok.hookspecs import hookimpl

if TYPE_CHECKING:
    from adaptok.registry import Registry


@hookimpl
def adaptok_register(registry: "Registry") -> None:
    """Register the parts that run inside a host; `adaptok.DCDiT` has its own."""
    registry.router("dc", "adaptok.dc.host:HostRouter")
    registry.chunker("dc", "adaptok.dc.host:HostChunker")
    registry.dechunker("dc", "adaptok.dc.host:HostDechunker")
    registry.backbone("dcdit", "adaptok.dc.backbone:DCDiTBackbone")
