"""Which guidance branch a pipeline of diffusers is in, where it calls its model once per branch.

Such pipelines say it by `with model.cache_context("cond"): ...`, which tells every stateful hook in
the model. The block list gets a hook that does nothing else than to be told.
"""

import sys
from typing import Any

from torch import nn

HOME = "diffusers.hooks.hooks"
NAME = "adaptok"
BRANCHES = ("cond", "uncond")


class ContextReader:
    """A hook of diffusers that holds the context it was told, and changes no forward.

    Args:
        told: a `StateManager` of diffusers.
    """

    _is_stateful = True

    def __init__(self, told: Any) -> None:  # noqa: ANN401
        self.told = told
        self.fn_ref = None

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget nothing: a context ends with its `with` block."""
        return module


def listen_for_contexts(model: nn.Module, blocks: nn.Module) -> None:
    """Let a block list be told what `model.cache_context(...)` says; it goes with the list.

    Args:
        model: the host.
        blocks: its block list.
    """
    hooks = sys.modules.get(HOME)
    if hooks is None or not hasattr(model, "cache_context"):
        return
    registry = hooks.HookRegistry.check_if_exists_or_initialize(blocks)
    if NAME not in registry.hooks:  # as register_hook does, without a new forward
        registry.hooks[NAME] = ContextReader(hooks.StateManager(hooks.BaseState))
        registry._hook_order.append(NAME)
        registry._fn_refs.append(hooks.HookFunctionReference())
    known = getattr(model, "_diffusers_hook", None)
    if known is not None:  # it ran before, and remembers which of its parts have hooks
        known.invalidate_child_registries_cache()


def read_branch(blocks: nn.Module) -> tuple[str, ...]:
    """Return the guidance branch that the context around this call names, if it names one.

    Args:
        blocks: the block list.

    Returns:
        One name, or none.
    """
    registry = getattr(blocks, "_diffusers_hook", None)
    reader = None if registry is None else registry.hooks.get(NAME)
    context = None if reader is None else reader.told._context
    name = getattr(context, "name", None)
    return (name,) if name in BRANCHES else ()
