"""What one host of the catalogue is: a tiny model, its inputs, and where its cells lie."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 3
"""Samples in every batch of the catalogue; all differ.

Hosts have two heads and four blocks, so that an axis mistaken for another one can't broadcast."""

NOISY = (0.15, 0.5, 0.9)
"""Fraction of the cells of each sample that hold detail, so that routers keep unlike counts."""


@dataclass(frozen=True, slots=True)
class HostInputs:
    """Arguments of one forward call.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HostCase:
    """A host architecture at its smallest.

    Args:
        name: "library/architecture".
        family: "timm", "facebook", "diffusers", "diffusers-extra", "transformers" or "plain".
        build: makes the model: float32, CPU, eval mode, every parameter filled with seeded noise.
        inputs: makes a batch of three unlike samples for a model.
        cells: grid of the inputs, (h, w) or (f, h, w); where samples differ, that of the largest.
        output: reads the tensor to compare, batch first, from what the model returns.
        containers: attribute paths of the lists of blocks, in the order in which they run.
        prefix: class and register tokens in front of the cells.
        after: tokens behind the cells of the largest sample: text and padding in one sequence.
        grids: the grid of each sample where they differ.
        begins: row of the first cell of each sample where it isn't `prefix`.
        shared: keyword arguments that all samples share, such as position ids.
        tokenwise: arguments of a block, by name or position, that have a row for each token:
            rotations, masks, biases, modulations; in a tuple or not.
        notes: what is special about this host.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], HostInputs]
    cells: tuple[int, ...]
    output: Callable[[Any], Tensor]
    containers: tuple[str, ...]
    prefix: int = 0
    after: int = 0
    grids: tuple[tuple[int, ...], ...] = ()
    begins: tuple[int, ...] = ()
    shared: frozenset[str] = frozenset()
    tokenwise: tuple[str | int, ...] = ()
    notes: str = ""

    def run(self, model: nn.Module, inputs: HostInputs) -> Tensor:
        """Run a model and return the tensor to compare."""
        return self.output(model(*inputs.args, **inputs.kwargs))

    def one(self, inputs: HostInputs, sample: int) -> HostInputs:
        """Return the inputs of one sample as a batch of one."""
        kwargs = {
            name: value if name in self.shared else cut(value, sample)
            for name, value in inputs.kwargs.items()
        }
        return HostInputs(tuple(cut(value, sample) for value in inputs.args), kwargs)

    def rows(self, sample: int) -> range:
        """Return the rows of the cells of a sample in the sequence that enters the first block."""
        begin = self.begins[sample] if self.begins else self.prefix
        grid = self.grids[sample] if self.grids else self.cells
        return range(begin, begin + math.prod(grid))


def cut(value: Any, sample: int) -> Any:
    """Return the part of an argument that belongs to one sample."""
    if isinstance(value, dict):
        return {name: cut(part, sample) for name, part in value.items()}
    if isinstance(value, Tensor):
        return value[sample : sample + 1]
    return value[sample : sample + 1] if isinstance(value, list) else value


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter so that everything matters and outputs stay of order one.

    Freshly made models hardly react: gates are zero, LayerScale is 1e-5, tokens are zero.

    Args:
        model: changed in place.
        seed: of the noise.

    Returns:
        The same model, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module, name, parameter in each_parameter(model):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(scale_noise(noise, module, name))
    return model.eval()


def each_parameter(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield every parameter once, with its owner and its name there."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, name, parameter


def scale_noise(noise: Tensor, module: nn.Module, name: str) -> Tensor:
    """Give noise the size that its place needs."""
    kind = type(module).__name__
    is_table = isinstance(module, nn.Embedding) or (noise.ndim > 1 and noise.shape[0] == 1)
    if is_table or "table" in name or "token" in name or "freqs" in name:
        return 0.5 * noise  # positions, class and register tokens, shifts and scales
    if noise.ndim > 1:
        return noise / math.sqrt(noise[0].numel())
    if name == "weight" and "Norm" in kind:
        return 1 + 0.25 * noise
    if name.startswith(("gamma", "lambda_", "lambda1")) and "Diff" not in kind:
        return 0.6 + 0.2 * noise  # LayerScale
    return 0.25 * noise


def make_images(
    cells: tuple[int, int], patch: int = 16, channels: int = 3, seed: int = 1
) -> Tensor:
    """Make smooth images in which a fraction of the cells, unlike in each sample, is noisy.

    Args:
        cells: rows and columns of the grid.
        patch: side of a cell in pixels.
        channels: of the image or latent.
        seed: of the noise.

    Returns:
        Images (b c h w), values of order one.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (cells[0] * patch, cells[1] * patch)
    coarse = torch.randn(BATCH, channels, 3, 3, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=True)
    order = torch.rand(BATCH, 1, *cells, generator=generator)
    limits = torch.tensor(NOISY)[:, None, None, None]
    noisy = (order < limits).float().repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return smooth + noisy * torch.randn(BATCH, channels, *size, generator=generator)


def make_noise(*shape: int, seed: int = 2) -> Tensor:
    """Make seeded normal noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build_quietly(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a builder that leaves the global random state alone and fills every parameter."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a host's worries about its own parts
            torch.manual_seed(0)
            return randomise(make())

    return build
