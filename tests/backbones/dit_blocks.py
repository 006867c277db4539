"""Blocks of DiT of timm's parts, and twins that only look like them."""

from functools import partial

import torch
from timm.layers import Attention, Mlp
from torch import nn

WIDTH, HEADS = 48, 3


class DiTBlock(nn.Module):
    """A block of DiT of timm's parts, as research code makes it."""

    def __init__(self, **options):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(WIDTH, num_heads=HEADS, qkv_bias=True, **options)
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(WIDTH, 4 * WIDTH, act_layer=partial(nn.GELU, approximate="tanh"), drop=0)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None])
        moved = self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None]
        return x + gate2[:, None] * self.mlp(moved)


class SwappedDiTBlock(DiTBlock):
    """Scale and shift change places."""

    def forward(self, x, c):
        scale1, shift1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None])
        moved = self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None]
        return x + gate2[:, None] * self.mlp(moved)


class CausalDiTBlock(DiTBlock):
    """Tokens attend to those in front of them."""

    def forward(self, x, c):
        forward = self.attn.forward
        self.attn.forward = partial(forward, is_causal=True)
        try:
            return super().forward(x, c)
        finally:
            self.attn.forward = forward


class MaskedDiTBlock(DiTBlock):
    """Takes a mask, which it needs."""

    def forward(self, x, c, mask):
        return super().forward(x, c) * mask


class MixingDiTBlock(DiTBlock):
    """Its MLP looks at neighbours."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x, c):
        return x + self.mlp(self.norm2(x).transpose(1, 2)).transpose(1, 2)


class ShiftedDiTBlock(DiTBlock):
    """Has a weight of its own beside those of its parts."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(WIDTH))
