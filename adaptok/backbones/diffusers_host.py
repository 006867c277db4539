"""What diffusion transformers of diffusers have in common."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from adaptok.backbones.diffusers_inputs import check_attention_kwargs
from adaptok.calls import BlockCall, HostNumbers
from adaptok.errors import HostOptionError
from adaptok.hosts import (
    Backbone,
    bind_arguments,
    check_blocks,
    is_instance,
    refuse_option,
    require,
)

VERSIONS = "diffusers 0.42.1"
MODELS = "diffusers.models.transformers"


class DiffusersHost(Backbone):
    """Adapter of one class of diffusers; its forward is the only way into the model.

    Args:
        containers: attribute paths of the block lists.
        width: features of a token.
        depth: number of blocks.
        grid_axes: axes of the grid.
    """

    versions = VERSIONS
    home: ClassVar[str]  # module below `MODELS`
    host: ClassVar[str]  # its class
    lists: ClassVar[tuple[str, ...]]
    parameters: ClassVar[tuple[str, ...]]  # of the host's forward, in order
    attention_option: ClassVar[str]
    # Options that reach into single blocks, with what to do instead.
    refused: ClassVar[Mapping[str, str]] = {}
    axes: ClassVar[int] = 2
    timestep_argument: ClassVar[str] = "timestep"
    has_step = True

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a model of this class (see `Backbone.match`)."""
        require(is_instance(model, f"{MODELS}.{cls.home}", cls.host), f"no diffusers {cls.host}")
        blocks = [block for path in cls.lists for block in check_blocks(model, path).children()]
        for block in blocks:
            check_block(block)
        return cls(
            containers=cls.lists,
            width=cls.find_width(model),
            depth=len(blocks),
            grid_axes=cls.axes,
        )

    @classmethod
    def find_width(cls, model: nn.Module) -> int:
        """Return the features of a token."""
        return int(model.inner_dim)  # type: ignore[arg-type]

    def hand_over(
        self, entrance: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostNumbers | None:
        """Return grid, branches and step, unless a block is asked for (see `hand_over`)."""
        given = bind_arguments(self.parameters, args, kwargs)
        for name, advice in self.refused.items():
            if given.get(name) is not None:
                refuse_option(name, advice)
        check_attention_kwargs(given.get(self.attention_option), self.attention_option)
        return replace(self.find_numbers(module, given), timestep=self.find_timestep(given))

    def find_timestep(self, given: dict[str, Any]) -> Tensor | None:
        """Return the diffusion step of each sample, or one for all.

        Args:
            given: arguments of the host's forward, by name.
        """
        value = given.get(self.timestep_argument)
        return value if isinstance(value, Tensor) else None

    @abstractmethod
    def find_numbers(self, model: nn.Module, given: dict[str, Any]) -> HostNumbers:
        """Return the numbers of a forward pass.

        Args:
            model: the host.
            given: arguments of its forward, by name.
        """

    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block (see `Backbone.run`)."""
        check_block(block)
        return self.run_block(block, call)

    @abstractmethod
    def run_block(self, block: nn.Module, call: BlockCall) -> BlockCall:
        """Call a block that was looked at.

        Args:
            block: the block.
            call: what it takes.

        Returns:
            The call with what it returned.
        """

    def write(self, call: BlockCall) -> Any:  # noqa: ANN401
        """Return the tokens (see `Backbone.write`)."""
        return call.x

    def first_list(self, model: nn.Module) -> nn.Module:
        """Return the first block list of a model."""
        return model.get_submodule(self.containers[0])


def check_block(block: nn.Module) -> None:
    """Raise a `HostOptionError` if something was put on a block that counts its tokens or samples.

    Args:
        block: a block of the host.

    Raises:
        HostOptionError: it caches what it computed, perturbs attention of a part of the batch, or
            computes its feed-forward in pieces.
    """
    name = type(block).__name__
    if getattr(block, "_chunk_size", None):
        raise HostOptionError(
            "enable_forward_chunking() cuts tokens into equal pieces, and a wrapped model has "
            "other counts: call disable_forward_chunking(), fewer tokens need less memory"
        )
    for module in (block, *block.children()):
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and any(hook._is_stateful for hook in registry.hooks.values()):
            raise HostOptionError(
                f"{name} has a cache hook of diffusers ({', '.join(registry.hooks)}), which keeps "
                "features of other tokens: call disable_cache() on the model, or unwrap it"
            )
        processor = type(getattr(module, "processor", None)).__name__
        if processor.startswith("PAG"):
            raise HostOptionError(
                f"perturbed attention guidance ({processor}) treats parts of the batch unlike, "
                "and a wrapped model runs samples in groups of its own: unwrap it"
            )
