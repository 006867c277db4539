"""Small trained models that ship with adaptok, one folder each."""

from importlib.resources import files as package_files
from pathlib import Path

from adaptok.dc.folder import CARD_FILE, TrainedModel, load_model
from adaptok.errors import CheckpointError

ZOO = Path(str(package_files("adaptok"))) / "zoo"
TRAINING_OUTPUT = "model"  # where `adaptok train` puts the trained model in its output folder


def list_zoo_models(zoo: Path = ZOO) -> tuple[str, ...]:
    """Return the names of the models that ship with adaptok.

    Args:
        zoo: where to look.

    Returns:
        Names in alphabetical order.

    Example:
        >>> all(isinstance(name, str) for name in list_zoo_models())
        True
    """
    return tuple(sorted(card.parent.name for card in zoo.glob(f"*/{CARD_FILE}")))


def load_zoo_model(name: str | Path, zoo: Path = ZOO) -> TrainedModel:
    """Load a shipped model by its name, or any trained model by its folder.

    Args:
        name: a name of `list_zoo_models()`, a model folder, or the output folder of
            `adaptok train`.
        zoo: where the shipped models lie.

    Returns:
        The model in eval mode on the CPU, and its card.

    Raises:
        CheckpointError: there is no such model, or its files are damaged.

    Example:
        >>> load_zoo_model("no such model")
        Traceback (most recent call last):
            ...
        adaptok.errors.CheckpointError: there is no model 'no such model': ...
    """
    shipped = list_zoo_models(zoo)
    if str(name) in shipped:
        return load_model(zoo / str(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        inner = folder / TRAINING_OUTPUT
        is_output = not (folder / CARD_FILE).exists() and (inner / CARD_FILE).exists()
        return load_model(inner if is_output else folder)
    known = f"shipped are {', '.join(shipped)}" if shipped else "no model is shipped here"
    raise CheckpointError(
        f"there is no model {str(name)!r}: {known}; or give the folder of a trained model"
    )
