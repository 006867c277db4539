"""Vision Transformers of timm, by registered name, shrunk through their own arguments."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .case import BATCH, HostCase, HostInputs, build_quietly, make_images, make_noise

CELLS = (5, 7)
PATCH = 16
WIDTH = 96
HEADS = 2


@dataclass(frozen=True, slots=True)
class Variant:
    """One registered name and what this catalogue changes of it.

    Args:
        name: registered in timm.
        prefix: class and register tokens.
        notes: what is special.
        options: further arguments of `create_model`.
        pixels: side of a cell in pixels.
        cells: rows and columns of the inputs' grid.
        tokenwise: arguments of a block with a row for each token.
    """

    name: str
    prefix: int
    notes: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    pixels: int = PATCH
    cells: tuple[int, int] = CELLS
    tokenwise: tuple[str, ...] = ()


PATCH_14 = {"patch_size": PATCH}  # one size of cells for all
ROTATION = ("rope",)
DYNAMIC = {"dynamic_img_size": True, "img_size": (96, 96)}  # not the size of the inputs
VARIANTS = (
    Variant("vit_tiny_patch16_224", 1, "class token"),
    Variant("vit_small_patch16_224", 1, "dynamic image size", DYNAMIC),
    Variant("vit_base_patch16_224_miil", 1, "no bias of query, key and value"),
    Variant("vit_base_patch16_gap_224", 0, "average pooling, LayerScale"),
    Variant("vit_medium_patch16_reg4_gap_256", 4, "registers, no class token"),
    Variant("vit_wee_patch16_reg1_gap_256", 1, "small MLP, register"),
    Variant("vit_dwee_patch16_reg1_gap_256", 1, "differential attention"),
    Variant("vit_so150m_patch16_reg4_map_256", 4, "registers, map pooling"),
    Variant("vit_base_patch16_siglip_224", 0, "map pooling"),
    Variant("vit_base_patch16_clip_224", 1, "norm before the blocks"),
    Variant("vit_base_patch16_clip_quickgelu_224", 1, "quick GELU", cells=(7, 4)),
    Variant("vit_base_patch16_rpn_224", 0, "norms behind attention and MLP"),
    Variant("vit_base_patch16_xp_224", 1, "attention and MLP side by side (ParallelScalingBlock)"),
    Variant("vit_small_patch16_18x2_224", 1, "two attentions side by side (ParallelThingsBlock)"),
    Variant("vit_tiny_r_s16_p8_224", 1, "convolutional stem", {"patch_size": 8}, 32),
    Variant("flexivit_small", 1, "no position of the class token"),
    Variant("deit_tiny_patch16_224", 1, "class token", cells=(3, 9)),
    Variant("deit_tiny_distilled_patch16_224", 2, "class and distillation token, two heads"),
    Variant("deit3_small_patch16_224", 1, "LayerScale, no position of the class token"),
    Variant("vit_small_patch14_dinov2", 1, "LayerScale", PATCH_14),
    Variant("vit_small_patch14_reg4_dinov2", 5, "LayerScale, registers", PATCH_14),
    Variant("vit_base_patch14_reg1_tipsv2", 2, "class token and register", PATCH_14),
    Variant("vit_base_patch16_radio_v3", 8, "eight prefix tokens"),
    Variant("aimv2_large_patch14_224", 0, "RMSNorm, SwiGLU", PATCH_14),
    Variant("beit3_base_patch16_224", 1, "norms inside attention and MLP"),
    Variant("eva_large_patch14_196", 1, "plain ViT", PATCH_14, cells=(6, 5)),
    Variant("eva_giant_patch14_224", 1, "Eva class without rotation", PATCH_14),
    Variant("eva02_tiny_patch14_224", 1, "rotation, SwiGLU", PATCH_14, tokenwise=ROTATION),
    Variant("eva02_base_patch16_clip_224", 1, "rotation, norms inside", tokenwise=ROTATION),
    Variant("eva02_enormous_patch14_clip_224", 1, "norms behind attention and MLP", PATCH_14),
    Variant("vit_small_patch16_dinov3", 5, "rotation, registers, LayerScale", tokenwise=ROTATION),
    Variant("vit_small_patch16_lingbot", 5, "rotation, registers", tokenwise=ROTATION),
    Variant(
        "vit_base_patch16_sapiens2",
        9,
        "rotation, fewer key heads",
        {"num_kv_heads": 1},
        tokenwise=ROTATION,
    ),
    Variant("vit_small_patch16_rope_224", 1, "rotation, no position table", tokenwise=ROTATION),
    Variant(
        "vit_small_patch16_rope_mixed_224",
        1,
        "a learned rotation for each block",
        tokenwise=ROTATION,
    ),
    Variant(
        "vit_small_patch16_rope_mixed_ape_224",
        1,
        "the same and a position table",
        tokenwise=ROTATION,
    ),
    Variant(
        "vit_base_patch16_rope_reg1_gap_256",
        1,
        "rotation, dynamic image size",
        DYNAMIC,
        tokenwise=ROTATION,
    ),
    Variant(
        "vit_pe_core_tiny_patch16_384",
        1,
        "rotation, norm before the blocks, map pooling",
        tokenwise=ROTATION,
    ),
    Variant(
        "vit_pe_spatial_tiny_patch16_512",
        1,
        "rotation, whole sequence as output",
        tokenwise=ROTATION,
    ),
    Variant("beit_base_patch16_224", 1, "a table of relative positions in each block"),
    Variant("beitv2_base_patch16_224", 1, "the same, another grid", cells=(9, 4)),
    Variant("vit_relpos_small_patch16_224", 0, "an MLP of relative positions in each block"),
    Variant(
        "vit_srelpos_small_patch16_224",
        0,
        "one bias of relative positions for all blocks",
        tokenwise=("shared_rel_pos",),
    ),
    Variant("naflexvit_base_patch16_gap", 4, "registers"),
    Variant("naflexvit_base_patch16_siglip", 0, "map pooling"),
    Variant("naflexvit_base_patch16_parfac_gap", 4, "factorised positions"),
)


def make_timm(variant: Variant) -> nn.Module:
    """Make the model of a variant: four blocks of width 96, two heads, ten classes."""
    import timm

    options: dict[str, Any] = {
        "img_size": (variant.cells[0] * variant.pixels, variant.cells[1] * variant.pixels),
        "depth": 4,
        "embed_dim": WIDTH,
        "num_heads": HEADS,
        "num_classes": 10,
    }
    model: nn.Module = timm.create_model(variant.name, **(options | variant.options))
    return model


def describe_timm(variant: Variant) -> HostCase:
    """Return the case of a variant that takes images."""
    return HostCase(
        name=f"timm/{variant.name}",
        family="timm",
        build=build_quietly(lambda: make_timm(variant)),
        inputs=lambda model: HostInputs((make_images(variant.cells, variant.pixels),)),
        cells=variant.cells,
        output=read_tensor,
        containers=("blocks",),
        prefix=variant.prefix,
        tokenwise=variant.tokenwise,
        notes=variant.notes,
    )


def read_tensor(output: Tensor) -> Tensor:
    """Return the output as it is."""
    return output


GRIDS = ((5, 7), (4, 6), (3, 9))


def make_padded(model: nn.Module) -> HostInputs:
    """Make patches of images of three sizes, padded to the longest, as NaFlex loaders do."""
    longest = max(h * w for h, w in GRIDS)
    patches = make_noise(BATCH, longest, PATCH * PATCH * 3)
    coordinates = torch.zeros(BATCH, longest, 2, dtype=torch.long)
    valid = torch.zeros(BATCH, longest, dtype=torch.bool)
    for i, (h, w) in enumerate(GRIDS):
        coordinates[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[i, : h * w] = True
        patches[i, h * w :] = 0
    return HostInputs(
        ({"patches": patches, "patch_coord": coordinates, "patch_valid": valid},),
    )


PADDED = HostCase(
    name="timm/naflexvit_base_patch16_gap, sizes mixed",
    family="timm",
    build=build_quietly(lambda: make_timm(Variant("naflexvit_base_patch16_gap", 4))),
    inputs=make_padded,
    cells=GRIDS[0],
    output=read_tensor,
    containers=("blocks",),
    prefix=4,
    grids=GRIDS,
    tokenwise=("attn_mask",),
    notes="a grid for each sample, padding masked",
)

TIMM_CASES = (*(describe_timm(variant) for variant in VARIANTS), PADDED)
