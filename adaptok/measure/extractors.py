"""What turns images into the features that distances compare."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from adaptok.errors import CheckpointError, ConfigError, DataError, ShapeError
from adaptok.optional import import_optional
from adaptok.storage import load_tensors

EFFICIENTNET = "efficientnet-lite0"
TIMM_NAME = "tf_efficientnet_lite0"
DOWNLOAD = "download"
EDGE = 128  # in pixels: four times cheaper than the 256 of training, and orders damage as well


@runtime_checkable
class FeatureExtractor(Protocol):
    """Turns images into features, and names the distances after itself.

    Attributes:
        label: short name, such as EffLite0 for the distances KID-EffLite0 and FD-EffLite0.
        rule: what is done to the pixels, in words.
        weights: which weights, in words.
    """

    label: str
    rule: str
    weights: str

    def __call__(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return the features of some images."""
        ...


@dataclass(eq=False)
class Extractor:
    """A feature extractor made of a callable.

    Args:
        label: short name that distances carry.
        run: from uint8 RGB images (b 3 h w) to features (b d).
        rule: what is done to the pixels, in words.
        weights: which weights, in words.
    """

    label: str
    run: Callable[[Tensor], Tensor] = field(repr=False)
    rule: str
    weights: str

    def __call__(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return the features of some images."""
        return self.run(images)


class EfficientNetFeatures(nn.Module):
    """The pooled features of EfficientNet-Lite0 before its classifier.

    Args:
        model: `tf_efficientnet_lite0` of timm.
        edge: pixels to which the images are resized.
    """

    def __init__(self, model: Any, edge: int = EDGE) -> None:  # noqa: ANN401
        super().__init__()
        self.model = model
        self.edge = edge

    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Resize, scale by (pixel - 127) / 128, and return the features."""
        pixels = images.to(next(self.model.parameters()).device).float()
        size = (self.edge, self.edge)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        maps = self.model.forward_features((pixels - 127) / 128)
        features: Tensor = self.model.forward_head(maps, pre_logits=True)
        return features


def load_extractor(
    source: str | nn.Module | Callable[[Tensor], Tensor],
    weights: str | Path | None = None,
    *,
    label: str | None = None,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """Make a feature extractor.

    Args:
        source: `"efficientnet-lite0"`, which needs timm, or a module or callable of your own from
            uint8 RGB images (b 3 h w) to features (b d); it resizes and scales as it needs.
        weights: a safetensors file with the weights of timm's `tf_efficientnet_lite0`, or
            `"download"` to let timm fetch them. Your own module has its weights already.
        label: name that the distances carry; EffLite0, or the name of your class or function.
        device: where it runs.

    Returns:
        The extractor. A module is put into eval mode and moved to the device.

    Raises:
        ConfigError: an unknown name, no weights, or weights for your own module.
        CheckpointError: the file is no such weights, or the download failed.
        MissingPackageError: timm is not installed.

    Example:
        >>> extractor = load_extractor(lambda images: images.float().mean((2, 3)), label="colour")
        >>> extractor(torch.full((2, 3, 8, 8), 5, dtype=torch.uint8)).shape
        torch.Size([2, 3])
    """
    if isinstance(source, str):
        check_name(source)
        model, described = load_efficientnet(weights)
        features = EfficientNetFeatures(model).to(device).eval()
        rule = f"resized to {EDGE} px (bilinear, antialiased), (pixel - 127) / 128"
        return Extractor(label or "EffLite0", features, rule, described)
    if weights is not None:
        raise ConfigError(
            f"weights {str(weights)!r} were given beside an extractor of your own: load them into "
            "it first"
        )
    if isinstance(source, nn.Module):
        source = source.to(device).eval()
    elif not callable(source):
        raise ConfigError(
            f"a {type(source).__name__} is no extractor: give {EFFICIENTNET!r}, a module or a "
            "callable"
        )
    name = label or getattr(source, "__name__", type(source).__name__).replace("<lambda>", "own")
    return Extractor(name, source, "pixels as it treats them", "its own weights")


def check_name(name: str) -> None:
    """Raise a `ConfigError` unless there is an extractor of that name."""
    if name == EFFICIENTNET:
        return
    if "inception" in name.lower() or name.lower() in ("fid", "kid"):
        raise ConfigError(
            f"{name!r} is not supported: the word FID belongs to the weights of one Inception-v3, "
            f"which adaptok does not read. Take {EFFICIENTNET}, whose distances are called "
            "KID-EffLite0 and FD-EffLite0, or an extractor of your own"
        )
    raise ConfigError(f"there is no extractor {name!r}: give {EFFICIENTNET} or one of your own")


def load_efficientnet(weights: str | Path | None) -> tuple[nn.Module, str]:
    """Make EfficientNet-Lite0 with trained weights, and say which.

    Args:
        weights: a safetensors file, or `"download"`.

    Returns:
        The model of timm, and its weights in words.
    """
    if weights is None:
        raise ConfigError(
            f"{EFFICIENTNET} needs weights: give a safetensors file, or the word {DOWNLOAD} to "
            "let timm fetch them"
        )
    timm = import_optional("timm", extra="evaluate")
    if str(weights) == DOWNLOAD:
        try:
            fetched: nn.Module = timm.create_model(TIMM_NAME, pretrained=True)
        except Exception as error:  # whatever the network and its libraries raise
            raise CheckpointError(
                f"timm could not fetch the weights of {TIMM_NAME} ({error}): give a safetensors "
                "file instead"
            ) from error
        return fetched, f"{TIMM_NAME} as timm fetches it"
    path = Path(weights)
    tensors = load_tensors(path)
    model: nn.Module = timm.create_model(TIMM_NAME, pretrained=False)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not hold the weights of timm's {TIMM_NAME}: "
            f"{str(error).splitlines()[-1].strip()[:200]}"
        ) from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return model, f"{path.name}, sha256 {digest[:16]}"


@torch.no_grad()
def extract_features(
    extractor: Callable[[Tensor], Tensor],
    batches: Iterable[UInt8[Tensor, "_ 3 _ _"]],
    *,
    names: Sequence[str] = (),
) -> Float[Tensor, "n d"]:
    """Extract the features of many images, batch by batch.

    Args:
        extractor: what `load_extractor` gives, or any callable like it.
        batches: the images; taken one batch at a time.
        names: what each image is called in errors; its number if not given.

    Returns:
        Features in float32 on the CPU, in the order of the images.

    Raises:
        ShapeError: the extractor does not give one row of features per image.
        DataError: a feature is NaN or infinite; the message names the image. Or there is none.

    Example:
        >>> batches = [torch.zeros(2, 3, 4, 4, dtype=torch.uint8)] * 3
        >>> extract_features(lambda images: images.float().mean((2, 3)), batches).shape
        torch.Size([6, 3])
    """
    parts: list[Tensor] = []
    done = 0
    for images in batches:
        found: object = extractor(images)  # of whoever wrote it
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(
                f"the extractor gave {got} for {len(images)} images: it must give one row of "
                "features per image"
            )
        part = found.detach().float().cpu()
        finite = part.isfinite().all(1)
        if not bool(finite.all()):
            place = done + int((~finite).nonzero()[0])
            which = names[place] if place < len(names) else f"image {place}"
            raise DataError(
                f"the features of {which} are NaN or infinite: check that image and the extractor"
            )
        parts.append(part)
        done += len(images)
    if not parts:
        raise DataError("there is no image to take features of: give at least one")
    return torch.cat(parts)
