"""Where a host's forward is listened to, so that its block list knows what it cannot see."""

from typing import Any

from torch import nn

from adaptok.blocks import AdaptiveBlocks
from adaptok.host_numbers import join_numbers


class Entrance:
    """A forward pre-hook that hands plain numbers of a call to the block list.

    Args:
        path: the submodule that it listens to.
        leader: the block list.
    """

    def __init__(self, path: str, leader: AdaptiveBlocks) -> None:
        self.path = path
        self.leader = leader

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hand the numbers over."""
        leader = self.leader
        before = leader.handed.take()  # a call that is refused leaves nothing
        part = leader.backbone.hand_over(self.path, module, args, kwargs)
        now = before if part is None else join_numbers(before, part)
        if now is not None:
            leader.handed.put(now)
