"""Convolutional encoder and decoder around the blocks, and the embedders."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

MOST_GROUPS = 32
NORM_EPS = 1e-5
FREQUENCY_FEATURES = 256
FREQUENCY_PERIOD = 10_000.0


def count_groups(width: int) -> int:
    """Return the largest number of norm groups up to 32 that divides a width."""
    return max(groups for groups in range(1, MOST_GROUPS + 1) if width % groups == 0)


class ConvBlock(nn.Module):
    """Two norm-activation-convolution steps with the condition between them, and a skip.

    Args:
        width_in: channels that come in.
        width_out: channels that go out; the inner width is the smaller of the two.
        width_condition: features of the condition.
    """

    def __init__(self, width_in: int, width_out: int, width_condition: int) -> None:
        super().__init__()
        inner = min(width_in, width_out)
        self.norm1 = nn.GroupNorm(count_groups(width_in), width_in)
        self.conv1 = nn.Conv2d(width_in, inner, 3, padding=1)
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(width_condition, inner))
        self.norm2 = nn.GroupNorm(count_groups(inner), inner)
        self.conv2 = nn.Conv2d(inner, width_out, 3, padding=1)
        self.skip: nn.Module = nn.Identity()
        if width_in != width_out:
            self.skip = nn.Conv2d(width_in, width_out, 1)

    def forward(
        self, x: Float[Tensor, "b c h w"], condition: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b c_out h w"]:
        """Convolve a grid under a condition."""
        y = self.conv1(activate(self.norm1, x))
        y = y + self.condition(condition)[:, :, None, None]
        y = self.conv2(activate(self.norm2, y))
        if returns_its_own(self.conv2, nn.Conv2d):  # which does not look at its output again
            out: Tensor = y.add_(self.skip(x))
        else:
            out = y + self.skip(x)
        return out


def activate(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise, and apply SiLU in place where no gradient looks at its input again."""
    alone = returns_its_own(norm, nn.GroupNorm) and not torch.is_grad_enabled()
    return F.silu(norm(x), inplace=alone)


def returns_its_own(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether what a module returns is a new tensor that nobody else has seen."""
    return type(module) is kind and not module._forward_hooks


class ConvStack(nn.Module):
    """Conv blocks and a norm over channels: the encoder and the decoder.

    Args:
        widths: channels in front of, between and behind the blocks.
        width_condition: features of the condition.

    Example:
        >>> encoder = ConvStack((16, 16, 64), width_condition=64)
        >>> encoder(torch.randn(2, 16, 4, 6), torch.randn(2, 64)).shape
        torch.Size([2, 24, 64])
    """

    def __init__(self, widths: tuple[int, ...], width_condition: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ConvBlock(a, b, width_condition) for a, b in pairwise(widths))
        self.norm = nn.RMSNorm(widths[-1], eps=NORM_EPS)

    def forward(
        self, x: Float[Tensor, "b c h w"], condition: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b n c_out"]:
        """Convolve a grid and return its cells as tokens."""
        for block in self.blocks:
            x = block(x, condition)
        return normalise(self.norm, rearrange(x, "b d h w -> b (h w) d"))


def normalise(norm: nn.RMSNorm, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Apply a norm in the precision of its weight; autocast leaves it to the caller."""
    out: Tensor = norm(x.to(norm.weight.dtype))
    return out


class TimestepEmbedder(nn.Module):
    """Diffusion time to a vector: frequencies, then two linear layers.

    Args:
        width: features of the vector.
        shift: see `encode_time`.
    """

    def __init__(self, width: int, shift: int = 0) -> None:
        super().__init__()
        self.shift = shift
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, t: Float[Tensor, " b"] | Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Embed the time of each sample."""
        vector: Tensor = self.mlp(
            encode_time(t, shift=self.shift).to(next(self.mlp.parameters()).dtype)
        )
        return vector


def encode_time(
    t: Float[Tensor, " b"] | Int[Tensor, " b"], features: int = FREQUENCY_FEATURES, shift: int = 0
) -> Float[Tensor, "b e"]:
    """Return cosines, then sines of times at geometrically falling frequencies.

    With a shift of 1 the last frequency is the smallest one exactly, as diffusers counts them.
    """
    half = features // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(FREQUENCY_PERIOD) * steps / (half - shift))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class LabelEmbedder(nn.Module):
    """A vector per class, and one more for no class (the null class, the last row).

    Args:
        num_classes: classes without the null class.
        width: features of the vector.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Embed the label of each sample."""
        vector: Tensor = self.table(y)
        return vector
