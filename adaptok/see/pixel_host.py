"""A Vision Transformer with weights set by hand, so that stages see pixels and nothing else."""

import math

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from adaptok.optional import import_optional

HEADS = 3  # one for each colour
BLOCKS = 4
STEEP = 6.0  # how sharply attention prefers cells that look alike
FIRM = 4.0  # length of the class token by that of a cell: what it gathers hardly turns it
SHARE = 0.25  # of what attention gathers, that is added to a token


def make_pixel_host(size: int, patch: int) -> nn.Module:
    """Return a timm ViT whose tokens are pixels: its weights are set by hand, none is random.

    A trained host differs in what it sees in an image; this one sees colours only, so that
    pictures of what stages choose need no weights that somebody trained. Its keys are the pixels,
    a cell attends to cells that look like it, and the class token to what is not white.

    Args:
        size: edge of the images in pixels.
        patch: edge of a cell in pixels.

    Returns:
        The model in eval mode; it takes what `write_angles` gives.

    Raises:
        MissingPackageError: timm is not installed.

    Example:
        >>> host = make_pixel_host(32, 4)
        >>> host(write_angles(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))).shape
        torch.Size([1, 192])
    """
    import_optional("timm", extra="hosts")
    from timm.models.vision_transformer import VisionTransformer

    width = 4 * 3 * patch * patch
    vit: nn.Module = VisionTransformer(
        img_size=size,
        patch_size=patch,
        in_chans=12,
        num_classes=0,
        embed_dim=width,
        depth=BLOCKS,
        num_heads=HEADS,
        mlp_ratio=1,
    )
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        weight = vit.get_parameter("patch_embed.proj.weight")
        weight.copy_(torch.eye(width).view_as(weight))
        white = write_angles(torch.full((1, 3, patch, patch), 255, dtype=torch.uint8))
        vit.get_parameter("cls_token").copy_(-FIRM * white.flatten())
        for block in range(BLOCKS):
            gather_alike(vit, f"blocks.{block}.attn", width)
    return vit.eval()


def gather_alike(vit: nn.Module, path: str, width: int) -> None:
    """Let cells gather from those that look alike: queries and keys are the tokens.

    Values are the tokens negated: a token gets shorter by what others say as well, so that those
    that no other one resembles stay longest.
    """
    eye = torch.eye(width)
    steep = math.sqrt(STEEP)
    vit.get_parameter(f"{path}.qkv.weight").copy_(torch.cat([steep * eye, steep * eye, -eye]))
    vit.get_parameter(f"{path}.proj.weight").copy_(SHARE * eye)


def write_angles(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 12 h w"]:
    """Write each colour value as an angle, so that the norms of a transformer keep it.

    A token of such values has the mean zero and always the same length: white and grey differ
    after a LayerNorm.

    Args:
        images: RGB pixels.

    Returns:
        Cosine and sine of a quarter turn for each colour, and both negated; colour by colour.

    Example:
        >>> x = write_angles(torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8))
        >>> bool(x.mean(1).abs().max() < 1e-6), bool((x.square().sum(1) - 6).abs().max() < 1e-5)
        (True, True)
    """
    angle = images.float() * (math.pi / 2 / 255)
    parts = torch.stack([angle.cos(), angle.sin(), -angle.cos(), -angle.sin()], dim=2)
    return rearrange(parts, "b c k h w -> b (c k) h w")
