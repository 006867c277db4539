"""Compiling an adaptive model: one graph where counts are known, regions where they are not."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import nn

from adaptok.blocks import list_adaptive
from adaptok.errors import NotWrappedError
from adaptok.regions import Regional

Model = TypeVar("Model", bound=nn.Module)
# Graphs of one region: natural, dropped and exact budgets, one sample or several, with gradient
# and without, and each precision. Far below it in practice, and a bound all the same.
MOST_GRAPHS = 64


@dataclass(frozen=True, slots=True, eq=False)
class HostCall:
    """The compiled call of a wrapped model, and what stood in its place.

    It stands where `torch.nn.Module.compile` puts its own, so that copies and pickles are
    without it, too.

    Args:
        run: the compiled call.
        before: what the user's own `model.compile()` had put there, to be given back.
    """

    run: Callable[..., Any]
    before: Callable[..., Any] | None

    @classmethod
    def of(cls, model: nn.Module, mode: str | None, backend: str | Callable[..., Any]) -> Self:
        """Compile the call of a model (see `compile`)."""
        before = model._compiled_call_impl
        run = torch.compile(model._call_impl, **options_of(mode, backend))
        return cls(run, before.before if isinstance(before, HostCall) else before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Run the compiled call."""
        return self.run(*args, **kwargs)


def compile(
    model: Model, *, mode: str | None = None, backend: str | Callable[..., Any] = "inductor"
) -> Model:
    """Compile an adaptive model in place, so that budgets may change without compiling again.

    With one exact count for all samples the whole model is one graph. Where counts depend on the
    image, the forward pass is cut once, where the host waits for them, and the regions in front of
    the cut, between the kept tokens, and behind it are compiled each for itself, with a number of
    tokens that may change.

    Args:
        model: a wrapped model, a `DCDiT`, or a model that holds one.
        mode: mode of `torch.compile` for what is one graph, such as `"reduce-overhead"` (CUDA
            graphs, for the layout `"fixed"`); regions with changing shapes take the default.
        backend: backend of `torch.compile`.

    Returns:
        The same object. `adaptok.unwrap` undoes the compilation of a wrapped model, too.

    Raises:
        NotWrappedError: nothing in the model is adaptive.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> adaptok.compile(vit, backend="eager")(torch.randn(2, 3, 32, 48)).shape
        torch.Size([2, 10])
    """
    if not isinstance(model, nn.Module):
        raise NotWrappedError(
            f"a {type(model).__name__} is no module: give the model itself, such as "
            "pipe.transformer of a pipeline"
        )
    regional = find_regional(model)
    if not regional:
        raise NotWrappedError(
            f"nothing in {type(model).__name__} is adaptive: call adaptok.wrap(model, ...) first, "
            "or torch.compile(model) for a model as it is"
        )
    for module in regional:
        for name in module.regions:
            static = name in module.static_regions
            module.compile_region(name, make_compiler(mode if static else None, backend))
    if list_adaptive(model):  # the host's own part around the blocks
        model._compiled_call_impl = HostCall.of(model, mode, backend)
    return model


def is_compiled(model: nn.Module) -> bool:
    """Say whether `adaptok.compile` compiled a model.

    Args:
        model: any module.

    Returns:
        Whether it did, and nobody undid it.

    Example:
        >>> is_compiled(nn.Linear(2, 2))
        False
    """
    return any(module.compiled_regions for module in find_regional(model))


def uncompile(model: Model) -> Model:
    """Forget what `adaptok.compile` compiled; a `model.compile()` of before holds again.

    Args:
        model: any module; one that is not compiled stays as it is.

    Returns:
        The same object.

    Example:
        >>> from adaptok.testing import make_vit
        >>> import adaptok
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> is_compiled(uncompile(compile(vit)))
        False
    """
    for module in model.modules():
        if isinstance(module._compiled_call_impl, HostCall):
            module._compiled_call_impl = module._compiled_call_impl.before
    for module in find_regional(model):
        module.compiled_regions = {}
    return model


def find_regional(model: nn.Module) -> list[Regional]:
    """Return the parts of a model that have regions."""
    return [module for module in model.modules() if isinstance(module, Regional)]


def make_compiler(
    mode: str | None, backend: str | Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what compiles one region."""
    options = options_of(mode, backend)

    def compile_region(method: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(method, **options)
        return compiled

    return compile_region


def options_of(mode: str | None, backend: str | Callable[..., Any]) -> dict[str, Any]:
    """Return options of `torch.compile`, with a bound on the graphs where it takes one."""
    options: dict[str, Any] = {"backend": backend, "mode": mode}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = MOST_GRAPHS
    return options
