"""Diffusion Transformers laid out as the research code of DiT and SiT lays them out.

Written from the papers' description: "Scalable Diffusion Models with Transformers",
arXiv 2212.09748, and "SiT", arXiv 2401.08740.
"""

import math

import torch
from torch import Tensor, nn

from .case import BATCH, HostCase, HostInputs, build_quietly, make_images


class PatchEmbed(nn.Module):
    """Cut a latent into patches and project each."""

    def __init__(
        self, input_size: tuple[int, int], patch_size: int, channels: int, width: int
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (input_size[0] // patch_size, input_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (b n d)."""
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, then two linear layers."""

    def __init__(self, width: int, frequencies: int = 64) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Return (b d)."""
        half = self.frequencies // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        angles = t.float()[:, None] * rates
        out: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        return out


class LabelEmbedder(nn.Module):
    """A table of classes with one more row for no class, which training draws now and then."""

    def __init__(self, classes: int, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)
        self.num_classes = classes
        self.dropout_prob = dropout

    def forward(self, y: Tensor, train: bool) -> Tensor:
        """Return (b d)."""
        if train:
            dropped = torch.rand(len(y), device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        out: Tensor = self.embedding_table(y)
        return out


class SelfAttention(nn.Module):
    """Multi-head attention of all tokens to all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (b n d)."""
        parts = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        mixed: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return mixed


class DiTBlock(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return (b n d) for tokens and condition (b d)."""
        parts: tuple[Tensor, ...] = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        mixed: Tensor = self.attn(self.norm1(x) * (1 + parts[1]) + parts[0])
        x = x + parts[2] * mixed
        thought: Tensor = self.mlp(self.norm2(x) * (1 + parts[4]) + parts[3])
        return x + parts[5] * thought


class FinalLayer(nn.Module):
    """Modulated norm and projection to the pixels of a patch."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, pixels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return (b n pixels)."""
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


class DiT(nn.Module):
    """A class-conditional diffusion transformer.

    Args:
        input_size: rows and columns of the latent.
        patch_size: side of a patch.
        in_channels: of the latent.
        hidden_size: width of the tokens.
        depth: number of blocks.
        num_heads: heads of attention.
        num_classes: classes, the null class not counted.
        learn_sigma: whether twice the channels come out.
    """

    def __init__(
        self,
        input_size: tuple[int, int],
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 96,
        depth: int = 4,
        num_heads: int = 2,
        num_classes: int = 10,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        self.learn_sigma = learn_sigma
        self.in_channels = in_channels
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=False
        )
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Put patches (b n pixels) back together: (b c h w)."""
        h, w = self.x_embedder.grid_size
        p = self.patch_size
        patches = x.reshape(len(x), h, w, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.out_channels, h * p, w * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return noise and variance (b 2c h w) for latents, timesteps and classes."""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Guide the first three channels; the first half of the batch has the classes."""
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, :3], out[:, 3:]
        cond, uncond = eps.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


class SiT(DiT):
    """The same layout, trained as a flow: time in [0, 1], the variance is dropped."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the velocity (b c h w)."""
        out = super().forward(x, t, y)
        return out.chunk(2, dim=1)[0] if self.learn_sigma else out


def describe(name: str, make: type[DiT], cells: tuple[int, int], times: Tensor) -> HostCase:
    """Return the case of a model of this layout."""
    size = (2 * cells[0], 2 * cells[1])
    return HostCase(
        name=f"facebook/{name}",
        family="facebook",
        build=build_quietly(lambda: make(size)),
        inputs=lambda model: HostInputs(
            (make_images(cells, patch=2, channels=4), times, torch.arange(BATCH) + 1)
        ),
        cells=cells,
        output=lambda out: out,
        containers=("blocks",),
        notes="classes and time condition every block",
    )


FACEBOOK_CASES = (
    describe("dit", DiT, (5, 7), torch.tensor([20, 400, 900])),
    describe("sit", SiT, (6, 6), torch.tensor([0.05, 0.5, 0.9])),
)
