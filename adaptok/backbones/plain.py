"""A plain list of blocks, described by the user in three arguments."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptok.calls import BlockCall, HostNumbers
from adaptok.errors import ConfigError, HandOverError, UnsupportedModelError
from adaptok.hosts import Backbone, HostInputs, NoMatch, check_blocks, device_of, dtype_of
from adaptok.tokens import Grid

OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class ListBackbone(Backbone):
    """Adapter of a model whose blocks are called one after the other, `x = block(x, ...)`.

    A wrapped list runs all its blocks in one go: what the forward does between two of them (a norm,
    a scale, a skip) would be left out, and is refused by the probe of `adaptok.wrap`.

    The first argument of a block, and what it returns, is `(b s d)`: prefix tokens, then the cells
    of the grid in order. Further arguments are given on as they are; those with one row per sample
    must be named in `per_sample`, and those with one row per token need a backbone of their own.

    Args:
        blocks: attribute path of the list, such as `"encoder.layers"`.
        grid: lengths of the grid axes, or a function that returns them from the arguments of the
            model's forward (a module-level function, so that the model can be pickled).
        prefix: how many tokens stand in front of the cells.
        per_sample: names of further arguments of a block with one row per sample; a number names
            one by its place.
        inputs: small inputs for the probe, a function of the model. Not needed by a model that
            takes an image only and cuts it by a convolution, on a grid that is given as lengths.
        width: features of a token; read off the blocks unless given.
        timestep: name of the argument of the model's forward that is the diffusion step, one
            number per sample or one for all. It is seen only where the model itself is called,
            `model(...)`.
        has_class: whether the first prefix token is a class token.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> import adaptok
        >>> class Mine(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         layer = lambda: nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        ...         self.patches = nn.Conv2d(3, 32, 8, stride=8)
        ...         self.layers = nn.ModuleList([layer() for _ in range(2)])
        ...     def forward(self, image):
        ...         x = self.patches(image).flatten(2).transpose(1, 2)
        ...         for layer in self.layers:
        ...             x = layer(x)
        ...         return x
        >>> host = ListBackbone(blocks="layers", grid=(4, 6), prefix=0)
        >>> model = adaptok.wrap(Mine().eval(), chunker="dc", budget=0.5, backbone=host)
        >>> model(torch.randn(2, 3, 32, 48)).shape
        torch.Size([2, 24, 32])
    """

    name = "list"
    family = "a plain list of blocks"
    versions = "any"
    tries_all_blocks = True

    def __init__(
        self,
        *,
        blocks: str,
        grid: Grid | Callable[..., Grid],
        prefix: int = 0,
        per_sample: tuple[str | int, ...] = (),
        inputs: Callable[[nn.Module], HostInputs] | None = None,
        width: int = 0,
        timestep: str | None = None,
        has_class: bool = False,
    ) -> None:
        super().__init__(containers=(blocks,), width=width, depth=0)
        if prefix < 0:
            raise ConfigError(f"prefix is a number of tokens of at least 0, got {prefix}")
        if has_class and prefix < 1:
            raise ConfigError("has_class=True needs a token in front of the cells, and prefix is 0")
        if not callable(grid) and (not grid or any(length < 1 for length in grid)):
            raise ConfigError(f"grid is one or more lengths of at least 1, got {grid}")
        self.grid = grid
        self.prefix = prefix
        self.per_sample = per_sample
        self.inputs = inputs
        self.timestep = timestep
        self.has_step = timestep is not None
        self.timestep_place: int | None = None  # among the arguments of the forward
        self.has_class = has_class
        self.grid_axes = 2
        if not callable(grid):
            self.grid_axes = len(grid)
            self.constant = HostNumbers(tuple(int(length) for length in grid), start=prefix)

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
            timestep=self.timestep,
            has_class=self.has_class,
        )
        fitted.depth = len(container)  # type: ignore[arg-type]
        if self.timestep is not None:
            fitted.timestep_place = find_place(model, self.timestep)
        return fitted

    def entrances(self, model: nn.Module) -> tuple[str, ...]:
        """Listen to the model where grid or step are in its arguments."""
        return ("",) if callable(self.grid) or self.timestep is not None else ()

    def hand_over(
        self, entrance: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostNumbers | None:
        """Return the grid that the user's function names, and the step (see `hand_over`)."""
        return HostNumbers(
            self.find_grid(args, kwargs),
            start=self.prefix,
            timestep=self.find_timestep(args, kwargs),
        )

    def find_grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
        """Return the lengths of the grid axes for the arguments of the model's forward.

        Raises:
            HandOverError: the user's function does not take these arguments, or returns no lengths.
        """
        if not callable(self.grid):
            return self.grid
        try:
            grid: Any = self.grid(*args, **kwargs)
        except TypeError:
            check_takes(self.grid, args, kwargs)
            raise
        if not hasattr(grid, "__iter__"):
            raise HandOverError(
                "grid= of ListBackbone returns the lengths of the grid axes, such as (14, 14), got "
                f"{grid!r}"
            )
        return tuple(int(length) for length in grid)

    def find_timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return the diffusion step among the arguments of the model's forward."""
        if self.timestep is None:
            return None
        place, value = self.timestep_place, kwargs.get(self.timestep)
        if value is None and place is not None and place < len(args):
            value = args[place]
        if isinstance(value, int | float):
            return torch.tensor(value)
        return value if isinstance(value, Tensor) else None

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.ndim != 3:
            came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise HandOverError(f"a plain block takes tokens (b, s, d) first, by place; got {came}")
        n = math.prod(numbers.grid)
        if x.shape[1] != self.prefix + n:
            raise HandOverError(
                f"the blocks got {x.shape[1]} tokens, and {self.prefix} in front of the grid "
                f"{numbers.grid} make {self.prefix + n}: describe prefix and grid as they are"
            )
        given: dict[str | int, Any] = dict(enumerate(args[1:], 1))
        given.update(kwargs)
        rows = [key for key in self.per_sample if isinstance(given.get(key), Tensor)]
        per_sample = {str(key): given.pop(key) for key in rows}
        shared = {str(key): value for key, value in given.items()}
        for name, value in shared.items():
            check_shared(name, value, x, n)
        return BlockCall(
            x,
            numbers.grid,
            self.prefix,
            sample_inputs=per_sample,
            shared=shared,
            timestep=numbers.spread_timestep(x),
            has_class=self.has_class,
        )

    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block (see `Backbone.run`)."""
        given = {**call.shared, **call.sample_inputs}
        places = sorted((name for name in given if name.isdigit()), key=int)
        named = {name: value for name, value in given.items() if not name.isdigit()}
        x = block(call.x, *(given[place] for place in places), **named)
        if not isinstance(x, Tensor) or x.shape != call.x.shape:
            came = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise HandOverError(
                f"a plain block returns tokens of the shape that it got, {tuple(call.x.shape)}, "
                f"and {type(block).__name__} returned {came}: it needs a backbone of its own"
            )
        return call.with_x(x)

    def write(self, call: BlockCall) -> Any:  # noqa: ANN401
        """Return the tokens (see `Backbone.write`)."""
        return call.x

    def example(self, model: nn.Module) -> HostInputs:
        """Return the user's inputs, or images of the grid (see `Backbone.example`)."""
        if self.inputs is not None:
            inputs: Any = self.inputs(model)
            if not (hasattr(inputs, "args") and hasattr(inputs, "kwargs")):
                raise HandOverError(
                    "inputs= of ListBackbone returns adaptok.HostInputs((image,)), the arguments "
                    f"of the forward, got a {type(inputs).__name__}"
                )
            return HostInputs(tuple(inputs.args), dict(inputs.kwargs))
        cuts = [
            module
            for module in model.modules()
            if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride
        ]
        parameters = list(inspect.signature(model.forward).parameters.values())
        needed = [p for p in parameters if p.default is p.empty and p.kind not in OPEN]
        if callable(self.grid) or len(self.grid) != 2 or not cuts or len(needed) != 1:
            raise ConfigError(
                f"it cannot be guessed what {type(model).__name__} takes, and a wrap is tried "
                "before it is given out: give ListBackbone(inputs=function of the model that "
                "returns adaptok.HostInputs), or wrap(..., verify=False)"
            )
        sides = [n * side for n, side in zip(self.grid, cuts[0].stride, strict=True)]
        images = torch.randn(
            2, cuts[0].in_channels, *sides, generator=torch.Generator().manual_seed(0)
        )
        return HostInputs((images.to(device_of(model), dtype_of(model)),))


def check_shared(name: str, value: object, x: Tensor, n: int) -> None:
    """Raise if an argument that is the same for all samples has a row per sample or token.

    Args:
        name: name or place of the argument.
        value: what the host gave.
        x: the tokens.
        n: how many of them are cells.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return
    shape, (b, s, _) = tuple(value.shape), x.shape
    if b > 1 and shape[0] == b:
        raise HandOverError(
            f"the argument {name} of a block has the shape {shape} with one row per sample: name "
            f"it, ListBackbone(per_sample=({name if name.isdigit() else repr(name)},))"
        )
    if any(length in (s, n) for length in shape[: max(1, value.ndim - 1)] if length > 1):
        raise HandOverError(
            f"the argument {name} of a block has the shape {shape} with one row per token, which "
            "have to be gathered with the tokens: write an adaptok.Backbone (docs: API, hosts)"
        )


def check_takes(
    function: Callable[..., Grid], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise a `HandOverError` if a function that failed does not take these arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise HandOverError(
            "grid= of ListBackbone is called with the arguments of the model's forward, and does "
            f"not take them: {error}"
        ) from None


def find_place(model: nn.Module, name: str) -> int | None:
    """Return the place of an argument of a model's forward; None where it comes by name only."""
    parameters = inspect.signature(model.forward).parameters
    if name in parameters:
        by_name = parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        return None if by_name else list(parameters).index(name)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    raise UnsupportedModelError(
        f"the forward of {type(model).__name__} has no argument {name!r} for the diffusion step: "
        f"name one of {', '.join(parameters)}, or leave timestep out"
    )


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
