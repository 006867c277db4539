"""Losses that teach a model to use less of its width."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from adaptok.errors import ConfigError, NotWrappedError

if TYPE_CHECKING:
    from adaptok_width.stage import DynamicWidth

WEIGHT = 2.0


def count_ratio(
    heads: Float[Tensor, "..."],
    groups: Float[Tensor, "..."],
    tokens: Float[Tensor, "..."],
    *,
    count: int,
    width: int,
    hidden: int,
) -> Float[Tensor, "..."]:
    """Return the operations of blocks that run on a part of their width, as a share of all.

    `(attention * heads + mlp * groups * tokens) / (attention + mlp)`, with the products of a
    block's layers and of attention itself; modulation, norms and routers are not counted.

    Args:
        heads: share of the heads that run.
        groups: share of the channels that run.
        tokens: share of the tokens that run the MLP.
        count: tokens of a sample.
        width: features of a token.
        hidden: channels of the MLP.

    Returns:
        The share, 1 where everything runs.

    Example:
        >>> import torch
        >>> half, one = torch.tensor(0.5), torch.tensor(1.0)
        >>> count_ratio(half, half, one, count=16, width=64, hidden=256)
        tensor(0.5000)

    Paper: Zhao et al., DyDiT++: Dynamic Diffusion Transformers for Efficient Visual Generation,
    arXiv 2504.06803.
    """
    attention = 4 * width * width + 2 * count * width  # products of one token
    mlp = 2 * width * hidden
    return (attention * heads + mlp * groups * tokens) / (attention + mlp)


def width_loss(ratio: Float[Tensor, "..."], target: float) -> Float[Tensor, ""]:
    """Pull the mean share of operations to a target: `2 * (mean - target)^2`.

    Args:
        ratio: shares, see `count_ratio`; their mean counts, so that steps, blocks and images may
            differ.
        target: what it shall be.

    Example:
        >>> import torch
        >>> width_loss(torch.tensor([1.0, 0.5]), 0.25)
        tensor(0.5000)
    """
    return WEIGHT * (ratio.mean() - target) ** 2


def anneal_target(step: int, steps: int, target: float) -> float:
    """Return the target at a training step: from 1 down to `target` in a straight line.

    Args:
        step: number of the training step, from 0.
        steps: how long it goes down; 0 means that the target counts at once.
        target: where it stays.

    Raises:
        ConfigError: a number is below 0.

    Example:
        >>> [anneal_target(step, 100, 0.5) for step in (0, 50, 300)]
        [1.0, 0.75, 0.5]
    """
    if step < 0 or steps < 0:
        raise ConfigError(f"training steps are counted from 0, got step {step} of {steps}")
    done = 1.0 if steps == 0 else min(1.0, step / steps)
    return 1.0 - done * (1.0 - target)


def find_stage(model: nn.Module) -> "DynamicWidth":
    """Return the width stage of a wrapped model.

    Raises:
        NotWrappedError: it has none.
    """
    from adaptok_width.stage import DynamicWidth

    for module in model.modules():
        if isinstance(module, DynamicWidth):
            return module
    raise NotWrappedError(
        f'{type(model).__name__} has no width stage: adaptok.wrap(model, stack=["width"]) first'
    )


@contextmanager
def full_width(model: nn.Module) -> Iterator[nn.Module]:
    """Run a model with all heads, channels and tokens of its blocks for a while.

    Args:
        model: a model with a width stage.

    Yields:
        The model.

    Raises:
        NotWrappedError: it has no width stage.
    """
    stage = find_stage(model)
    before, stage.complete = stage.complete, True
    try:
        yield model
    finally:
        stage.complete = before


def training_losses(
    model: nn.Module, compute: Callable[[], Float[Tensor, ""]]
) -> dict[str, Float[Tensor, ""]]:
    """Return the three losses of a training step; train on their sum.

    Args:
        model: a wrapped model with a width stage, in training mode.
        compute: runs the model on a batch and returns its own loss, such as the error of the noise.
            It is called twice, and should draw the same batch, times and noise.

    Returns:
        `"dynamic"`, the loss on the part of the width that the routers leave; `"complete"`, that
        on all of it, which keeps the weights whole; `"width"`, the loss of the share of
        operations, and whatever other stages add.

    Raises:
        NotWrappedError: the model has no width stage.

    Example:
        >>> import adaptok, torch
        >>> from adaptok.dc.baseline import DiT
        >>> from adaptok.dc.config import DiTConfig
        >>> dit = DiT(DiTConfig(hidden_size=64, depth=2, num_heads=4, latent_size=8))
        >>> _ = adaptok.wrap(dit, stack=["width"]).train()
        >>> x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2])
        >>> sorted(training_losses(dit, lambda: (dit(x, t, y) ** 2).mean()))
        ['complete', 'dynamic', 'width']
    """
    from adaptok import collect_losses

    with full_width(model):
        complete = compute()
    with collect_losses(model) as added:
        dynamic = compute()
    return {"dynamic": dynamic, "complete": complete, **added}
