"""A trained model as a folder: `model.safetensors` and `model.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from adaptok.config import Config
from adaptok.dc.baseline import DiT
from adaptok.dc.checkpoint import check_state
from adaptok.dc.config import DCDiTConfig, DiTConfig, read_model_config
from adaptok.dc.model import DCDiT
from adaptok.errors import CheckpointError, ConfigError
from adaptok.storage import (
    load_json,
    load_tensors,
    restore_folder,
    save_json,
    save_tensors,
    write_folder,
)

WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "model.json"
POSITIONS = ("position", "pos_embed")


class ModelCard(Config):
    """What must be known to use a trained model, and where it comes from.

    Args:
        objective: what the model was trained for, `"hybrid"` or `"flow"`.
        image_size: side of an image in pixels.
        space_to_depth: pixels per side of a cell; 1 means that a latent is the image itself.
        class_names: names of the labels, in order.
        training: how it was trained: steps, data, seed, duration, final loss, device.
        limits: what the model cannot do.
        version: version of this layout.
    """

    objective: Literal["hybrid", "flow"] = "hybrid"
    image_size: int | None = None
    space_to_depth: int = 1
    class_names: tuple[str, ...] = ()
    training: dict[str, Any] = Field(default_factory=dict)
    limits: str = ""
    version: Literal[1] = 1


@dataclass(frozen=True, slots=True, eq=False)
class TrainedModel:
    """A model with its card.

    Args:
        model: the model, in eval mode.
        card: how to use it.
    """

    model: DCDiT | DiT
    card: ModelCard


def save_model(
    model: DCDiT | DiT, card: ModelCard, folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write a model and its card to a folder, whole or not at all.

    Args:
        model: the model.
        card: how to use it.
        folder: where to; a model that is there is replaced, anything else is refused.
        dtype: precision of the weights on disk; None keeps theirs.

    Raises:
        StorageError: the folder cannot be written.
    """
    state = model.state_dict()
    if dtype is not None:
        state = {name: value.to(dtype) for name, value in state.items()}
    content = {
        "kind": type(model).__name__,
        "config": model.config.model_dump(mode="json"),
        "card": card.model_dump(mode="json"),
    }
    with write_folder(folder) as unfinished:
        save_tensors(unfinished / WEIGHTS_FILE, state)
        save_json(unfinished / CARD_FILE, content)


def load_model(folder: str | Path) -> TrainedModel:
    """Read a model and its card from a folder.

    Args:
        folder: what `save_model` wrote.

    Returns:
        The model in eval mode on the CPU, in float32, and its card.

    Raises:
        CheckpointError: the folder is missing, truncated, or of something else.
    """
    folder = Path(folder)
    restore_folder(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}")
    content = load_json(folder / CARD_FILE)
    if content.keys() != {"kind", "config", "card"}:
        raise CheckpointError(f"{folder / CARD_FILE} is of no adaptok model: got {sorted(content)}")
    try:
        config = read_model_config(content["kind"], content["config"])
        card = ModelCard(**content["card"])
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"in {folder / CARD_FILE}: {error}") from error
    state = load_tensors(folder / WEIGHTS_FILE)
    model = build_model(config)
    check_state(state, model.state_dict())
    for name, parameter in model.named_parameters():
        if name in POSITIONS:  # a fixed table, exact here and rounded in the file
            state[name] = parameter
    model.load_state_dict(state)
    return TrainedModel(model.eval(), card)


def build_model(config: Config) -> DCDiT | DiT:
    """Make the model that a configuration describes.

    Args:
        config: `DCDiTConfig` or `DiTConfig`.

    Returns:
        A new model.

    Raises:
        ConfigError: the configuration is of no model.
    """
    if isinstance(config, DCDiTConfig):
        return DCDiT(config)
    if isinstance(config, DiTConfig):
        return DiT(config)
    raise ConfigError(f"{type(config).__name__} is the configuration of no model")
