"""DynamicViT's predictor: how much each token is worth keeping."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.errors import ConfigError
from adaptok.float32 import Float32Module, without_autocast

NARROWEST = 8


class KeepPredictor(Float32Module):
    """Reads tokens and says with which probability each of them stays.

    One half of what it sees of a token is the token's own, the other half the mean over all that
    are left. Runs in float32 always.

    Args:
        width: features of a token.

    Raises:
        ConfigError: there are too few features to halve twice.

    Example:
        >>> predictor = KeepPredictor(16)
        >>> chance = predictor(torch.randn(2, 6, 16), torch.ones(2, 6)).exp()
        >>> chance.shape, torch.allclose(chance.sum(-1), torch.ones(2, 6))
        (torch.Size([2, 6, 2]), True)

    Paper: Rao et al., DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification,
    2021.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < NARROWEST:
            raise ConfigError(f"the predictor needs tokens of at least {NARROWEST} features")
        self.norm = nn.LayerNorm(width)
        self.enter = nn.Linear(width, width)
        self.narrow = nn.Linear(width, width // 2)
        self.narrower = nn.Linear(width // 2, width // 4)
        self.decide = nn.Linear(width // 4, 2)

    def forward(
        self, x: Float[Tensor, "b m d"], mask: Float[Tensor, "b m"]
    ) -> Float[Tensor, "b m 2"]:
        """Return logarithms of the probabilities to stay and to go.

        Args:
            x: features of the tokens.
            mask: 1 for those that are left, 0 for others.

        Returns:
            Log-probabilities: first that a token stays, then that it goes.
        """
        self.check_float32()
        with without_autocast(x):
            seen = F.gelu(self.enter(self.norm(x.float())))
            half = seen.shape[-1] // 2
            own, shared = seen[..., :half], seen[..., half:]
            weight = mask[..., None]
            total = weight.sum(1, keepdim=True).clamp(min=1e-6)
            mean = (shared * weight).sum(1, keepdim=True) / total
            joined = torch.cat([own, mean.expand_as(shared)], dim=-1)
            hidden = F.gelu(self.narrower(F.gelu(self.narrow(joined))))
            return F.log_softmax(self.decide(hidden), dim=-1)


def draw_kept(log_prob: Float[Tensor, "b m 2"]) -> Float[Tensor, "b m"]:
    """Draw which tokens stay; the gradient is that of the soft decision (Gumbel-softmax).

    Args:
        log_prob: logarithms of the probabilities to stay and to go.

    Returns:
        1 for tokens that stay and 0 for others, exactly; from torch's default generator.

    Example:
        >>> kept = draw_kept(torch.tensor([[[0.0, -99.0], [-99.0, 0.0]]]))
        >>> kept
        tensor([[1., 0.]])
    """
    # the smallest draws are cut off, since the logarithm of zero is no number
    tiny = torch.finfo(log_prob.dtype).tiny
    noise = -torch.empty_like(log_prob).exponential_().clamp(min=tiny).log()
    soft = (log_prob + noise).softmax(-1)[..., 0]
    hard = (soft >= 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())
