"""Diffusion transformers laid out as the research code of DiT and SiT lays them out."""

import inspect
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from adaptok.calls import BlockCall, HostNumbers
from adaptok.errors import HandOverError, UnsupportedModelError
from adaptok.hosts import Backbone, HostInputs, check_blocks, device_of, dtype_of, require

PARTS = ("x_embedder", "t_embedder", "blocks", "final_layer")
BRANCHES = ("cond", "uncond")  # forward_with_cfg: the first half has the classes
ADVICE = "it needs a backbone of its own"


class FacebookDiT(Backbone):
    """Adapter of models with `x_embedder`, `t_embedder`, `blocks` and `final_layer`.

    Blocks are called as `block(x, c)` with tokens `(b n d)`, cells only, and a condition `(b c)`;
    positions are added before. The grid is that of the latent which `x_embedder` cuts, so that
    `forward_with_cfg`, which calls `forward` as a plain method, is served too. The step is what
    `t_embedder` is called with: DiT counts from 999 (noise) to 0, SiT from 0 (noise) to 1.

    Example:
        >>> class Tiny(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.x_embedder = nn.Conv2d(4, 32, 2, 2)
        ...         self.t_embedder = nn.Linear(1, 32)
        ...         self.blocks = nn.ModuleList([nn.Bilinear(32, 32, 32)])
        ...         self.final_layer = nn.Linear(32, 16)
        ...         self.patch_size = 2
        >>> host = FacebookDiT.match(Tiny())
        >>> host.width, host.depth, host.patch
        (32, 1, (2, 2))

    Paper: DiT, arXiv 2212.09748; SiT, arXiv 2401.08740.
    """

    name = "facebook-dit"
    has_step = True
    family = "DiT and SiT in the layout of their research code"
    versions = "any, by its attributes"
    tries_all_blocks = True
    branches = BRANCHES

    def __init__(self, *, width: int, depth: int, patch: tuple[int, int]) -> None:
        super().__init__(containers=("blocks",), width=width, depth=depth)
        self.patch = patch

    @classmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a model with these attributes (see `Backbone.match`)."""
        missing = [name for name in PARTS if not isinstance(getattr(model, name, None), nn.Module)]
        require(not missing, f"no {', '.join(missing)}, as DiT and SiT have")
        blocks = check_blocks(model, "blocks")
        check_signature(next(blocks.children()))
        return cls(
            width=find_layer(model).weight.shape[0],
            depth=len(blocks),  # type: ignore[arg-type]
            patch=find_patch(model),
        )

    def entrances(self, model: nn.Module) -> tuple[str, ...]:
        """Listen to the embeddings: every way into the model goes through them."""
        return ("x_embedder", "t_embedder")

    def hand_over(
        self, entrance: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostNumbers | None:
        """Return the grid of the latent, or the step, that is embedded (see `hand_over`)."""
        given = args[0] if args else next(iter(kwargs.values()), None)
        if entrance == "t_embedder":
            return HostNumbers((), timestep=given) if isinstance(given, Tensor) else None
        latent: Any = given
        if latent.ndim != 4:
            raise HandOverError(
                f"x_embedder takes latents (b, c, h, w), got {tuple(latent.shape)}: video and "
                "sequences need a backbone of their own"
            )
        b, _, h, w = latent.shape
        grid = (h // self.patch[0], w // self.patch[1])
        return HostNumbers(grid, start=0, branches=BRANCHES if b % 2 == 0 else ())

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        shapes = [tuple(v.shape) for v in args if isinstance(v, Tensor)]
        if kwargs or [len(shape) for shape in shapes] != [3, 2] or len(args) != 2:
            names = f" and {', '.join(kwargs)}" if kwargs else ""
            raise HandOverError(
                "a block of DiT takes tokens (b, n, d) and a condition (b, c), and this one got "
                f"{len(args)} arguments{names}, tensors of the shapes {shapes}: {ADVICE}"
            )
        x, condition = args
        n = math.prod(numbers.grid)
        if x.shape[1] != n or condition.shape[0] != x.shape[0]:
            raise HandOverError(
                f"{n} tokens of the grid {numbers.grid} and one condition per sample are needed, "
                f"got the shapes {shapes}: {ADVICE}"
            )
        step = numbers.spread_timestep(x)
        return BlockCall(x, numbers.grid, condition=condition, timestep=step)

    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block (see `Backbone.run`)."""
        return call.with_x(block(call.x, call.condition))

    def write(self, call: BlockCall) -> Any:  # noqa: ANN401
        """Return the tokens (see `Backbone.write`)."""
        return call.x

    def example(self, model: nn.Module) -> HostInputs:
        """Return two latents with times, and classes where there are any."""
        h, w = find_grid(model)
        shape = (2, self.find_channels(model), h * self.patch[0], w * self.patch[1])
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        device = device_of(model)
        inputs = [latents.to(device, dtype_of(model)), torch.tensor([200.0, 700.0], device=device)]
        if isinstance(getattr(model, "y_embedder", None), nn.Module):
            inputs.append(torch.tensor([0, 1], device=device))
        needed = count_needed(type(model).forward)
        if needed > len(inputs):
            raise UnsupportedModelError(
                f"the forward of {type(model).__name__} needs {needed} arguments, known are "
                f"latents, times and classes: {ADVICE}, or wrap(..., verify=False)"
            )
        return HostInputs(tuple(inputs))

    def find_channels(self, model: nn.Module) -> int:
        """Return the channels of a latent."""
        layer = find_layer(model, first=True)
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
        return layer.in_features // math.prod(self.patch)


def count_needed(forward: Callable[..., Any]) -> int:
    """Return how many arguments a forward needs beside `self`."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return sum(p.default is p.empty for p in named)


def check_signature(block: nn.Module) -> None:
    """Raise unless a block can be called with tokens and a condition."""
    needed = count_needed(type(block).forward)
    if needed > 2:
        raise UnsupportedModelError(
            f"{type(block).__name__} needs {needed} arguments, and a block of DiT takes tokens and "
            f"a condition: {ADVICE}"
        )


def find_layer(model: nn.Module, first: bool = False) -> nn.Conv2d | nn.Linear:
    """Return the last layer of the patch embedding, or the first one."""
    embedder = model.get_submodule("x_embedder")
    layers = [m for m in embedder.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    if not layers:
        raise UnsupportedModelError(
            f"the x_embedder of {type(model).__name__} has no convolution and no linear layer, so "
            f"that the width of a token is not known: {ADVICE}"
        )
    return layers[0 if first else -1]


def find_patch(model: nn.Module) -> tuple[int, int]:
    """Return the sides of a patch in cells of the latent."""
    embedder = model.x_embedder
    for value in (getattr(embedder, "patch_size", None), getattr(model, "patch_size", None)):
        if isinstance(value, int):
            return (value, value)
        if isinstance(value, tuple | list):
            h, w = value
            return (int(h), int(w))
    if isinstance(embedder, nn.Conv2d):
        h, w = embedder.stride
        return (h, w)
    raise UnsupportedModelError(
        f"neither {type(model).__name__} nor its x_embedder says its patch_size: {ADVICE}"
    )


def find_grid(model: nn.Module) -> tuple[int, int]:
    """Return the grid that the model was made for."""
    grid = getattr(model.x_embedder, "grid_size", None)
    if isinstance(grid, tuple | list):
        h, w = grid
        return (int(h), int(w))
    table = getattr(model, "pos_embed", None)
    n = table.shape[1] if isinstance(table, Tensor) else 16
    side = next(side for side in range(math.isqrt(n), 0, -1) if n % side == 0)
    return (side, n // side)
