"""Models of other libraries by name or configuration, with random weights."""

import difflib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptok.errors import CheckpointError, ConfigError, MissingPackageError
from adaptok.optional import import_optional
from adaptok.storage import load_json
from adaptok.testing.models import fill_weights

CONFIG = "config.json"


def build_model(name: str) -> nn.Module:
    """Make a model with random weights, all of which matter.

    Args:
        name: a timm name, or a folder with the `config.json` of a model of transformers or
            diffusers; of a pipeline's folder the transformer is taken.

    Returns:
        The model in eval mode.

    Raises:
        ConfigError: there is no such model and no such folder.
        CheckpointError: the configuration is missing, broken, or names an unknown class.
        MissingPackageError: the library is not installed.
    """
    folder = Path(name)
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a host's worries about its own parts
        torch.manual_seed(0)
        model = build_from_folder(folder) if folder.is_dir() else build_timm(name)
    return fill_weights(model).eval()


def build_timm(name: str) -> nn.Module:
    """Make a model of timm (see `build_model`)."""
    timm = import_optional("timm", extra="hosts")
    if not timm.is_model(name) or ":" in name:
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{name!r} is no model of timm and no folder{meant}")
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def build_from_folder(folder: Path) -> nn.Module:
    """Make a model of transformers or diffusers from its configuration (see `build_model`)."""
    if not (folder / CONFIG).is_file() and (folder / "transformer" / CONFIG).is_file():
        folder = folder / "transformer"  # of a pipeline
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}: give a folder that save_pretrained wrote")
    content = load_json(folder / CONFIG)
    library = "diffusers" if "_class_name" in content else "transformers"
    try:
        model = (build_diffusers if library == "diffusers" else build_transformers)(content)
    except MissingPackageError:
        raise
    except Exception as error:  # a library may say anything to a wrong configuration
        raise CheckpointError(
            f"{library} makes no model of {folder / CONFIG}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"{folder / CONFIG} describes a {type(model).__name__}, which is no model"
        )
    return model


def build_diffusers(content: dict[str, Any]) -> Any:  # noqa: ANN401
    """Make a model of diffusers from the content of its configuration."""
    diffusers = import_optional("diffusers", extra="diffusion")
    name = content["_class_name"]
    cls = getattr(diffusers, name)
    if not issubclass(cls, diffusers.ModelMixin):
        raise TypeError(f"{name} is no model")
    return cls.from_config(content)


def build_transformers(content: dict[str, Any]) -> Any:  # noqa: ANN401
    """Make a model of transformers from the content of its configuration."""
    transformers = import_optional("transformers", extra="hosts")
    options = {name: value for name, value in content.items() if name != "auto_map"}
    config = transformers.AutoConfig.for_model(**options)
    for name in content.get("architectures") or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            return cls(config)
    return transformers.AutoModel.from_config(config, trust_remote_code=False)
