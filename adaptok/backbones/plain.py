"""A plain list of blocks, described by the user in three arguments."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptok.calls import BlockCall, HostNumbers
from adaptok.errors import ConfigError, HandOverError, UnsupportedModelError
from adaptok.hosts import Backbone, HostInputs, NoMatch, check_blocks
from adaptok.tokens import Grid


class ListBackbone(Backbone):
    """Adapter of a model whose blocks are called one after the other, `x = block(x, ...)`.

    The first argument of a block, and what it returns, is `(b s d)`: prefix tokens, then the cells
    of the grid in order. Further arguments are given on as they are; those with one row per sample
    may be named in `per_sample`.

    Args:
        blocks: attribute path of the list, such as `"encoder.layers"`.
        grid: lengths of the grid axes, or a function that returns them from the arguments of the
            model's forward (a module-level function, so that the model can be pickled).
        prefix: how many tokens stand in front of the cells.
        per_sample: names of further arguments of a block with one row per sample; a number names
            one by its place.
        inputs: small inputs for the probe, a function of the model; None probes with the blocks'
            own list only if `verify=False`.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> import adaptok
        >>> class Mine(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         layer = lambda: nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        ...         self.layers = nn.ModuleList([layer() for _ in range(2)])
        ...     def forward(self, x):
        ...         for layer in self.layers:
        ...             x = layer(x)
        ...         return x
        >>> def images(model):
        ...     return adaptok.HostInputs((torch.randn(2, 24, 32),))
        >>> host = ListBackbone(blocks="layers", grid=(4, 6), inputs=images)
        >>> model = adaptok.wrap(Mine().eval(), chunker="dc", budget=0.5, backbone=host)
        >>> model(torch.randn(2, 24, 32)).shape
        torch.Size([2, 24, 32])
    """

    name = "list"
    family = "a plain list of blocks"
    versions = "any"

    def __init__(
        self,
        *,
        blocks: str,
        grid: Grid | Callable[..., Grid],
        prefix: int = 0,
        per_sample: tuple[str | int, ...] = (),
        inputs: Callable[[nn.Module], HostInputs] | None = None,
        width: int = 0,
    ) -> None:
        super().__init__(containers=(blocks,), width=width, depth=0)
        if prefix < 0:
            raise ConfigError(f"prefix is a number of tokens of at least 0, got {prefix}")
        if not callable(grid) and (not grid or any(length < 1 for length in grid)):
            raise ConfigError(f"grid is one or more lengths of at least 1, got {grid}")
        self.grid = grid
        self.prefix = prefix
        self.per_sample = per_sample
        self.inputs = inputs
        self.grid_axes = 2 if callable(grid) else len(grid)

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Never fits of itself: the user describes the model (see `Backbone.match`)."""
        raise NoMatch("a description by the user, backbone=adaptok.ListBackbone(blocks=..., ...)")

    def fit(self, model: nn.Module) -> "ListBackbone":
        """Return this adapter with the width and depth of a model (see `Backbone.fit`)."""
        (path,) = self.containers
        try:
            container = check_blocks(model, path)
        except NoMatch as reason:
            names = [
                name
                for name, module in model.named_modules()
                if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
            ]
            raise UnsupportedModelError(
                f"{type(model).__name__} has {reason}; lists in it: {', '.join(names) or 'none'}"
            ) from None
        fitted = type(self)(
            blocks=path,
            grid=self.grid,
            prefix=self.prefix,
            per_sample=self.per_sample,
            inputs=self.inputs,
            width=self.width or find_width(container),
        )
        fitted.depth = len(container)  # type: ignore[arg-type]
        return fitted

    def hand_over(
        self, entrance: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostNumbers | None:
        """Return the grid that the user described (see `Backbone.hand_over`)."""
        grid = self.grid(*args, **kwargs) if callable(self.grid) else self.grid
        return HostNumbers(tuple(int(length) for length in grid), start=self.prefix)

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        x, *others = args
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise HandOverError(
                "a plain block takes tokens (b, s, d) first, got "
                f"{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        n = math.prod(numbers.grid)
        if x.shape[1] != self.prefix + n:
            raise HandOverError(
                f"the blocks got {x.shape[1]} tokens, and {self.prefix} in front of the grid "
                f"{numbers.grid} make {self.prefix + n}: describe prefix and grid as they are"
            )
        given: dict[str | int, Any] = {**dict(enumerate(others, 1)), **kwargs}
        per_sample = {str(key): given[key] for key in self.per_sample if key in given}
        shared = {str(key): value for key, value in given.items() if key not in self.per_sample}
        return BlockCall(x, numbers.grid, self.prefix, sample_inputs=per_sample, shared=shared)

    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block (see `Backbone.run`)."""
        given = {**call.shared, **call.sample_inputs}
        places = sorted((name for name in given if name.isdigit()), key=int)
        named = {name: value for name, value in given.items() if not name.isdigit()}
        return call.with_x(block(call.x, *(given[place] for place in places), **named))

    def write(self, call: BlockCall) -> Any:  # noqa: ANN401
        """Return the tokens (see `Backbone.write`)."""
        return call.x

    def example(self, model: nn.Module) -> HostInputs:
        """Return the user's inputs (see `Backbone.example`)."""
        if self.inputs is None:
            raise ConfigError(
                "a plain list of blocks is probed with inputs that you give: "
                "ListBackbone(inputs=function of the model), or wrap(..., verify=False)"
            )
        return self.inputs(model)


def find_width(container: nn.Module) -> int:
    """Return the token width: the normalised shape of the first norm of a block."""
    for module in container.modules():
        if isinstance(module, nn.LayerNorm):
            return int(module.normalized_shape[-1])
        if isinstance(module, nn.Linear):
            return int(module.in_features)
    raise UnsupportedModelError(
        "the width of a token cannot be read off these blocks: give ListBackbone(width=...)"
    )


def to_device(inputs: Tensor, model: nn.Module) -> Tensor:
    """Return inputs on the device of a model."""
    return inputs.to(next((p.device for p in model.parameters()), torch.device("cpu")))
