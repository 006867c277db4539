"""Peak memory of a call: what it holds at most beyond what was there before."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptok.measure.latency import Call, wait_for_device


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations inside a `with` block make, while they live.

    It counts storage by storage, the same on every device. What an operation needs for itself
    inside is not seen, nor what a compiled graph makes.

    Example:
        >>> with LiveMemory() as memory:
        ...     x = torch.ones(1000)
        ...     y = x + 1
        ...     del x
        ...     z = y.view(10, 100).exp()
        >>> memory.now, memory.peak
        (8000, 8000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Run an operation and count what it made."""
        kwargs = kwargs or {}
        with self:  # in inference mode whole compositions come here: their parts count
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **kwargs)
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


def measure_peak(fn: Call, device: torch.device) -> int:
    """Return the most bytes that a call holds beyond what was held before.

    On a GPU the allocator says so, for compiled code too. Elsewhere the bytes of live tensors are
    counted in eager mode (see `LiveMemory`).

    Args:
        fn: what to call.
        device: where it runs.

    Returns:
        Bytes.

    Example:
        >>> measure_peak(lambda: torch.ones(1000) + 1, torch.device("cpu"))
        8000
    """
    if device.type == "cuda":
        wait_for_device(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        wait_for_device(device)
        return int(torch.cuda.max_memory_allocated(device) - held)
    with torch.compiler.set_stance("force_eager"), LiveMemory() as memory:
        fn()
    return int(memory.peak)
