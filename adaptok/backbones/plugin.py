"""The adapters enter through the same door as everybody else's."""

from typing import TYPE_CHECKING

from adaptok.hookspecs import hookimpl

if TYPE_CHECKING:
    from adaptok.registry import Registry


ADAPTERS = {
    "timm-vit": "adaptok.backbones.timm_vit:TimmViT",
    "timm-eva": "adaptok.backbones.timm_eva:TimmEva",
    "timm-beit": "adaptok.backbones.timm_beit:TimmBeit",
    "timm-relpos": "adaptok.backbones.timm_relpos:TimmRelPos",
    "timm-naflex": "adaptok.backbones.timm_naflex:TimmNaFlex",
    "facebook-dit": "adaptok.backbones.facebook_dit:FacebookDiT",
    "diffusers-dit": "adaptok.backbones.diffusers_dit:DiffusersDiT",
    "diffusers-pixart": "adaptok.backbones.diffusers_pixart:DiffusersPixArt",
    "diffusers-sd3": "adaptok.backbones.diffusers_sd3:DiffusersSD3",
    "diffusers-flux": "adaptok.backbones.diffusers_flux:DiffusersFlux",
    "diffusers-zimage": "adaptok.backbones.diffusers_zimage:DiffusersZImage",
    "diffusers-wan": "adaptok.backbones.diffusers_wan:DiffusersWan",
    "transformers-vit": "adaptok.backbones.transformers_vit:TransformersViT",
    "transformers-beit": "adaptok.backbones.transformers_beit:TransformersBeit",
    "list": "adaptok.backbones.plain:ListBackbone",
}


@hookimpl
def adaptok_register(registry: "Registry") -> None:
    """Register one adapter per family of hosts."""
    for name, target in ADAPTERS.items():
        registry.backbone(name, target)
