"""Parts that must stay in float32 whatever the rest of a model does."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Self

import torch
from torch import Tensor, nn

from adaptok.errors import DtypeError


class Float32Module(nn.Module):
    """A module whose parameters stay float32 under `.to(bfloat16)`, `.half()` and the like.

    A decision that flips with rounding, or a weight that sums to one, does not survive half
    precision; moving to another device works as usual.

    Example:
        >>> module = Float32Module()
        >>> module.weight = nn.Parameter(torch.ones(2))
        >>> module.to(torch.bfloat16).weight.dtype
        torch.float32
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_float32(x: Tensor) -> Tensor:
            moved = fn(x)
            if not x.is_floating_point() or moved.dtype in (x.dtype, torch.float32):
                return moved
            return x.to(moved.device)

        super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call]
        return self

    def check_float32(self) -> None:
        """Raise a `DtypeError` unless the weights are float32, as they may not be after a load."""
        wrong = {p.dtype for p in self.parameters()} - {torch.float32}
        if wrong:
            raise DtypeError(
                f"{type(self).__name__} runs in float32 only, and its weights are {wrong.pop()}: "
                "call .float() on it, and load weights without assign=True"
            )


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Return a context in which autocast does not touch the device of a tensor."""
    return torch.autocast(x.device.type, enabled=False)
