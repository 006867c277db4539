"""PixArt alpha and sigma of diffusers: cross-attention to masked text."""

from typing import Any, ClassVar

import torch
from torch import nn

from adaptok.backbones.diffusers_dit import DiffusersDiT
from adaptok.backbones.diffusers_inputs import give, make_noise, make_times
from adaptok.hosts import HostInputs, device_of

TEXT = 6


class DiffusersPixArt(DiffusersDiT):
    """Adapter of `PixArtTransformer2DModel`.

    Its blocks are called like those of DiT, with text and its mask, one per sample; a mask over
    the cells is gathered with them. Steps go from 999 (noise) to 0.

    Example:
        >>> from diffusers import PixArtTransformer2DModel
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
        >>> text = {"cross_attention_dim": 32, "caption_channels": 8}
        >>> model = PixArtTransformer2DModel(**sizes, **text, in_channels=4, sample_size=8)
        >>> host = DiffusersPixArt.match(model)
        >>> host.width, host.depth
        (32, 2)

    Paper: PixArt-alpha, arXiv 2310.00426.
    """

    name = "diffusers-pixart"
    family = "diffusers PixArtTransformer2DModel"
    branches = ("uncond", "cond")
    home = "pixart_transformer_2d"
    host = "PixArtTransformer2DModel"
    parameters: ClassVar[tuple[str, ...]] = (
        "hidden_states",
        "encoder_hidden_states",
        "timestep",
        "added_cond_kwargs",
        "cross_attention_kwargs",
        "attention_mask",
        "encoder_attention_mask",
        "return_dict",
    )

    def example(self, model: nn.Module) -> HostInputs:
        """Return two latents with texts of different lengths (see `Backbone.example`)."""
        config: Any = model.config
        device = device_of(model)
        added: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if model.use_additional_conditions:
            added = {
                "resolution": torch.tensor([[512.0, 768.0], [768.0, 512.0]], device=device),
                "aspect_ratio": torch.tensor([[0.67], [1.5]], device=device),
            }
        text_width = config.caption_channels or config.cross_attention_dim
        h, w = 4 * config.patch_size, 6 * config.patch_size
        return give(
            hidden_states=make_noise(model, 2, config.in_channels, h, w),
            encoder_hidden_states=make_noise(model, 2, TEXT, text_width, seed=1),
            timestep=make_times(model, 200.0, 700.0),
            added_cond_kwargs=added,
            encoder_attention_mask=torch.tensor(
                [[1] * TEXT, [1] * 2 + [0] * (TEXT - 2)], device=device
            ),
        )
