"""From what a model draws to pixels: the one place for models of pixels and of latents."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from adaptok.dc.folder import TrainedModel
from adaptok.errors import ConfigError
from adaptok.train.pixels import depth_to_space, to_uint8
from adaptok.train.vae import open_decoder, read_latent_source

# Published figures of DiT and DC-DiT are of latents of four channels, of which three are guided.
PUBLISHED_CHANNELS, PUBLISHED_GUIDED = 4, 3


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """What turns a model's output into pixels.

    Args:
        decode: from what the model drew, `(b c h w)`, to RGB images on the CPU.
        factor: pixels per side of a cell.
        guided: how many leading channels guidance moves.
        clip: bound of what the model draws; None where there is none.
        weights: hash of the weights of an autoencoder; empty where there is none.
    """

    decode: Callable[[Float[Tensor, "b c h w"]], UInt8[Tensor, "b 3 h2 w2"]]
    factor: int
    guided: int
    clip: float | None = None
    weights: str = ""

    def size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of an image in pixels, from those of a latent in cells."""
        return grid[0] * self.factor, grid[1] * self.factor


def make_decoder(
    trained: TrainedModel, device: torch.device | str = "cpu", vae: str | Path | None = None
) -> Decoder:
    """Find out how what a model draws becomes pixels.

    Args:
        trained: the model; its card names the autoencoder, if there is one.
        device: where an autoencoder computes.
        vae: where the autoencoder lies now; None where the card says.

    Returns:
        The decoder.

    Raises:
        ConfigError: the model draws latents and its card says not of what, or it draws pixels and
            an autoencoder came, or the autoencoder is another one than the model's.
        CheckpointError: there is no such autoencoder.

    Example:
        >>> import adaptok
        >>> from adaptok.dc.folder import ModelCard
        >>> config = adaptok.DCDiTConfig(
        ...     hidden_size=32, depth=1, num_heads=2, latent_size=4, in_channels=12
        ... )
        >>> trained = TrainedModel(adaptok.DCDiT(config), ModelCard(space_to_depth=2))
        >>> make_decoder(trained).decode(torch.zeros(1, 12, 4, 4)).shape
        torch.Size([1, 3, 8, 8])
    """
    card, channels = trained.card, trained.model.config.in_channels
    if read_latent_source(card) is not None or vae is not None:
        autoencoder = open_decoder(card, vae).to(torch.device(device))
        return Decoder(
            autoencoder.decode,
            autoencoder.source.factor,
            PUBLISHED_GUIDED if channels == PUBLISHED_CHANNELS else channels,
            weights=autoencoder.source.weights_hash,
        )
    factor = card.space_to_depth
    if channels != 3 * factor**2:
        raise ConfigError(
            f"the model draws latents of {channels} channels, and its card names no autoencoder "
            f"that turns them into pixels ({3 * factor**2} channels would be pixels): train it on "
            "latents that `adaptok` cached, or draw with adaptok.diffusion.sample"
        )
    # Without a size on its card nobody knows that the model was trained on [-1, 1].
    clip = None if card.image_size is None else 1.0
    return Decoder(lambda x: to_uint8(depth_to_space(x.cpu(), factor)), factor, channels, clip)
