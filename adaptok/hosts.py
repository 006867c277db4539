"""Backbones: what adaptok must know of a family of hosts."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from adaptok.calls import BlockCall, HostNumbers
from adaptok.errors import HandOverError, HostOptionError, UnsupportedModelError


@dataclass(frozen=True, slots=True, eq=False)
class HostInputs:
    """Arguments of a host's forward.

    Args:
        args: positional ones.
        kwargs: those given by name.

    Example:
        >>> HostInputs((torch.zeros(2, 3, 32, 48),)).args[0].shape
        torch.Size([2, 3, 32, 48])
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class NoMatch(Exception):  # noqa: N818 - not an error: the next backbone is tried
    """A backbone does not fit a model; the message is the reason."""


class Backbone(ABC):
    """Says where a family of hosts keeps its blocks, and what those take.

    An instance belongs to one model, holds plain values only, and is copied and pickled with it.
    It calls the host's blocks and never copies what they do.

    Example:
        >>> from adaptok.discovery import find_part
        >>> find_part("backbone", "list").family
        'a plain list of blocks'
    """

    name: ClassVar[str]
    family: ClassVar[str]  # in words
    versions: ClassVar[str]  # of the host's package, against which it was checked
    # Whether samples of one call may keep different cells: rotary tables without a batch axis
    # make them run one by one.
    positions_per_sample: ClassVar[bool] = True
    # What `uncond_drop` can rely on, for the table of hosts.
    branches: ClassVar[tuple[str, ...]] = ()
    # The diffusion step of pure noise and that of a clean image, as the host's forward takes it
    # from the family's pipelines; None where there is no step, or models of a family differ.
    timestep_scale: ClassVar[tuple[float, float] | None] = None
    # Whether calls come with a diffusion step, which step caches need.
    has_step: bool = False
    # Whether the forward may do anything between blocks, since the adapter fits by shape or by what
    # the user says of it and not by class: a wrap then tries all blocks, and not two of them.
    tries_all_blocks: ClassVar[bool] = False
    # Whether the blocks get all cells of the grid; False where the host itself chooses tokens.
    has_grid: ClassVar[bool] = True
    # Numbers that are the same in every call: such a model needs no entrance.
    constant: HostNumbers | None = None

    def __init__(
        self, *, containers: tuple[str, ...], width: int, depth: int, grid_axes: int = 2
    ) -> None:
        self.containers = containers
        self.width = width
        self.depth = depth
        self.grid_axes = grid_axes

    @classmethod
    @abstractmethod
    def match(cls, model: nn.Module) -> Self:
        """Return the adapter of a model.

        Args:
            model: any module.

        Returns:
            The adapter, with what it read off the model.

        Raises:
            NoMatch: the model is of another family; the message says what was looked for.
            UnsupportedModelError: it is of this family, but has something that is not supported.
        """

    def fit(self, model: nn.Module) -> "Backbone":
        """Return this adapter for a model that the user gave it for.

        Args:
            model: the host.

        Raises:
            UnsupportedModelError: it does not fit.
        """
        for path in self.containers:
            try:
                check_blocks(model, path)
            except NoMatch as reason:
                raise UnsupportedModelError(
                    f"the backbone {self.name!r} does not fit {type(model).__name__}: {reason}"
                ) from None
        return self

    def entrances(self, model: nn.Module) -> tuple[str, ...]:
        """Return the submodules whose calls are listened to, `""` for the model itself.

        The best one is called with the image on every way into the model, such as the patch
        embedding.
        """
        return ("",)

    @abstractmethod
    def hand_over(
        self, entrance: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> HostNumbers | None:
        """Return the plain numbers of a forward pass, from what an entrance is called with.

        Args:
            entrance: which one.
            module: the submodule.
            args: its positional arguments.
            kwargs: its arguments by name.

        Returns:
            The numbers, or None where this entrance has none.

        Raises:
            HostOptionError: the host is asked for something that reaches into single blocks.
        """

    @abstractmethod
    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall | tuple[BlockCall, ...]:
        """Return what the host calls its first block with, sorted by what it belongs to.

        Args:
            numbers: what the host's forward handed over.
            args: positional arguments of the block.
            kwargs: its arguments by name.

        Returns:
            The call; or one for each group of samples that have as many tokens, each with its
            `part`, where the host's samples have different lengths.
        """

    @abstractmethod
    def run(self, block: nn.Module, index: int, call: BlockCall) -> BlockCall:
        """Call one block of the host.

        Args:
            block: the block.
            index: its place, over all containers.
            call: what it takes.

        Returns:
            The call with what it returned.
        """

    @abstractmethod
    def write(self, call: BlockCall) -> Any:  # noqa: ANN401
        """Return what the host expects of its last block."""

    def write_groups(self, calls: tuple[BlockCall, ...]) -> Any:  # noqa: ANN401
        """Return what the host expects of its last block, where `read` returned groups.

        Args:
            calls: the groups after the blocks, in the order of `read`.
        """
        raise NotImplementedError

    @abstractmethod
    def example(self, model: nn.Module) -> HostInputs:
        """Return small inputs that a fresh wrap is tried with: two samples, on the model's device.

        Args:
            model: the host.
        """

    def output(self, output: Any) -> Tensor:  # noqa: ANN401
        """Return the tensor of a host's output that probes compare."""
        return first_tensor(output)


def first_tensor(output: Any) -> Tensor:  # noqa: ANN401
    """Return the first tensor of nested tuples, lists and mappings."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        for item in output:
            try:
                return first_tensor(item)
            except HandOverError:
                continue
    raise HandOverError(f"the host returned no tensor but a {type(output).__name__}")


def bind_arguments(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments by name, however they were given.

    Hosts that checkpoint their blocks give by place what they otherwise give by name.

    Args:
        names: names of the positional parameters, in order.
        args: positional arguments.
        kwargs: arguments by name.

    Returns:
        All of them by name; what was not given is absent.

    Raises:
        HandOverError: there are more positional arguments than names.

    Example:
        >>> bind_arguments(("x", "mask"), (1,), {"mask": None})
        {'x': 1, 'mask': None}
    """
    if len(args) > len(names):
        raise HandOverError(
            f"the host calls its blocks with {len(args)} positional arguments, and {len(names)} "
            f"are known ({', '.join(names)}): its version is not supported"
        )
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def is_instance(model: nn.Module, module: str, *classes: str) -> bool:
    """Say whether a model is of a class of a package that need not be installed.

    Args:
        model: the model.
        module: where the classes are; it is never imported here.
        classes: their names.
    """
    home = sys.modules.get(module)
    found = tuple(getattr(home, name) for name in classes if hasattr(home, name))
    return isinstance(model, found)


def require(condition: bool, reason: str) -> None:
    """Raise `NoMatch` with a reason unless a condition holds.

    Args:
        condition: what must hold for a backbone to fit.
        reason: what was looked for and not found.

    Raises:
        NoMatch: it does not hold.
    """
    if not condition:
        raise NoMatch(reason)


def refuse_option(name: str, advice: str) -> None:
    """Raise a `HostOptionError` that names an option of the host.

    Args:
        name: the option as the user gave it.
        advice: what to do instead.

    Raises:
        HostOptionError: always.
    """
    raise HostOptionError(
        f"{name} reaches into single blocks, and a wrapped model runs them on fewer tokens: "
        f"{advice}"
    )


def choose_backbone(model: nn.Module, candidates: Mapping[str, type[Backbone]]) -> Backbone:
    """Return the adapter that fits a model.

    Args:
        model: the host.
        candidates: adapters by name; the first that fits is taken.

    Returns:
        The adapter.

    Raises:
        UnsupportedModelError: none fits; the message lists what was looked for.
    """
    reasons = []
    for name, candidate in candidates.items():
        try:
            return candidate.match(model)
        except NoMatch as reason:
            reasons.append(f"  {name}: {reason}")
    inside = find_host_inside(model, candidates)
    raise UnsupportedModelError(
        f"no backbone fits {path_of_class(model)}{inside}; looked "
        "for\n"
        + "\n".join(reasons)
        + "\nDescribe the model by adaptok.ListBackbone(blocks=..., grid=..., prefix=...), or "
        "register a backbone (docs/wrapping.md, docs/plugins.md)"
    )


def find_host_inside(model: nn.Module, candidates: Mapping[str, type[Backbone]]) -> str:
    """Say where a model holds one that can be wrapped; nothing if it holds none."""
    for path, part in model.named_modules():
        lists = any(isinstance(child, nn.ModuleList | nn.Sequential) for child in part.children())
        for candidate in candidates.values() if path and lists else ():
            try:
                candidate.match(part)
            except (NoMatch, UnsupportedModelError, AttributeError, TypeError):
                continue
            return (
                f", but its part {path} is a {type(part).__name__}, which one fits: give that, as "
                f'in adaptok.wrap(model.get_submodule("{path}"), ...)'
            )
    return ""


def check_blocks(model: nn.Module, path: str) -> nn.Module:
    """Return the container at a path, or raise `NoMatch`.

    Args:
        model: the host.
        path: attribute path, such as `"vision_model.encoder.layers"`.

    Returns:
        A `ModuleList` or `Sequential` with at least one block.

    Raises:
        NoMatch: there is none.
    """
    try:
        container = model.get_submodule(path)
    except AttributeError:
        raise NoMatch(f"no attribute {path}") from None
    require(
        isinstance(container, nn.ModuleList | nn.Sequential) and len(container) > 0,
        f"{path} is no list of blocks but a {type(container).__name__}",
    )
    own = [*container.named_parameters(recurse=False), *container.named_buffers(recurse=False)]
    require(not own, f"{path} holds weights of its own ({', '.join(name for name, _ in own)})")
    return container


def path_of_class(model: nn.Module) -> str:
    """Return the class of a model with its module."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model runs on, also where its weights are offloaded.

    Weights that are nowhere yet (meta, without an offloading hook) answer the CPU.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for candidate in (hook, *getattr(hook, "hooks", ())):
            target = getattr(candidate, "execution_device", None)
            if target is not None:
                return torch.device(target)
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating-point parameter, or float32."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)
