"""Adapters on disk: the configuration of a wrap, and the weights that it added to its host."""

import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from adaptok.blocks import PARTS, AdaptiveBlocks, find_adaptive
from adaptok.budgeted import Budgeted
from adaptok.calibrated import change_settings, read_settings
from adaptok.config import Config
from adaptok.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    FullBudgetWarning,
    ProbeError,
    StorageError,
    UnknownNameError,
    UnsupportedModelError,
    WrapError,
)
from adaptok.hosts import Backbone, path_of_class
from adaptok.stacking import spell_out
from adaptok.stages import Stage
from adaptok.storage import load_tensors, save_json, save_tensors, write_folder
from adaptok.tracing import require_adaptive
from adaptok.wrap_config import BudgetConfig, WrapConfig
from adaptok.wrapping import resolve_backbone, unwrap, wrap

CARD, WEIGHTS = "adaptok.json", "adaptok.safetensors"
MARK = ".adaptok."  # in the name of every weight that a wrap adds
VERSION = 1
Model = TypeVar("Model", bound=nn.Module)


class HostMark(Config):
    """Which model an adapter belongs to.

    Args:
        model: its class, with the module.
        backbone: name of the adapter of its family.
        width: features of a token.
        depth: number of blocks.
        span: the first block inside the stages, and the one behind the last.

    Raises:
        ConfigError: a value is missing or wrong.
    """

    model: str
    backbone: str
    width: int
    depth: int
    span: tuple[int, int]

    def describe(self) -> str:
        """Say it in words."""
        return (
            f"{self.model} (backbone {self.backbone!r}, width {self.width}, {self.depth} blocks, "
            f"span {self.span})"
        )


class AdapterCard(Config):
    """What `adaptok.json` of an adapter says.

    Args:
        version: format of the folder.
        adaptok: version of adaptok that wrote it.
        host: the model that it belongs to.
        wrap: what makes the same wrap again.
        uncond: the budget of the unconditional half, where it has one of its own.
        settings: by name of a stage, what it ran with of all that is fitted to data, such as what
            `Profile.apply` gave it.

    Raises:
        ConfigError: a value is missing or wrong, or a newer adaptok wrote it.
    """

    version: int = VERSION
    adaptok: str = ""
    host: HostMark
    wrap: WrapConfig
    uncond: BudgetConfig | None = None
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("version")
    @classmethod
    def check_version(cls, version: int) -> int:
        """Refuse what a newer adaptok wrote."""
        if not 1 <= version <= VERSION:
            raise ValueError(
                f"this adaptok reads adapters up to version {VERSION}: install a newer adaptok"
            )
        return version


def save(model: nn.Module, folder: str | Path) -> None:
    """Write what a wrap added to a model: its configuration, fitted settings, and own weights.

    Args:
        model: a wrapped model.
        folder: where `adaptok.json` and `adaptok.safetensors` are written, whole or not at all.
            An adapter that is there is replaced; a folder with other files is not.

    Raises:
        NotWrappedError: the model is not wrapped.
        ConfigError: the wrap cannot be made again from names, since an instance of a class
            without a registered name was given.
        StorageError: the files cannot be written, or the weights are not there to be read.

    Example:
        >>> import tempfile, adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save(vit, f"{place}/adapter")
        ...     other = load(make_vit(), f"{place}/adapter")
        >>> image = torch.randn(1, 3, 32, 48)
        >>> torch.equal(other(image), vit(image))
        True
    """
    model = bare(model)
    blocks = require_adaptive(model)
    config = current_config(blocks)
    weights = own_weights(model)
    for name, value in weights.items():
        if value.is_meta:
            raise StorageError(
                f"the weight {name} lies on the meta device (offloaded?), so that there is nothing "
                "to save: load the weights first"
            )
    host = mark_host(model, blocks.backbone, blocks.span)
    card = AdapterCard(
        adaptok=version("adaptok"), host=host, wrap=config, uncond=find_uncond(blocks),
        settings=read_settings(name_stages(blocks)),
    )  # fmt: skip
    with write_folder(folder) as unfinished:
        save_json(unfinished / CARD, card.model_dump(mode="json"))
        # copies, since a part may share a weight between two names
        copies = {name: value.detach().clone() for name, value in weights.items()}
        save_tensors(unfinished / WEIGHTS, copies)


