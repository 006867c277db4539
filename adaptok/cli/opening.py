"""Models that a person named on the command line: adaptok's own, and those of other libraries."""

from pathlib import Path

from torch import nn

from adaptok.cli.building import CONFIG, build_model
from adaptok.dc.config import DCDiTConfig
from adaptok.dc.folder import CARD_FILE, TrainedModel
from adaptok.errors import CheckpointError, ConfigError
from adaptok.train.checkpoint import FOLDER
from adaptok.zoo.models import TRAINING_OUTPUT, list_zoo_models, load_zoo_model


def is_reference(name: str) -> bool:
    """Say whether a name or folder means a model of adaptok's own."""
    folder = Path(name).expanduser()
    cards = (folder / CARD_FILE, folder / TRAINING_OUTPUT / CARD_FILE)
    return name in list_zoo_models() or any(card.is_file() for card in cards)


def open_trained(name: str) -> TrainedModel:
    """Load a model of adaptok's own.

    Args:
        name: of a shipped model, its folder, or the output folder of `adaptok train`.

    Returns:
        The model with its card.

    Raises:
        CheckpointError: there is no such model, or its files are damaged.
    """
    folder = Path(name).expanduser()
    if is_reference(name) or not folder.exists():
        return load_zoo_model(name)
    shipped = ", ".join(list_zoo_models())
    advice = f"give the output folder of `adaptok train`, or a shipped model ({shipped})"
    if not folder.is_dir():
        raise CheckpointError(f"{name} is a file, and a model is a folder: {advice}")
    if (folder / FOLDER).is_dir():
        advice = (
            "its training has not ended; the same `adaptok train` command goes on with it, and "
            "writes the model at the end"
        )
    elif (folder / CONFIG).is_file():
        advice = (
            f"its {CONFIG} is of another library, whose models `adaptok doctor {name}` looks at; "
            f"here, {advice}"
        )
    raise CheckpointError(f"there is no trained model in {name} (no {CARD_FILE}): {advice}")


def open_routed(name: str, what: str) -> TrainedModel:
    """Load a model of adaptok's own that has a router.

    Args:
        name: as for `open_trained`.
        what: what shows it, for the message.

    Returns:
        The model with its card.

    Raises:
        CheckpointError: there is no such model, or its files are damaged.
        ConfigError: it has no router.
    """
    trained = open_trained(name)
    if not isinstance(trained.model.config, DCDiTConfig):
        raise ConfigError(
            f"{what} shows a model with a router, and {name!r} is a fixed-patch DiT: choose a "
            "DC-DiT with --model"
        )
    return trained


def open_any(name: str) -> nn.Module:
    """Make the model that a person named, whatever library it is of.

    Args:
        name: as for `open_trained`, or as for `build_model`.

    Returns:
        The model in eval mode: a trained one of adaptok's own, others with random weights.

    Raises:
        AdaptokError: there is no such model, or it cannot be made.
    """
    return open_trained(name).model if is_reference(name) else build_model(name)
