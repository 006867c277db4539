"""DiT blocks that run dense tokens and packed ones alike."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptok.attention import Ragged, attend_packed
from adaptok.dc.modulation import add_gated, modulate
from adaptok.dc.scaffold import NORM_EPS, normalise

BLOCK_NORM_EPS = 1e-6
MLP_RATIO = 4


class Attention(nn.Module):
    """Multi-head self-attention over dense or packed tokens.

    Args:
        width: features of a token.
        num_heads: heads; they divide the width.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "... d"], ragged: Ragged | None) -> Float[Tensor, "... d"]:
        """Attend within each sample."""
        qkv = self.qkv(x)
        if ragged is None:
            q, k, v = rearrange(qkv, "b m (k3 h e) -> k3 b h m e", k3=3, h=self.num_heads)
            out = rearrange(F.scaled_dot_product_attention(q, k, v), "b h m e -> b m (h e)")
        else:
            q, k, v = rearrange(qkv, "t (k3 h e) -> k3 t h e", k3=3, h=self.num_heads)
            packed = attend_packed(q, k, v, ragged)
            out = rearrange(packed, "t h e -> t (h e)")
        projected: Tensor = self.proj(out)
        return projected


class MLP(nn.Module):
    """Two linear layers with a GELU (tanh form) between them.

    Args:
        width: features of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Transform each token for itself."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (adaLN-zero).

    The modulation is computed per sample and spread to tokens by index.

    Args:
        width: features of a token.
        num_heads: heads of the attention.

    Example:
        >>> import torch
        >>> block = DiTBlock(32, 4)
        >>> block(torch.randn(2, 5, 32), torch.randn(2, 32)).shape
        torch.Size([2, 5, 32])

    Paper: Peebles and Xie, Scalable Diffusion Models with Transformers, 2023.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=BLOCK_NORM_EPS, elementwise_affine=False)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=BLOCK_NORM_EPS, elementwise_affine=False)
        self.mlp = MLP(width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x: Float[Tensor, "... d"],
        condition: Float[Tensor, "b d"],
        ragged: Ragged | None = None,
    ) -> Float[Tensor, "... d"]:
        """Transform dense tokens `(b m d)`, or packed ones `(t d)` with their `ragged`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        y = modulate(self.norm1(x), shift1, scale1, ragged)
        x = add_gated(x, gate1, self.attn(y, ragged), ragged)
        y = modulate(self.norm2(x), shift2, scale2, ragged)
        return add_gated(x, gate2, self.mlp(y), ragged)


def initialise_linear(module: nn.Module) -> None:
    """Start linear layers as DiT does: Xavier weights, no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


def zero_linear(module: nn.Module) -> None:
    """Start linear layers at zero, so that what they gate starts as the identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class FinalLayer(nn.Module):
    """Modulated norm and a linear layer: tokens to the channels of their patch.

    Args:
        width: features of a token.
        width_condition: features of the condition.
        width_out: channels that go out.
    """

    def __init__(self, width: int, width_condition: int, width_out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=BLOCK_NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, width_out)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width_condition, 2 * width))

    def forward(
        self, x: Float[Tensor, "b n d"], condition: Float[Tensor, "b e"]
    ) -> Float[Tensor, "b n c"]:
        """Return the channels of each token."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        out: Tensor = self.linear(modulate(self.norm(x), shift, scale))
        return out


class Backbone(nn.Module):
    """The stack of DiT blocks on the short sequence, and a norm behind it.

    Args:
        width: features of a token.
        depth: number of blocks.
        num_heads: heads of the attention.
    """

    def __init__(self, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=NORM_EPS)

    def forward(
        self,
        x: Float[Tensor, "... d"],
        condition: Float[Tensor, "b d"],
        ragged: Ragged | None = None,
        *,
        recompute: bool = False,
    ) -> Float[Tensor, "... d"]:
        """Run all blocks on dense or packed tokens.

        Args:
            x: dense tokens `(b m d)` or packed ones `(t d)`.
            condition: conditioning vector of each sample, `(b d)`.
            ragged: where the samples lie, for packed tokens.
            recompute: keep no activations of a block, compute them again for the gradient.

        Returns:
            Tokens of the same shape.
        """
        for block in self.blocks:
            if recompute:
                x = checkpoint(block, x, condition, ragged, use_reentrant=False)
            else:
                x = block(x, condition, ragged)
        return normalise(self.norm, x)
