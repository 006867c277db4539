"""Tiny vision towers of transformers, and an oracle that gathers nothing."""

import torch
import transformers
from backbones.host_checks import find_case

from adaptok.backbones.transformers_beit import TransformersBeit
from adaptok.backbones.transformers_vit import TransformersViT
from adaptok.testing.models import fill_weights

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "patch_size": 8,
}
TEXT = SIZES | {
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
del TEXT["patch_size"]
IMAGES = torch.randn(3, 3, 40, 56, generator=torch.Generator().manual_seed(3))


def host_of(model):
    beit = "Beit" in type(model).__name__
    return (TransformersBeit if beit else TransformersViT).match(model)


def find(name):
    return find_case(f"transformers/{name}")


def build(cls, config):
    return fill_weights(cls(config)).eval()


def make_vit(**options):
    return build(
        transformers.ViTModel,
        transformers.ViTConfig(**(SIZES | {"image_size": (40, 56)} | options)),
    )


def make_dino(**options):
    config = transformers.DINOv3ViTConfig(**(SIZES | {"num_register_tokens": 4} | options))
    return build(transformers.DINOv3ViTModel, config)


def make_pair(cls, config, text, vision, **options):
    """Return a model of images and text."""
    settings = config(
        text_config=text(**(TEXT | options)).to_dict(),
        vision_config=vision(**SIZES, image_size=48).to_dict(),
    )
    return build(cls, settings)


def make_clip():
    return make_pair(
        transformers.CLIPModel,
        transformers.CLIPConfig,
        transformers.CLIPTextConfig,
        transformers.CLIPVisionConfig,
    )


def make_siglip():
    return make_pair(
        transformers.SiglipModel,
        transformers.SiglipConfig,
        transformers.SiglipTextConfig,
        transformers.SiglipVisionConfig,
    )


def hide_dropped(blocks, args, kwargs, rows):
    """Run the blocks on the whole sequence, in which nobody sees the dropped tokens.

    What is left computes what a short sequence would, and nothing had to be gathered.
    """
    x, *others = args
    s = x.shape[1]
    seen = torch.zeros(1, 1, s, s, dtype=torch.bool)
    seen[..., rows] = True
    kwargs = dict(kwargs)
    mask = others[0] if others else kwargs.pop("attention_mask", None)
    if "resolution" in kwargs:  # BEiT adds what it gets to its table, bool masks as 0 and 1
        mask = torch.zeros(1, 1, s, s) if mask is None else mask.float()
        mask = mask.masked_fill(~seen, float("-inf"))
    else:
        mask = seen if mask is None else mask & seen
    for block in blocks:
        x = block(x, attention_mask=mask, **kwargs)
    return x[:, rows]
