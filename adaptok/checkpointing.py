"""Gradient checkpointing: block by block, never the whole block list as one.

A host that checkpoints its blocks meets one "block" after a wrap, the whole list; recomputing it as
one would save nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

CHECKPOINT_MODULE = "torch.utils.checkpoint"


def is_checkpointed() -> bool:
    """Say whether the running code will be recomputed by a (non-reentrant) checkpoint.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> seen = []
        >>> def run(x):
        ...     seen.append(is_checkpointed())
        ...     return x * 2
        >>> out = checkpoint(run, torch.ones(1, requires_grad=True), use_reentrant=False)
        >>> seen, is_checkpointed()
        ([True], False)
    """
    if torch.compiler.is_compiling():
        return False  # a graph decides for itself what it recomputes
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return bool(hooks) and hooks[0].__module__ == CHECKPOINT_MODULE


@contextmanager
def shield() -> Iterator[None]:
    """Take what is saved for the backward pass out of the hands of a checkpoint around it.

    Of several pairs of hooks only the innermost acts; this one keeps tensors as they are.
    """

    def keep(x: Tensor) -> Tensor:
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        yield
