"""Vision towers of transformers, from tiny configurations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .case import BATCH, HostCase, HostInputs, build_quietly, make_images, make_noise

CELLS = (5, 7)
PATCH = 8
PIXELS = (CELLS[0] * PATCH, CELLS[1] * PATCH)
SQUARE = 6 * PATCH
GRIDS = ((5, 7), (4, 6), (3, 9))
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "patch_size": PATCH,
}


def make_class(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a builder of a class of transformers from its configuration."""

    def make() -> nn.Module:
        import transformers

        settings = getattr(transformers, config)(**(SIZES | options))
        model: nn.Module = getattr(transformers, name)(settings)
        return model

    return build_quietly(make)


def give_images(model: nn.Module) -> HostInputs:
    """Make images of the size that the configuration names."""
    return HostInputs((), {"pixel_values": make_images(CELLS, PATCH)})


def give_other_size(model: nn.Module) -> HostInputs:
    """Make images of another size than the position table's, which is interpolated."""
    images = make_images(CELLS, PATCH)
    return HostInputs((), {"pixel_values": images, "interpolate_pos_encoding": True})


def give_all_cells(model: nn.Module) -> HostInputs:
    """Make images for a masked autoencoder that keeps every cell in its order."""
    noise = torch.arange(CELLS[0] * CELLS[1]).float().repeat(BATCH, 1)
    return HostInputs((), {"pixel_values": make_images(CELLS, PATCH), "noise": noise})


def give_padded(model: nn.Module) -> HostInputs:
    """Make patches of images of three sizes, padded to the longest."""
    counts = torch.tensor([h * w for h, w in GRIDS])
    valid = torch.arange(int(counts.max())) < counts[:, None]
    patches = make_noise(BATCH, int(counts.max()), 3 * PATCH * PATCH) * valid[..., None]
    shapes = torch.tensor(GRIDS)
    return HostInputs(
        (),
        {
            "pixel_values": patches,
            "pixel_attention_mask": valid.long(),
            "spatial_shapes": shapes,
        },
    )


def read_cells(output: Any) -> Tensor:
    """Return the whole last hidden state."""
    state: Tensor = output.last_hidden_state
    return state


def read_pooled(output: Any) -> Tensor:
    """Return the pooled features."""
    pooled: Tensor = output.pooler_output
    return pooled


def read_logits(output: Any) -> Tensor:
    """Return the logits."""
    logits: Tensor = output.logits
    return logits


def read_embeds(output: Any) -> Tensor:
    """Return the projected image features."""
    embeds: Tensor = output.image_embeds
    return embeds


def describe(  # one line of the table below
    name: str,
    build: Callable[[], nn.Module],
    container: str,
    prefix: int,
    inputs: Callable[[nn.Module], HostInputs] = give_images,
    output: Callable[[Any], Tensor] = read_cells,
    notes: str = "",
    grids: tuple[tuple[int, ...], ...] = (),
    tokenwise: tuple[str | int, ...] = (),
) -> HostCase:
    """Return the case of a vision tower."""
    return HostCase(
        name=f"transformers/{name}",
        family="transformers",
        build=build,
        inputs=inputs,
        cells=CELLS,
        output=output,
        containers=(container,),
        prefix=prefix,
        grids=grids,
        tokenwise=tokenwise,
        notes=notes,
    )


TRANSFORMERS_CASES = (
    describe("vit", make_class("ViTModel", "ViTConfig", image_size=PIXELS), "layers", 1),
    describe(
        "vit_classifier",
        make_class("ViTForImageClassification", "ViTConfig", image_size=SQUARE, num_labels=10),
        "vit.layers",
        1,
        give_other_size,
        read_logits,
        "positions interpolated to another size",
    ),
    describe(
        "deit",
        make_class("DeiTModel", "DeiTConfig", image_size=PIXELS),
        "layers",
        2,
        notes="class and distillation token",
    ),
    describe(
        "dinov2",
        make_class("Dinov2Model", "Dinov2Config", image_size=SQUARE),
        "encoder.layer",
        1,
        notes="LayerScale",
    ),
    describe(
        "dinov2_classifier",
        make_class(
            "Dinov2ForImageClassification", "Dinov2Config", image_size=SQUARE, num_labels=10
        ),
        "dinov2.encoder.layer",
        1,
        output=read_logits,
        notes="class token and mean of the cells",
    ),
    describe(
        "dinov2_registers",
        make_class(
            "Dinov2WithRegistersModel",
            "Dinov2WithRegistersConfig",
            image_size=SQUARE,
            num_register_tokens=4,
        ),
        "encoder.layer",
        5,
        notes="registers",
    ),
    describe(
        "dinov3",
        make_class("DINOv3ViTModel", "DINOv3ViTConfig", image_size=SQUARE, num_register_tokens=4),
        "model.layer",
        5,
        notes="rotation, registers",
        tokenwise=("position_embeddings",),
    ),
    describe(
        "clip",
        make_class("CLIPVisionModel", "CLIPVisionConfig", image_size=SQUARE),
        "encoder.layers",
        1,
        give_other_size,
        notes="norm before the blocks",
    ),
    describe(
        "clip_projection",
        make_class(
            "CLIPVisionModelWithProjection",
            "CLIPVisionConfig",
            image_size=SQUARE,
            projection_dim=32,
        ),
        "vision_model.encoder.layers",
        1,
        give_other_size,
        read_embeds,
        "projected class token",
    ),
    describe(
        "siglip",
        make_class("SiglipVisionModel", "SiglipVisionConfig", image_size=SQUARE),
        "encoder.layers",
        0,
        give_other_size,
        read_pooled,
        "no class token, a head that attends to all cells",
    ),
    describe(
        "siglip2",
        make_class("Siglip2VisionModel", "Siglip2VisionConfig", num_patches=36),
        "encoder.layers",
        0,
        give_padded,
        read_pooled,
        "a grid for each sample, padding masked",
        GRIDS,
        (1,),
    ),
    describe(
        "ijepa",
        make_class("IJepaModel", "IJepaConfig", image_size=PIXELS),
        "layers",
        0,
        notes="no class token",
    ),
    describe(
        "vit_mae",
        make_class("ViTMAEModel", "ViTMAEConfig", image_size=PIXELS, mask_ratio=0.0),
        "layers",
        1,
        give_all_cells,
        notes="masked autoencoder that masks nothing",
    ),
    describe(
        "beit",
        make_class("BeitModel", "BeitConfig", image_size=PIXELS, use_relative_position_bias=True),
        "layers",
        1,
        notes="a table of relative positions in each block",
    ),
)
