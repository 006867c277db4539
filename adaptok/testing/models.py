"""Small hosts whose every weight matters, to try parts on."""

import torch
from torch import nn

from adaptok.optional import import_optional

WIDTH = 96
DEPTH = 3


def make_vit(depth: int = DEPTH, seed: int = 0, width: int = WIDTH) -> nn.Module:
    """Return a small timm ViT of random weights that takes images of any size.

    Args:
        depth: number of blocks.
        seed: of the weights.
        width: features of a token.

    Returns:
        The model in eval mode: patches of 8 pixels, one class token, 10 classes.

    Raises:
        MissingPackageError: timm is not installed.

    Example:
        >>> make_vit()(torch.randn(2, 3, 32, 48)).shape
        torch.Size([2, 10])
    """
    import_optional("timm", extra="hosts")
    from timm.models.vision_transformer import VisionTransformer

    vit: nn.Module = VisionTransformer(
        img_size=32,
        patch_size=8,
        num_classes=10,
        embed_dim=width,
        depth=depth,
        num_heads=3 if width % 3 == 0 else 1,
        dynamic_img_size=True,
        init_values=1.0,
    )
    return fill_weights(vit, seed).eval()


def fill_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with values that make outputs react, zero-initialised ones too.

    A freshly made model hardly reacts to its tokens (gates and LayerScale start at zero or
    nearly so), so that a broken part would pass every check.

    Args:
        model: the model, changed in place.
        seed: of the values.

    Returns:
        The same model.

    Example:
        >>> bool(fill_weights(nn.Linear(4, 4)).bias.abs().min() > 0)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                noise = noise / parameter[0].numel() ** 0.5
            elif "norm" in name and name.endswith("weight"):
                noise = 1.0 + 0.25 * noise
            else:
                noise = 0.5 * noise
            parameter.copy_(noise)
    return model
