"""What the adapters of diffusers share: branches of guidance, examples, checks of inputs."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from adaptok.budgeted import Budgeted
from adaptok.errors import HandOverError, HostOptionError
from adaptok.hosts import HostInputs, device_of, dtype_of
from adaptok.tokens import Grid


def name_halves(
    blocks: nn.Module, latents: Sequence[Tensor], order: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the branches of a batch whose halves are both branches of guidance.

    Whether they are is looked at where a budget depends on it: both see the same latents.

    Args:
        blocks: the block list.
        latents: one per sample.
        order: the order of the branches in the family's pipelines.

    Returns:
        The order, or nothing where the halves are no branches.
    """
    b = len(latents)
    if b % 2:
        return ()
    stages = getattr(blocks, "stages", ())  # a probe runs the host's own list, too
    asked = any(isinstance(s, Budgeted) and s.uncond_setting is not None for s in stages)
    pairs = zip(latents[: b // 2], latents[b // 2 :], strict=True)
    if asked and not all(torch.equal(first, second) for first, second in pairs):
        return ()
    return order


def check_cells(x: Tensor, grid: Grid, *, exact: bool = True) -> None:
    """Raise a `HandOverError` unless the tokens are the cells of a grid.

    Args:
        x: the tokens, `(b s d)`.
        grid: lengths of the grid axes.
        exact: whether nothing may follow the cells.
    """
    n = math.prod(grid)
    if x.shape[1] < n or (exact and x.shape[1] != n):
        raise HandOverError(
            f"the blocks got {x.shape[1]} tokens, and the latents have {n} cells, {grid}: a "
            "sequence that is split over several devices, or has more in it, is not supported"
        )


def check_attention_kwargs(given: object, name: str) -> None:
    """Raise a `HostOptionError` if attention gets tensors whose rows nobody knows.

    Args:
        given: the mapping that the host hands to its attention, or None.
        name: the option.

    Raises:
        HostOptionError: there is a tensor in it, of an IP adapter, for instance.
    """
    if not isinstance(given, Mapping):
        return
    for key, value in given.items():
        if holds_tensor(value):
            raise HostOptionError(
                f"{name}={{{key!r}: ...}} hands tensors to the attention of every block, and it "
                "is not known which of their rows belong to tokens that are left out: run IP "
                "adapters and masks on the unwrapped model"
            )


def holds_tensor(value: object) -> bool:
    """Say whether a value is a tensor, or a collection with one in it."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(holds_tensor(part) for part in value)
    return isinstance(value, Tensor)


def condition_of(value: Tensor | None, b: int) -> Tensor | None:
    """Return conditioning vectors as one per sample, `(b c)`; None if they are no vectors."""
    if value is None or value.ndim < 2:
        return None
    vectors = value.flatten(1)
    return vectors.expand(b, -1) if vectors.shape[0] == 1 else vectors


def make_noise(model: nn.Module, *shape: int, seed: int = 0) -> Tensor:
    """Return normal noise on the device and in the dtype of a model, the same in every run."""
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(device_of(model), dtype_of(model))


def make_times(model: nn.Module, *values: float) -> Tensor:
    """Return timesteps on the device of a model; floating-point ones, as pipelines give them."""
    return torch.tensor(values, device=device_of(model))


def give(**inputs: object) -> HostInputs:
    """Return arguments by name, without those that are None."""
    return HostInputs(kwargs={name: value for name, value in inputs.items() if value is not None})
