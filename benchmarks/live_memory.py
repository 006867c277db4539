"""Peak of the memory that tensors hold, counted storage by storage; the same on every device."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations inside a `with` block make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it made."""
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf, before)
        return out

    def count(self, tensor: torch.Tensor, inputs: set[int]) -> None:
        """Count a storage once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known or key in inputs:
            return
        size = storage.nbytes()
        self.known[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        """Count a freed storage off."""
        self.now -= self.known.pop(key, 0)
