"""What forms of other people's blocks need: exact classes, and blocks that nobody listens to."""

import sys

import torch
from torch import nn

from adaptok.errors import HostOptionError


def is_exactly(module: object, home: str, name: str) -> bool:
    """Say whether a module is of exactly one class, no subclass of it.

    Args:
        module: any object.
        home: the module of the class; it is never imported here.
        name: the class.

    Example:
        >>> is_exactly(nn.LayerNorm(2), "torch.nn", "LayerNorm")
        True
    """
    return type(module) is getattr(sys.modules.get(home), name, None)


def is_touched(module: nn.Module) -> bool:
    """Say whether somebody listens to a module's calls or has replaced its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def check_untouched(block: nn.Module) -> None:
    """Raise a `HostOptionError` where hooks of a block or its attention would be passed by."""
    if torch.compiler.is_compiling():
        return
    attn = block.get_submodule("attn")
    if is_touched(block) or is_touched(attn):
        raise HostOptionError(
            f"a hook listens to {type(block).__name__} or its attention (offloading does, too), "
            "and fewer tokens run its submodules one by one: remove the hook, or unwrap the model"
        )
