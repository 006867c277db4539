"""The adapters enter through the same door as everybody else's."""

from typing import TYPE_CHECKING

from adaptok.hookspecs import hookimpl

if TYPE_CHECKING:
    from adaptok.registry import Registry


@hookimpl
def adaptok_register(registry: "Registry") -> None:
    """Register one adapter per family of hosts, the most particular ones first."""
    registry.backbone("timm-vit", "adaptok.backbones.timm_vit:TimmViT")
    registry.backbone("list", "adaptok.backbones.plain:ListBackbone")
