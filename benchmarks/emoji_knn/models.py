"""Models with real weights, and how their features are read."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn


class FeatureModel(ABC):
    """A pretrained model, its input and its output.

    Args:
        shared: folder of the data.

    Attributes:
        name: what the tables call it.
        file: where its weights lie in the folder.
        resolution: edge of its input in pixels.
        grid: cells of an input.
        prefix: tokens in front of the cells.
        mean: of the colours that it was trained on.
        deviation: of the same colours.
    """

    name: ClassVar[str]
    file: ClassVar[str]
    resolution: ClassVar[int] = 224
    grid: ClassVar[tuple[int, int]]
    prefix: ClassVar[int] = 1
    mean: ClassVar[tuple[float, float, float]]
    deviation: ClassVar[tuple[float, float, float]]

    def __init__(self, shared: Path) -> None:
        self.model = self.load(shared / self.file).eval().requires_grad_(False)

    @abstractmethod
    def load(self, path: Path) -> nn.Module:
        """Make the model and fill in its weights."""

    @abstractmethod
    def extract(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return the features that the model itself gives out."""

    def prepare(self, pictures: npt.NDArray[np.uint8]) -> Float[Tensor, "b 3 h w"]:
        """Turn pixels into the model's input."""
        x = torch.from_numpy(pictures).float() / 255
        x = (x - torch.tensor(self.mean)) / torch.tensor(self.deviation)
        return rearrange(x, "b h w c -> b c h w").contiguous()


class ClipVitB16(FeatureModel):
    """Image tower of CLIP ViT-B/16 (transformers); its weights were int8 once."""

    name = "CLIP ViT-B/16 (int8-derived)"
    file = "weights/clip_vit_b16_image_int8.safetensors"
    grid = (14, 14)
    mean = (0.48145466, 0.4578275, 0.40821073)
    deviation = (0.26862954, 0.26130258, 0.27577711)

    def load(self, path: Path) -> nn.Module:
        """Make the model and fill in its weights."""
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        config = CLIPVisionConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            image_size=224,
            patch_size=16,
            projection_dim=512,
        )
        model = CLIPVisionModelWithProjection(config)
        found = model.load_state_dict(restore_floats(load_file(path)), strict=False)
        if found.missing_keys:
            raise KeyError(f"{path.name} has no {found.missing_keys[0]}")
        loaded: nn.Module = model
        return loaded

    def extract(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return the projected embeddings of images."""
        features: Tensor = self.model(pixel_values=images).image_embeds
        return features


class SaliencyVitS14(FeatureModel):
    """ViT-S/14 in the layout of DINOv2 (timm), fine-tuned for saliency by its publisher."""

    name = "ViT-S/14 (saliency)"
    file = "weights/vit_small_patch14_saliency_fp16.safetensors"
    grid = (16, 16)
    mean = (0.485, 0.456, 0.406)
    deviation = (0.229, 0.224, 0.225)

    def load(self, path: Path) -> nn.Module:
        """Make the model and fill in its weights."""
        import timm

        model: nn.Module = timm.create_model(
            "vit_small_patch14_dinov2", img_size=518, num_classes=0, dynamic_img_size=True
        )
        model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return model

    def extract(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return the pooled features: the class token behind the last norm."""
        features: Tensor = self.model(images)
        return features


MODELS: dict[str, type[FeatureModel]] = {"clip": ClipVitB16, "vit-s": SaliencyVitS14}


def restore_floats(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply int8 weights by the scale of their row.

    Args:
        stored: tensors by name; `X.int8` goes with `X.scale`.

    Returns:
        Tensors by name, with `X` in place of the pair.
    """
    floats = {k: v for k, v in stored.items() if not k.endswith((".int8", ".scale"))}
    for key, value in stored.items():
        if key.endswith(".int8"):
            name = key.removesuffix(".int8")
            floats[name] = value.float() * stored[f"{name}.scale"][:, None]
    return floats