def load(model: Model, folder: str | Path) -> Model:
    """Give a model the wrap and the weights that `save` wrote, in place.

    A model that is not wrapped is wrapped as the adapter says, and tried as `wrap` does. One that
    is wrapped must be so in the same way; it takes the weights and what was fitted to data, and
    its budget stays.

    Args:
        model: a model of the class, width and depth of the one that was saved.
        folder: what `save` wrote.

    Returns:
        The same object.

    Raises:
        CheckpointError: the adapter is missing, truncated, foreign, or belongs to another model
            or another wrap.
        UnknownNameError: it names a part that is not installed.
        ProbeError: the wrap would not do what it promises. After each of these errors the model
            is as it was before.

    Example:
        >>> import tempfile, adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save(vit, f"{place}/adapter")
        ...     adaptok.is_wrapped(load(make_vit(), f"{place}/adapter"))
        True
    """
    folder = Path(folder)
    card, weights = read_card(folder), load_tensors(folder / WEIGHTS)
    blocks = find_adaptive(model)
    if blocks is not None:
        inner = bare(model)
        check_host(mark_host(inner, blocks.backbone, blocks.span), card.host, folder)
        check_same_wrap(blocks, card.wrap, folder)
        fill(inner, card, weights, folder)
        return model
    check_class(model, card.host, folder)
    host = find_host(model, card, folder)
    check_host(mark_host(model, host, card.host.span), card.host, folder)
    wrap_as(model, card.wrap, folder)
    try:
        if card.uncond is not None:
            for stage in list_budgeted(require_adaptive(model)):
                stage.take_budget(stage.budget_setting, card.uncond.to_budget())
        fill(model, card, weights, folder)
    except BaseException:
        unwrap(model)
        raise
    return model


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside a compiled or a distributed one."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def mark_host(model: nn.Module, host: Backbone, span: tuple[int, int]) -> HostMark:
    """Return which model this is."""
    return HostMark(
        model=path_of_class(model),
        backbone=host.name,
        width=host.width,
        depth=host.depth,
        span=span,
    )


def current_config(blocks: AdaptiveBlocks) -> WrapConfig:
    """Return what makes a wrap again, with the budget that is set now."""
    config = blocks.config
    if not isinstance(config, WrapConfig) or not config.complete:
        raise ConfigError(
            "a part of this wrap was given as an instance, whose class has no registered name or "
            "keeps options to itself, so that it cannot be made again: register the class, as in "
            '@adaptok.register_router("mine"), keep each option as an attribute of its own name, '
            "and wrap again"
        )
    budgeted = list_budgeted(blocks)
    budget = BudgetConfig.from_budget(budgeted[0].budget_setting) if budgeted else None
    return config.model_copy(update={"budget": budget})


def list_budgeted(blocks: AdaptiveBlocks) -> list[Budgeted]:
    """Return the stages that take a budget."""
    return [stage for stage in blocks.stages if isinstance(stage, Budgeted)]


def find_uncond(blocks: AdaptiveBlocks) -> BudgetConfig | None:
    """Return the budget of the unconditional half, where it has one of its own."""
    budgets = [stage.uncond_setting for stage in list_budgeted(blocks)]
    if not budgets or budgets[0] is None:
        return None
    return BudgetConfig.from_budget(budgets[0]) or BudgetConfig()


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that a wrap added, by their names in the model's state dict."""
    return {name: value for name, value in model.state_dict().items() if MARK in name}


def read_card(folder: Path) -> AdapterCard:
    """Read and check `adaptok.json`."""
    if not (folder / CARD).is_file():
        raise CheckpointError(f"{folder} is no adapter: there is no {CARD} in it")
    try:
        return AdapterCard.from_json_file(folder / CARD)
    except ConfigError as error:
        raise CheckpointError(f"{folder} is no adapter that can be read: {error}") from None


def check_class(model: nn.Module, wanted: HostMark, folder: Path) -> None:
    """Raise unless a model is of the class that an adapter was made for, wherever that lives."""
    found = path_of_class(model)
    if found.rpartition(".")[2] != wanted.model.rpartition(".")[2]:
        raise CheckpointError(
            f"the adapter {folder} belongs to {wanted.describe()}, and this model is a {found}"
        )


def check_host(found: HostMark, wanted: HostMark, folder: Path) -> None:
    """Raise unless a model is like the one that an adapter was made for."""
    names = [mark.model.rpartition(".")[2] for mark in (found, wanted)]
    same = found.model_copy(update={"model": wanted.model})
    if names[0] != names[1] or same != wanted:
        raise CheckpointError(
            f"the adapter {folder} belongs to {wanted.describe()}, and this model is "
            f"{found.describe()}"
        )


