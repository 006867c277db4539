"""The autoencoder between pixels and latents: which one it is, and both ways through it."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from adaptok.config import Config
from adaptok.dc.folder import ModelCard
from adaptok.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    UnsupportedModelError,
)
from adaptok.optional import import_optional
from adaptok.train.pixels import to_latent, to_uint8

# What decides the numbers of an AutoencoderKL; other keys of its configuration do not.
DECISIVE = (
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "act_fn", "latent_channels", "norm_num_groups", "scaling_factor",
    "shift_factor", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention",
)  # fmt: skip
SCALED_PER_CHANNEL = ("latents_mean", "latents_std")


class LatentSource(Config):
    """Which autoencoder made latents, and how a model sees them: `(z - shift) * scaling`.

    Args:
        channels: of a latent.
        factor: pixels per side of a latent cell.
        scaling_factor: of the latents.
        shift_factor: of the latents.
        name: folder or name of the autoencoder, as a person gave it.
        config_hash: of its options; empty where any autoencoder with these channels and this
            factor will do.
        weights_hash: of its weights, empty likewise.
        cache_hash: of the images that were encoded, empty where there are none yet.

    Example:
        >>> LatentSource(channels=4, factor=8).is_any
        True
    """

    channels: Annotated[int, Field(ge=1)]
    factor: Annotated[int, Field(ge=1)]
    scaling_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    shift_factor: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    name: str = ""
    config_hash: str = ""
    weights_hash: str = ""
    cache_hash: str = ""

    @property
    def is_any(self) -> bool:
        """Whether any autoencoder with these channels and this factor will do."""
        return not self.weights_hash

    def describe_differences(self, found: "LatentSource") -> list[str]:
        """Say in what another autoencoder is not the one that is asked for.

        Args:
            found: the other one.

        Returns:
            One phrase per difference; none where it fits.
        """
        names = ["channels", "factor"]
        if not self.is_any:
            names += ["scaling_factor", "shift_factor", "config_hash", "weights_hash"]
        return [
            f"{name} {show_value(getattr(found, name))} where {show_value(getattr(self, name))} "
            "is asked for"
            for name in names
            if getattr(found, name) != getattr(self, name)
        ]


def show_value(value: object) -> str:
    """Return a value as a person can compare it: of a hash its start."""
    return value[:12] if isinstance(value, str) else f"{value}"


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """What an autoencoder says of images: a normal distribution for each number of a latent.

    Args:
        mean: means, not scaled, `(b c h w)`.
        std: standard deviations, `(b c h w)`.
    """

    mean: Float[Tensor, "b c h w"]
    std: Float[Tensor, "b c h w"]

    def draw(
        self, noise: Float[Tensor, "b c h w"], source: LatentSource
    ) -> Float[Tensor, "b c h w"]:
        """Return the latents that a model sees for standard normal noise.

        Args:
            noise: standard normal numbers; zeros give the mean.
            source: how latents are scaled.

        Returns:
            Scaled latents.

        Example:
            >>> posterior = Posterior(torch.full((1, 4, 2, 2), 3.0), torch.ones(1, 4, 2, 2))
            >>> source = LatentSource(channels=4, factor=8, scaling_factor=0.5, shift_factor=1.0)
            >>> posterior.draw(torch.zeros(1, 4, 2, 2), source)[0, 0, 0, 0].item()
            1.0
        """
        return (self.mean + self.std * noise - source.shift_factor) * source.scaling_factor


@dataclass(frozen=True, slots=True, eq=False)
class Autoencoder:
    """A diffusers `AutoencoderKL` in eval mode, with what identifies it.

    Args:
        model: the module.
        source: its identity.
    """

    model: Any
    source: LatentSource

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    def to(self, device: torch.device) -> "Autoencoder":
        """Return the same autoencoder on a device; the module itself is moved."""
        return Autoencoder(self.model.to(device), self.source)

    def encode(self, images: UInt8[Tensor, "b 3 h w"]) -> Posterior:
        """Turn pixels into the distribution of their latents.

        Args:
            images: height and width are multiples of the factor.

        Returns:
            Mean and standard deviation in float32, on the device of the autoencoder.

        Raises:
            DataError: its answer is not finite.
        """
        with torch.no_grad():
            said = self.model.encode(to_latent(images.to(self.device))).latent_dist
        if not (said.mean.isfinite().all() and said.std.isfinite().all()):
            raise DataError(
                f"the autoencoder {self.source.name} makes numbers of an image that are not "
                "finite: its weights are damaged, or made for another precision than float32"
            )
        return Posterior(said.mean.float(), said.std.float())

    def decode(self, latents: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b 3 h2 w2"]:
        """Turn latents as a model draws them into pixels.

        Args:
            latents: scaled latents.

        Returns:
            Images on the CPU.
        """
        plain = latents.to(self.device, torch.float32)
        with torch.no_grad():
            z = plain / self.source.scaling_factor + self.source.shift_factor
            return to_uint8(self.model.decode(z).sample.cpu())


def load_autoencoder(name: str | Path) -> Autoencoder:
    """Load an `AutoencoderKL` of diffusers and find out which one it is.

    Args:
        name: a folder that `save_pretrained` wrote (or one with such a folder `vae` in it), or a
            name that diffusers can fetch. Only safetensors are read.

    Returns:
        The autoencoder in float32 on the CPU.

    Raises:
        CheckpointError: there is no such autoencoder, or its files are damaged.
        UnsupportedModelError: it is of another class, or scales each channel by itself.
        MissingPackageError: diffusers is not installed.
    """
    kind = import_optional("diffusers", extra="diffusion").AutoencoderKL
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not folder.is_dir() and str(name).startswith((".", "/", "~")):
        raise CheckpointError(f"there is no folder {name} of an autoencoder")
    place = str(folder) if folder.is_dir() else str(name)
    with explain_failures(str(name)):
        options = kind.load_config(place)
    if options.get("_class_name", kind.__name__) != kind.__name__:
        raise UnsupportedModelError(
            f"{name} is an {options['_class_name']}: an AutoencoderKL is needed"
        )
    with explain_failures(str(name)):
        model, info = kind.from_pretrained(
            place, use_safetensors=True, torch_dtype=torch.float32, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"the weights of the autoencoder {str(name)!r} lack {len(missing)} tensors, such as "
            f"{missing[0]}: its files are of another model"
        )
    model = model.eval().requires_grad_(False)
    return Autoencoder(model, identify_autoencoder(model, str(name)))


@contextmanager
def explain_failures(name: str) -> Iterator[None]:
    """Turn whatever diffusers and the hub raise into one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of diffusers about its own calls to the hub
            yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(
            f"cannot load the autoencoder {name!r} ({reason}): give a folder with config.json and "
            "safetensors, as `AutoencoderKL.save_pretrained` writes it, or a name that diffusers "
            "can fetch"
        ) from error


