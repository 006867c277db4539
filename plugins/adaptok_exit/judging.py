"""The small head that judges whether a sample may leave."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from adaptok import BlockCall
from adaptok.float32 import Float32Module, without_autocast

SHY = -16.0  # logit of a fresh judge, which lets nobody leave
NARROWING = 4  # width of a token over that of the hidden layer


class ExitJudge(Float32Module):
    """Judges how surely a sample that leaves here agrees with one that runs all blocks.

    It reads the class token and the mean of the grid tokens (that alone, where there is no class
    token), and only judges: what leaves are the features. Float32 always, since a threshold does
    not survive rounding.

    Args:
        width: features of a token.
        limit: confidence above which a sample leaves; infinity: nobody does.

    Example:
        >>> judge = ExitJudge(8)
        >>> judge(BlockCall(torch.randn(2, 4, 8), grid=(2, 2))).shape
        torch.Size([2])
    """

    limit: Tensor

    def __init__(self, width: int, limit: float = math.inf) -> None:
        super().__init__()
        hidden = max(1, width // NARROWING)
        self.norm = nn.LayerNorm(2 * width)
        self.hidden = nn.Linear(2 * width, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, SHY)
        self.register_buffer("limit", torch.tensor(limit, dtype=torch.float32))

    def forward(self, call: BlockCall) -> Float[Tensor, " b"]:
        """Return the logit of the confidence of each sample.

        Args:
            call: the tokens at the exit.

        Returns:
            One number per sample; the sigmoid of it is the confidence.
        """
        return self.score(pool_tokens(call))

    def score(self, pooled: Float[Tensor, "b e"]) -> Float[Tensor, " b"]:
        """Return the logit of the confidence for what `pool_tokens` made of samples."""
        self.check_float32()
        with without_autocast(pooled):
            logit: Tensor = self.out(F.gelu(self.hidden(self.norm(pooled))))
        return logit[:, 0]

    def choose_leavers(self, call: BlockCall) -> list[bool]:
        """Say which samples leave; one whose confidence is no number stays.

        Args:
            call: the tokens at the exit.
        """
        confident: Tensor = self(call).sigmoid() > self.limit
        return [bool(value) for value in confident.tolist()]


def pool_tokens(call: BlockCall) -> Float[Tensor, "b e"]:
    """Return the class token of each sample and the mean of its grid tokens, in float32."""
    mean = call.cell_x.mean(1, dtype=torch.float32)
    first = call.x[:, 0].float() if call.has_class else mean
    return torch.cat([first, mean], dim=1)
