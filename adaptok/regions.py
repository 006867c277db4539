"""Regions: the pieces of a forward pass between the places where the host waits for the device.

A forward pass whose number of tokens depends on the image is cut once: counts must reach the host
before the short sequence can run. What lies before and behind the cut is compiled each for itself.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from adaptok.errors import ConfigError

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class Regional(nn.Module):
    """A module whose methods named in `regions` may be compiled, each for itself.

    Compiled methods are no state: a copy, a pickle and a state dict are without them, as with
    `torch.nn.Module.compile`.

    Example:
        >>> class Doubler(Regional):
        ...     regions = ("double",)
        ...     def double(self, x):
        ...         return 2 * x
        ...     def forward(self, x):
        ...         return self.region("double")(x)
        >>> module = Doubler()
        >>> module.compile_region("double", lambda method: print("compiled") or method)
        compiled
        >>> module(3)
        6
    """

    regions: ClassVar[tuple[str, ...]] = ()
    static_regions: ClassVar[tuple[str, ...]] = ()  # those whose shapes do not change by the image

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self.compiled_regions: dict[str, Callable[..., Any]] = {}

    def region(self, name: str) -> Callable[..., Any]:
        """Return a region to call, compiled where it was asked for.

        Args:
            name: one of `regions`.

        Returns:
            The method, or its compiled form.

        Raises:
            ConfigError: there is no such region.
        """
        if name not in self.regions:
            raise ConfigError(f"{type(self).__name__} has no region {name!r}: {self.regions}")
        method: Callable[..., Any] = getattr(self, name)
        if torch.compiler.is_compiling():  # a part of a larger graph
            return method
        return self.compiled_regions.get(name, method)

    def compile_region(self, name: str, compile_method: Compile) -> None:
        """Compile a region.

        Args:
            name: one of `regions`.
            compile_method: takes a method and returns its compiled form.

        Raises:
            ConfigError: there is no such region.
        """
        self.compiled_regions[name] = compile_method(self.region(name))

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "compiled_regions": {}}


def mark_dynamic(x: torch.Tensor, *axes: int) -> torch.Tensor:
    """Tell the compiler that axes of a tensor change from call to call, so that it does not wait.

    Args:
        x: what goes into a compiled region.
        axes: the axes.

    Returns:
        The same tensor.
    """
    if not torch.compiler.is_compiling():
        for axis in axes:
            torch._dynamo.maybe_mark_dynamic(x, axis)
    return x
