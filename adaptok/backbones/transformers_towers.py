"""The vision towers of transformers: where their blocks are, and what stands before the cells."""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptok.errors import UnsupportedModelError
from adaptok.hosts import HostInputs, NoMatch, device_of, dtype_of, is_instance

MODELS = "transformers.models"
Kind = Literal["image", "masked", "padded", "relative"]


@dataclass(frozen=True, slots=True)
class TowerClass:
    """A class of vision towers.

    Args:
        module: its module, below `transformers.models`.
        name: its name.
        blocks: attribute path of the blocks.
        prefix: tokens in front of the cells, the class token first, registers not counted.
        collector: attribute path of the submodule that collects hidden states and attentions.
        any_size: whether images of any size are taken, unasked.
        kind: `"image"`; `"masked"` where cells may be dropped and shuffled before the blocks;
            `"padded"` where patches come with a grid per sample; `"relative"` where each block adds
            a table of the relative positions of all cells.
    """

    module: str
    name: str
    blocks: str
    prefix: int = 1
    collector: str = ""
    any_size: bool = False
    kind: Kind = "image"

    @property
    def has_class(self) -> bool:
        """Whether the first token is a class token: registers are not in the prefix."""
        return self.prefix > 0


TOWERS = (
    TowerClass("vit.modeling_vit", "ViTModel", "layers"),
    TowerClass("deit.modeling_deit", "DeiTModel", "layers", prefix=2),
    TowerClass("ijepa.modeling_ijepa", "IJepaModel", "layers", prefix=0),
    TowerClass("vit_mae.modeling_vit_mae", "ViTMAEModel", "layers", kind="masked"),
    TowerClass(
        "dinov2.modeling_dinov2", "Dinov2Model", "encoder.layer", collector="encoder", any_size=True
    ),
    TowerClass(
        "dinov2_with_registers.modeling_dinov2_with_registers",
        "Dinov2WithRegistersModel",
        "encoder.layer",
        collector="encoder",
        any_size=True,
    ),
    TowerClass(
        "dinov3_vit.modeling_dinov3_vit",
        "DINOv3ViTModel",
        "model.layer",
        collector="model",
        any_size=True,
    ),
    TowerClass("beit.modeling_beit", "BeitModel", "layers", any_size=True, kind="relative"),
    TowerClass("clip.modeling_clip", "CLIPVisionModel", "encoder.layers"),
    TowerClass("siglip.modeling_siglip", "SiglipVisionModel", "encoder.layers", prefix=0),
    TowerClass(
        "siglip2.modeling_siglip2", "Siglip2VisionModel", "encoder.layers", prefix=0, kind="padded"
    ),
)
REFUSED = {
    "data2vec.modeling_data2vec_vision": "each of its blocks adds a table of the relative "
    "positions of all cells",
}


def find_tower(model: nn.Module) -> tuple[str, TowerClass]:
    """Return the path and the class of the vision tower of a model of transformers.

    Args:
        model: a tower, or a model of the same family around it, such as a classifier.

    Returns:
        The attribute path, `""` for the model itself, and what is known of the class.

    Raises:
        NoMatch: there is no tower, or it is inside a model of another family.
        UnsupportedModelError: there is one that cannot be wrapped, or there are several.
    """
    if "transformers" not in sys.modules:
        raise NoMatch("no model of transformers")
    homes = {cls.__module__.removeprefix(f"{MODELS}.") for cls in type(model).__mro__}
    name = type(model).__name__
    if is_instance(model, "transformers.backbone_utils", "BackboneMixin"):
        other = name.replace("Backbone", "Model")
        raise UnsupportedModelError(
            f"{name} hands out the features of single blocks, and a wrapped model runs those on "
            f"fewer tokens: wrap the model without feature maps, {other}"
        )
    for home, reason in REFUSED.items():
        if home in homes:
            raise UnsupportedModelError(f"{name} is not supported: {reason}")
    found = [
        (path, tower)
        for path, module in model.named_modules()
        for tower in TOWERS
        if is_instance(module, f"{MODELS}.{tower.module}", tower.name)
    ]
    if not found:
        raise NoMatch(f"none of {', '.join(tower.name for tower in TOWERS)}")
    paths = ", ".join(path for path, _ in found)
    if len(found) > 1:
        raise UnsupportedModelError(f"{name} has several vision towers ({paths}): wrap one of them")
    path, tower = found[0]
    if tower.module not in homes:
        raise NoMatch(f"the tower {tower.name} is a part, at {path}: adaptok.wrap(model.{path})")
    return path, tower


def size_of(value: Any) -> tuple[int, int]:  # noqa: ANN401
    """Return the two lengths of a setting that is one number or a pair."""
    h, w = value if isinstance(value, tuple | list) else (value, value)
    return int(h), int(w)


def make_example(
    model: nn.Module,
    tower: TowerClass,
    config: Any,  # noqa: ANN401
    patch: tuple[int, int],
) -> HostInputs:
    """Return two small inputs of a model, non-square where it takes such.

    Args:
        model: the whole model.
        tower: what is known of its vision tower.
        config: the tower's configuration.
        patch: sides of a patch in pixels.

    Returns:
        Images or patches, and text where the model wants some.
    """
    parameters = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    if "input_ids" in parameters:
        inputs["input_ids"] = make_text(model)
    if tower.kind == "padded":
        return HostInputs(kwargs=on_device(model, inputs | make_patches(config, patch)))
    h, w = 4 * patch[0], 6 * patch[1]
    if not tower.any_size:
        native = size_of(config.image_size)
        cells = [side // length for side, length in zip(native, patch, strict=True)]
        paints = "MaskedImageModeling" in type(model).__name__  # square images only
        if cells[0] == cells[1] and "interpolate_pos_encoding" in parameters and not paints:
            inputs["interpolate_pos_encoding"] = True
        else:  # the table of positions cannot be interpolated
            h, w = native
    if tower.kind == "masked":
        order = torch.arange((h // patch[0]) * (w // patch[1]), dtype=torch.float32)
        inputs["noise"] = order.repeat(2, 1)
    inputs["pixel_values"] = make_noise(2, int(config.num_channels), h, w)
    return HostInputs(kwargs=on_device(model, inputs))


def make_patches(config: Any, patch: tuple[int, int]) -> dict[str, Tensor]:  # noqa: ANN401
    """Return patches of two images of one grid, with one more that is padding."""
    valid = torch.ones(2, 25, dtype=torch.long)
    valid[:, 24] = 0
    patches = make_noise(2, 25, int(config.num_channels) * patch[0] * patch[1])
    return {
        "pixel_values": patches * valid[..., None],
        "pixel_attention_mask": valid,
        "spatial_shapes": torch.tensor([[4, 6], [4, 6]]),
    }


def make_text(model: nn.Module) -> Tensor:
    """Return two short texts for a model that compares images and text."""
    config: Any = model.config
    text = config.text_config
    ids = torch.arange(8).view(2, 4) % int(text.vocab_size)
    end = text.eos_token_id
    if isinstance(end, int) and 0 <= end < text.vocab_size:
        ids[:, -1] = end
    return ids


def make_noise(*shape: int) -> Tensor:
    """Return normal noise that is the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def on_device(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs on the device of a model, floating-point ones in its dtype."""
    device, dtype = device_of(model), dtype_of(model)
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in inputs.items()
    }
