"""Which heads and channel groups run at a step, and which tokens run the MLP."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from adaptok.float32 import Float32Module, without_autocast

FREQUENCIES = 16  # waves of a step embedding: half a wave over all steps, up to 32
SLOWEST, FASTEST = 0.5, 32.0
SQUEEZE = 16  # tokens are judged in a space that is narrower by this
SPREAD = 0.01  # of fresh weights: far less than the bias that keeps everything


@dataclass(frozen=True, slots=True, eq=False)
class StepMasks:
    """What runs at some steps: booleans only, made from the weights of the routers.

    Args:
        timesteps: the steps, on the host's own scale.
        heads: the heads that run, by step and block.
        groups: the channel groups that run.
    """

    timesteps: tuple[float, ...]
    heads: Bool[Tensor, "steps blocks heads"]
    groups: Bool[Tensor, "steps blocks groups"]


@dataclass(frozen=True, slots=True)
class BlockWidth:
    """Numbers of the heads and channel groups of one block that run."""

    heads: tuple[int, ...]
    groups: tuple[int, ...]


def embed_steps(timesteps: Float[Tensor, " b"], steps: float) -> Float[Tensor, " b features"]:
    """Return waves of the timesteps, slow ones first, so that near steps look alike.

    Args:
        timesteps: on the host's own scale.
        steps: length of that scale.

    Example:
        >>> embed_steps(torch.tensor([0.0, 500.0]), 1000.0).shape
        torch.Size([2, 32])
    """
    ratio = (FASTEST / SLOWEST) ** (1 / (FREQUENCIES - 1))
    exponents = torch.arange(FREQUENCIES, device=timesteps.device, dtype=torch.float32)
    waves = 2 * math.pi * SLOWEST * ratio**exponents
    angles = timesteps.float()[:, None] / steps * waves
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def hard_mask(
    logits: Float[Tensor, "..."], temperature: float, noise: Tensor | None = None
) -> Float[Tensor, "..."]:
    """Return 1 where a logit is above 0, else 0, with the gradient of a sigmoid.

    Args:
        logits: how much each part should run.
        temperature: the sigmoid's; a higher one lets a gradient through where the logit is far
            from 0.
        noise: added to the logits: logistic noise makes it a Gumbel-sigmoid.

    Example:
        >>> logits = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> hard_mask(logits, 5.0)
        tensor([0., 1.], grad_fn=<...>)
    """
    drawn = logits if noise is None else logits + noise
    return put_through(drawn > 0, (drawn / temperature).sigmoid())


def put_through(hard: Bool[Tensor, "..."], soft: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return a decision as 0 and 1 with the gradient of a probability (straight through)."""
    # zero is added first: 1 + p - p is not always 1
    return hard.to(soft.dtype) + (soft - soft.detach())


def draw_noise(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return logistic noise: the difference of two Gumbel numbers."""
    u = torch.rand(*shape, device=like.device, dtype=torch.float32)
    eps = torch.finfo(torch.float32).eps
    return torch.logit(u.clamp(eps, 1 - eps))


class StepRouter(Float32Module):
    """Two routers of each block, from the step: one of heads, one of channel groups.

    The first head and the first group are always on, so that they have no logit.

    Args:
        blocks: how many.
        heads: of each block; 1 means that heads are not chosen.
        groups: channel groups of each block; 1 means that channels are not chosen.
        steps: length of the host's scale of steps.
        start: logit of everything in the beginning.
    """

    def __init__(self, blocks: int, heads: int, groups: int, steps: float, start: float) -> None:
        super().__init__()
        self.heads, self.groups, self.steps = heads, groups, steps
        rows = heads + groups - 2
        self.weight = nn.Parameter(torch.randn(blocks, rows, 2 * FREQUENCIES) * SPREAD)
        self.bias = nn.Parameter(torch.full((blocks, rows), start))

    def forward(
        self, timesteps: Float[Tensor, " b"], blocks: slice
    ) -> tuple[Float[Tensor, "b blocks heads"], Float[Tensor, "b blocks groups"]]:
        """Return the logits of heads and groups but the first ones, of some blocks."""
        self.check_float32()
        with without_autocast(self.weight):
            waves = embed_steps(timesteps.to(self.weight.device), self.steps)
            logits = torch.einsum("bf,lrf->blr", waves, self.weight[blocks]) + self.bias[blocks]
        return logits[..., : self.heads - 1], logits[..., self.heads - 1 :]

    def decide(self, timestep: float, blocks: slice) -> tuple[BlockWidth, ...]:
        """Return what runs in some blocks at one step.

        Steps are decided one at a time: a decision must not depend on what else is in the batch.
        """
        with torch.no_grad():
            heads, groups = self(torch.tensor([timestep]), blocks)
            flags = (torch.cat([heads, groups], dim=2)[0] > 0).tolist()
        made = []
        for row in flags:
            on = [number + 1 for number, flag in enumerate(row[: self.heads - 1]) if flag]
            rest = [number + 1 for number, flag in enumerate(row[self.heads - 1 :]) if flag]
            made.append(BlockWidth((0, *on), (0, *rest)))
        return tuple(made)


class TokenRouter(nn.Module):
    """Says which tokens should run an MLP, from what the MLP would take.

    The narrow layer has the dtype of the model; the logit is made in float32.

    Args:
        width: features of a token.
        start: logit of every token in the beginning.
    """

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        narrow = max(1, width // SQUEEZE)
        self.squeeze = nn.Linear(width, narrow)
        self.score = Score(narrow, start)

    def forward(self, y: Float[Tensor, "b s d"]) -> Float[Tensor, "b s"]:
        """Return one logit per token."""
        normed = F.layer_norm(y, y.shape[-1:]).to(self.squeeze.weight.dtype)
        logits: Tensor = self.score(F.gelu(self.squeeze(normed)))
        return logits


class Score(Float32Module):
    """A weighted sum in float32, so that ranks have few ties.

    Args:
        width: features.
        start: its bias.
    """

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * SPREAD)
        self.bias = nn.Parameter(torch.tensor(start))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "..."]:
        """Return the sums."""
        self.check_float32()
        with without_autocast(x):
            return x.float() @ self.weight + self.bias