def identify_autoencoder(model: Any, name: str) -> LatentSource:  # noqa: ANN401
    """Return what identifies an autoencoder, whatever file it came from.

    Args:
        model: an `AutoencoderKL`.
        name: what a person calls it.

    Returns:
        Its identity.

    Raises:
        UnsupportedModelError: it scales each channel by itself, or does not take RGB.
    """
    options = dict(model.config)
    if any(options.get(key) is not None for key in SCALED_PER_CHANNEL):
        raise UnsupportedModelError(
            f"the autoencoder {name} has latents_mean and latents_std, one per channel: only one "
            "scaling_factor and shift_factor are understood"
        )
    if (options["in_channels"], options["out_channels"]) != (3, 3):
        raise UnsupportedModelError(
            f"the autoencoder {name} has {options['in_channels']} channels in and "
            f"{options['out_channels']} out: images have 3"
        )
    decisive = json.dumps({key: options.get(key) for key in DECISIVE}, sort_keys=True)
    return LatentSource(
        channels=options["latent_channels"],
        factor=2 ** (len(options["block_out_channels"]) - 1),
        scaling_factor=options["scaling_factor"],
        shift_factor=options.get("shift_factor") or 0.0,
        name=name,
        config_hash=hashlib.sha256(decisive.encode()).hexdigest(),
        weights_hash=hash_tensors(model.state_dict()),
    )


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name, as float32.

    Example:
        >>> hash_tensors({"a": torch.ones(2)}) == hash_tensors({"a": torch.ones(2).half()})
        True
    """
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_latent_source(card: ModelCard) -> LatentSource | None:
    """Return the autoencoder whose latents a model draws, or None for a model of pixels.

    Args:
        card: of the model.

    Returns:
        Its identity.

    Example:
        >>> read_latent_source(ModelCard()) is None
        True
    """
    run = card.training.get("config")
    found = run.get("latents") if isinstance(run, dict) else None
    return None if found is None else LatentSource(**found)


def open_decoder(card: ModelCard, name: str | Path | None = None) -> Autoencoder:
    """Load the autoencoder that decodes what a model draws.

    Args:
        card: of the model.
        name: where the autoencoder lies now; None where the card says.

    Returns:
        The autoencoder, on the CPU; `decode` of it turns the model's latents into pixels.

    Raises:
        ConfigError: the model draws pixels, or the autoencoder is another one than its own.
        CheckpointError: there is no such autoencoder.
    """
    asked = read_latent_source(card)
    if asked is None:
        raise ConfigError("this model draws pixels and no latents: no autoencoder is needed")
    found = load_autoencoder(name or asked.name)
    wrong = asked.describe_differences(found.source)
    if wrong:
        raise ConfigError(
            f"the autoencoder {found.source.name} is not the one that the model was trained with "
            f"({asked.name}): {', '.join(wrong)}; give that one"
        )
    return found
