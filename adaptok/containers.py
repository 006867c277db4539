"""What stands where a host kept its block list; its children keep their names."""

from collections.abc import Iterator
from typing import overload

from torch import nn

from adaptok.errors import HostOptionError


class BlockContainer(nn.Module):
    """A block list of a host that is run by somebody else; its children keep their names.

    Args:
        original: the host's own container, which `unwrap` puts back.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # in a tuple, so that the container is not registered and its keys do not appear twice
        self.original = (original,)
        self.names = tuple(name for name, _ in original.named_children())
        self.count = len(self.names)  # of the host's list, also while a probe cuts it short
        for name, block in original.named_children():
            self.add_module(name, block)
        self.training = original.training

    @property
    def blocks(self) -> list[nn.Module]:
        """The host's blocks."""
        modules = [self._modules[name] for name in self.names]
        return [module for module in modules if module is not None]

    def restore(self) -> nn.Module:
        """Return the host's own container, with the blocks that are here now."""
        (original,) = self.original
        for name in self.names:
            original._modules[name] = self._modules[name]
        original.training = self.training
        return original

    def __iter__(self) -> Iterator[nn.Module]:
        yield from ()

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        # a TypeError, so that list() of the container still works
        raise HostOptionError(
            "the blocks of a wrapped model are run as one: whoever counts them wants single blocks "
            "(timm's forward_intermediates and prune_intermediate_layers do). Call "
            "adaptok.unwrap(model) before, or read routings and plans by adaptok.trace(model). In "
            "a model of your own loop over the list itself, `for block in self.blocks`"
        )

    @overload
    def __getitem__(self, index: int | str) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> list[nn.Module]: ...

    def __getitem__(self, index: int | str | slice) -> nn.Module | list[nn.Module]:
        if isinstance(index, slice):
            if range(self.count)[index] == range(self.count):
                return list(self)  # all of them: the loop is ours
            return self.blocks[index]
        if isinstance(index, str):
            return self.get_submodule(index)
        return self.blocks[index]

    def __setitem__(self, index: int, block: nn.Module) -> None:
        setattr(self, self.names[index], block)


class FollowingBlocks(BlockContainer):
    """The second of two containers in a row: its blocks are run by the first one's."""


class Parts(nn.ModuleDict):
    """The stages of a wrap, as a child of the block list."""

    def forward(self, *args: object, **kwargs: object) -> None:
        """Refuse to be run as if it were a block."""
        raise HostOptionError(
            "this model runs the children of its list of blocks one by one, and a wrapped list "
            "runs them itself: let its forward iterate the list (for block in self.blocks)"
        )