def find_host(model: nn.Module, card: AdapterCard, folder: Path) -> Backbone:
    """Return the backbone that an adapter names, for a model that is not wrapped."""
    try:
        return resolve_backbone(model, card.wrap.backbone)
    except UnknownNameError as error:
        raise name_adapter(error, folder) from None
    except UnsupportedModelError as error:
        raise CheckpointError(
            f"the adapter {folder} belongs to {card.host.describe()}: {error}. A model that was "
            "described by hand is wrapped in the same way first, and loaded then"
        ) from None


def name_adapter(error: UnknownNameError, folder: Path) -> UnknownNameError:
    """Return an error that says which adapter wants an unknown name."""
    return UnknownNameError(
        f"the adapter {folder} needs a part that is not installed: {error}; install the plug-in "
        "that registers it"
    )


def wrap_as(model: nn.Module, config: WrapConfig, folder: Path) -> None:
    """Wrap a model as an adapter says; the warning about full budgets has been given before."""
    try:
        budget = None if config.budget is None else config.budget.to_budget()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FullBudgetWarning)
            wrap(
                model,
                config.chunker,
                router=config.router,
                dechunker=config.dechunker,
                span=config.span,
                budget=budget,
                stack=config.stack,
                backbone=config.backbone,
            )
    except UnknownNameError as error:
        raise name_adapter(error, folder) from None
    except ProbeError:
        raise
    except (BudgetError, ConfigError, WrapError) as error:
        raise CheckpointError(f"the adapter {folder} describes no wrap: {error}") from None


def check_same_wrap(blocks: AdaptiveBlocks, wanted: WrapConfig, folder: Path) -> None:
    """Raise unless a wrapped model has the parts that an adapter was saved with."""
    config = blocks.config
    found = spell_out(config) if isinstance(config, WrapConfig) and config.complete else {}
    try:
        needed = spell_out(wanted)
    except UnknownNameError as error:
        raise name_adapter(error, folder) from None
    differing = [name for name in needed if needed[name] != found.get(name)]
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"the adapter {folder} was saved with another wrap: its {name} is {needed[name]}, and "
            f"this model has {found.get(name, 'an instance without a name')}; call "
            "adaptok.unwrap(model) first, and load wraps it as it was"
        )


def name_stages(blocks: AdaptiveBlocks) -> dict[str, Stage]:
    """Return the stages of a wrapped model by name, the outermost first."""
    parts = blocks._modules[PARTS]
    assert isinstance(parts, nn.ModuleDict)
    return {name: stage for name, stage in parts.items() if isinstance(stage, Stage)}


def fill(model: nn.Module, card: AdapterCard, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Put settings and weights of an adapter into a wrapped model, or nothing."""
    stages = name_stages(require_adaptive(model))
    before = read_settings({name: stages.get(name) for name in card.settings})
    try:
        change_settings(stages, card.settings)
    except ConfigError as error:
        raise CheckpointError(
            f"the settings of the adapter {folder} do not fit its wrap: {error}"
        ) from None
    try:
        fill_weights(model, weights, folder)
    except BaseException:
        change_settings(stages, before)
        raise


def fill_weights(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Put all weights of an adapter into a wrapped model, or none."""
    own = own_weights(model)
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is none of its weights" for name in weights if name not in own]
    for name, value in weights.items():
        if name in own and value.shape != own[name].shape:
            shapes = tuple(value.shape), tuple(own[name].shape)
            problems.append(f"{name} has the shape {shapes[0]}, {shapes[1]} is needed")
        elif name in own and value.is_floating_point() != own[name].is_floating_point():
            problems.append(f"{name} has the dtype {value.dtype}, {own[name].dtype} is needed")
    if problems:
        shown = "; ".join(problems[:3]) + (f"; {len(problems) - 3} more" if problems[3:] else "")
        raise CheckpointError(f"the weights of the adapter {folder} do not fit its wrap: {shown}")
    if any(value.is_meta for value in own.values()):
        raise CheckpointError(
            f"the adapter {folder} cannot be taken: this model's weights lie on the meta device; "
            "load those first"
        )
    before = {name: value.detach().clone() for name, value in own.items()}
    try:
        model.load_state_dict(dict(weights), strict=False)
    except BaseException:
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(before[name])
        raise
