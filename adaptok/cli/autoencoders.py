"""The autoencoder that a person named: a folder, one that was fetched before, or one to fetch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adaptok.dc.folder import TrainedModel
from adaptok.errors import CheckpointError, ConfigError
from adaptok.optional import import_optional
from adaptok.train.decoding import Decoder, make_decoder
from adaptok.train.vae import Autoencoder, load_autoencoder, read_latent_source

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
PATIENCE = 10.0  # seconds that the hub has for its first answer
NEEDED = "give a folder that AutoencoderKL.save_pretrained wrote"


def open_autoencoder(name: str, device: torch.device) -> Autoencoder:
    """Load an autoencoder under the name that a person gave it.

    Args:
        name: a folder, or a name of the hub.
        device: where it computes.

    Returns:
        The autoencoder.

    Raises:
        CheckpointError: there is no such autoencoder.
    """
    found = load_autoencoder(find_autoencoder(name)).to(device)
    return replace(found, source=found.source.model_copy(update={"name": name}))


def open_decoder(trained: TrainedModel, device: torch.device, vae: str | None) -> Decoder:
    """Find out how what a model draws becomes pixels (see `make_decoder`).

    Args:
        trained: the model.
        device: where an autoencoder computes.
        vae: what came with --vae.

    Returns:
        The decoder.

    Raises:
        ConfigError: model and autoencoder do not fit, or nobody knows the autoencoder.
        CheckpointError: there is no such autoencoder.
    """
    source = read_latent_source(trained.card)
    if source is None:
        if is_of_pixels(trained):
            return make_decoder(trained, device, vae)
        return open_named_decoder(trained, device, vae)
    if not (vae or source.name):
        raise ConfigError(
            "the model draws latents of an autoencoder that its card does not name: say with --vae "
            "where it lies"
        )
    try:
        return make_decoder(trained, device, find_autoencoder(vae or source.name))
    except CheckpointError as error:
        if vae:
            raise
        raise CheckpointError(
            f"the model draws latents, and its card names their autoencoder: {error}; say with "
            "--vae where it lies now"
        ) from error


def is_of_pixels(trained: TrainedModel) -> bool:
    """Say whether a model has the channels of pixels, and its card names no autoencoder."""
    channels = 3 * trained.card.space_to_depth**2
    return read_latent_source(trained.card) is None and trained.model.config.in_channels == channels


def open_named_decoder(trained: TrainedModel, device: torch.device, vae: str | None) -> Decoder:
    """Take a person's word for the autoencoder of a model whose card names none.

    Args:
        trained: the model.
        device: where the autoencoder computes.
        vae: what came with --vae.

    Returns:
        The decoder.

    Raises:
        ConfigError: none came, or it makes latents of another number of channels.
    """
    channels = trained.model.config.in_channels
    if vae is None:
        raise ConfigError(
            f"the model works on latents of {channels} channels, and its card names no autoencoder "
            "that turns them into pixels: say with --vae where it lies"
        )
    found = open_autoencoder(vae, device)
    if found.source.channels != channels:
        raise ConfigError(
            f"the model works on latents of {channels} channels, and the autoencoder {vae} has "
            f"{found.source.channels}: give the one that the model was trained with"
        )
    named = {"config": {"latents": found.source.model_dump(mode="json")}}
    card = trained.card.model_copy(update={"training": trained.card.training | named})
    return make_decoder(TrainedModel(trained.model, card), device, find_autoencoder(vae))


def find_autoencoder(name: str) -> str:
    """Return where an autoencoder lies, without waiting for a hub that does not answer.

    Args:
        name: a folder, or a name of the hub.

    Returns:
        The folder, that of the copy that was fetched before, or the name of one to fetch.

    Raises:
        CheckpointError: it is no folder, was not fetched before, and cannot be fetched.
    """
    if Path(name).expanduser().is_dir() or name.startswith((".", "/", "~")):
        return name
    if name.count("/") != 1:
        raise CheckpointError(
            f"there is no folder {name!r} of an autoencoder, and the hub has names like "
            f"OWNER/NAME: {NEEDED}, or such a name"
        )
    hub = import_optional("huggingface_hub", extra="diffusion")
    try:
        fetched = hub.try_to_load_from_cache(name, CONFIG)
    except ValueError as error:  # it cannot be a name
        raise CheckpointError(
            f"there is no folder {name!r} of an autoencoder, and it is no name of the hub: {NEEDED}"
        ) from error
    if isinstance(fetched, str):
        folder = Path(fetched).parent
        if any((folder / file).is_file() for file in WEIGHTS):
            return str(folder)
    ask_hub(hub, name)
    return name


def ask_hub(hub: Any, name: str) -> None:  # noqa: ANN401
    """Raise a `CheckpointError` unless the hub answers, whatever it says; ask once only."""
    lost = f"there is no folder {name!r} of an autoencoder, none of that name was fetched before"
    if hub.constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{lost}, and HF_HUB_OFFLINE forbids to fetch it: {NEEDED}")
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(name, CONFIG), timeout=PATIENCE)
    except hub.errors.HfHubHTTPError:
        return  # it has answered, and what it says is said again when it is fetched
    except Exception as error:  # whatever stands between here and the hub may raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"{lost}, and the hub cannot be reached ({reason}): {NEEDED}"
        ) from error
