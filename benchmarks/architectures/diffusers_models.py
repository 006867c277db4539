"""Diffusion transformers of diffusers, from tiny configurations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .case import BATCH, HostCase, HostInputs, build_quietly, make_images, make_noise

CELLS = (5, 7)
HEADS = {"num_attention_heads": 2, "attention_head_dim": 24}
TEXT_WIDTH = 20
POOLED_WIDTH = 24
TEXT = 7
TEXT_LENGTHS = (7, 4, 2)


def make_class(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a builder of a class of diffusers."""

    def make() -> nn.Module:
        import diffusers

        model: nn.Module = getattr(diffusers, name)(**options)
        return model

    return build_quietly(make)


def make_latents(cells: tuple[int, int] = CELLS) -> Tensor:
    """Make latents (b 4 2h 2w) for a grid of patches of two by two."""
    return make_images(cells, patch=2, channels=4)


def make_packed(cells: tuple[int, int] = CELLS) -> Tensor:
    """Make the same latents with each patch in the channels of one token (b n 16)."""
    return nn.functional.pixel_unshuffle(make_latents(cells), 2).flatten(2).transpose(1, 2)


def make_video(grid: tuple[int, int, int]) -> Tensor:
    """Make latents of a video (b 4 f 2h 2w) whose frames differ."""
    frames = [make_images(grid[1:], patch=2, channels=4, seed=10 + i) for i in range(grid[0])]
    return torch.stack(frames, dim=2)


def make_text() -> Tensor:
    """Make text features (b s c)."""
    return make_noise(BATCH, TEXT, TEXT_WIDTH)


def make_text_mask() -> Tensor:
    """Make the mask (b s) of texts of different lengths: one where a text token is."""
    return (torch.arange(TEXT) < torch.tensor(TEXT_LENGTHS)[:, None]).long()


def make_times(scale: float = 1.0) -> Tensor:
    """Make a timestep for each sample."""
    return torch.tensor([20.0, 400.0, 900.0]) * scale


def make_positions(cells: tuple[int, int] = CELLS) -> Tensor:
    """Make Flux's position ids (n 3) of a grid: zero, row, column."""
    rows, columns = torch.arange(cells[0]), torch.arange(cells[1])
    places = torch.cartesian_prod(rows, columns)
    return torch.cat([torch.zeros(len(places), 1), places], dim=1)


def read_sample(output: Any) -> Tensor:
    """Return the sample; a list of samples is stacked."""
    sample = output.sample
    return torch.stack(sample) if isinstance(sample, list) else sample


def give_dit(model: nn.Module) -> HostInputs:
    """Make inputs of DiT, whose grid isn't square though its count is a square number."""
    return HostInputs(
        (make_latents((4, 9)),),
        {"timestep": make_times().long(), "class_labels": torch.arange(BATCH) + 1},
    )


def give_pixart(model: nn.Module) -> HostInputs:
    """Make inputs of PixArt: texts of different lengths, masked."""
    return HostInputs(
        (make_latents(),),
        {
            "encoder_hidden_states": make_text(),
            "timestep": make_times(),
            "encoder_attention_mask": make_text_mask(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    )


def give_sd3(model: nn.Module) -> HostInputs:
    """Make inputs of SD3."""
    return HostInputs(
        (),
        {
            "hidden_states": make_latents(),
            "encoder_hidden_states": make_text(),
            "pooled_projections": make_noise(BATCH, POOLED_WIDTH, seed=3),
            "timestep": make_times(),
        },
    )


def give_flux(model: nn.Module) -> HostInputs:
    """Make inputs of Flux: patches as tokens, the grid only in position ids that all share."""
    inputs = {
        "hidden_states": make_packed(),
        "encoder_hidden_states": make_text(),
        "pooled_projections": make_noise(BATCH, POOLED_WIDTH, seed=3),
        "timestep": make_times(1e-3),
        "img_ids": make_positions(),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    if getattr(model.config, "guidance_embeds", False):
        inputs["guidance"] = torch.tensor([1.0, 3.5, 7.0])
    return HostInputs((), inputs)


def give_z_image(model: nn.Module) -> HostInputs:
    """Make inputs of Z-Image: lists, texts of 5, 40 and 9 tokens, each padded to 32s."""
    texts = [make_noise(n, TEXT_WIDTH, seed=n) for n in (5, 40, 9)]
    latents = list(make_latents().unsqueeze(2))
    return HostInputs((latents, make_times(1e-3), texts))


def give_wan(model: nn.Module) -> HostInputs:
    """Make inputs of Wan: a video of two frames."""
    return HostInputs(
        (),
        {
            "hidden_states": make_video((2, 4, 5)),
            "timestep": make_times(),
            "encoder_hidden_states": make_text(),
        },
    )


def give_wan_per_token(model: nn.Module) -> HostInputs:
    """Make inputs of Wan 2.2: a timestep for each token, the first frame being clean."""
    inputs = give_wan(model)
    times = make_times()[:, None].repeat(1, 40)
    times[:, :20] = 0
    return HostInputs((), inputs.kwargs | {"timestep": times})


SD3 = {
    **HEADS,
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 48,
    "pooled_projection_dim": POOLED_WIDTH,
    "pos_embed_max_size": 16,
}
FLUX = {
    **HEADS,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": POOLED_WIDTH,
    "axes_dims_rope": (8, 8, 8),
}
WAN = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 280,  # 35 / 6 of the width, as in the published models
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
FLUX_LISTS = ("transformer_blocks", "single_transformer_blocks")
FLUX_SHARED = frozenset({"img_ids", "txt_ids"})

DIFFUSERS_CASES = (
    HostCase(
        name="diffusers/dit",
        family="diffusers",
        build=make_class(
            "DiTTransformer2DModel",
            **HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=4,
            sample_size=12,
            num_embeds_ada_norm=10,
        ),
        inputs=give_dit,
        cells=(4, 9),
        output=read_sample,
        containers=("transformer_blocks",),
        notes="each block embeds time and class; unpatchify takes the grid for a square",
    ),
    HostCase(
        name="diffusers/pixart",
        family="diffusers",
        build=make_class(
            "PixArtTransformer2DModel",
            **HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=4,
            cross_attention_dim=48,
            caption_channels=TEXT_WIDTH,
            sample_size=12,
            use_additional_conditions=False,
        ),
        inputs=give_pixart,
        cells=CELLS,
        output=read_sample,
        containers=("transformer_blocks",),
        notes="cross-attention to masked text",
    ),
    HostCase(
        name="diffusers/sd3",
        family="diffusers",
        build=make_class("SD3Transformer2DModel", **SD3),
        inputs=give_sd3,
        cells=CELLS,
        output=read_sample,
        containers=("transformer_blocks",),
        notes="text beside the image; the last block returns no text",
    ),
    HostCase(
        name="diffusers/sd3.5",
        family="diffusers",
        build=make_class(
            "SD3Transformer2DModel", **SD3, dual_attention_layers=(0, 1), qk_norm="rms_norm"
        ),
        inputs=give_sd3,
        cells=CELLS,
        output=read_sample,
        containers=("transformer_blocks",),
        notes="two blocks with a second attention over the image only",
    ),
    HostCase(
        name="diffusers/flux",
        family="diffusers",
        build=make_class("FluxTransformer2DModel", **FLUX, guidance_embeds=True),
        inputs=give_flux,
        cells=CELLS,
        output=read_sample,
        containers=FLUX_LISTS,
        shared=FLUX_SHARED,
        tokenwise=("image_rotary_emb",),
        notes="two lists in a row, rotation without a batch axis, guidance embedded",
    ),
    HostCase(
        name="diffusers/flux-schnell",
        family="diffusers",
        build=make_class("FluxTransformer2DModel", **FLUX, guidance_embeds=False),
        inputs=give_flux,
        cells=CELLS,
        output=read_sample,
        containers=FLUX_LISTS,
        shared=FLUX_SHARED,
        tokenwise=("image_rotary_emb",),
        notes="the same without guidance",
    ),
    HostCase(
        name="diffusers/z_image",
        family="diffusers",
        build=make_class(
            "ZImageTransformer2DModel",
            in_channels=4,
            dim=48,
            n_layers=4,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[8, 8, 8],
            axes_lens=[256, 32, 32],
        ),
        inputs=give_z_image,
        cells=CELLS,
        output=read_sample,
        containers=("layers",),
        after=(64 - 35) + 64,
        tokenwise=(1, 2),
        notes="one sequence of image and text, each padded to 32s, then to the longest",
    ),
    HostCase(
        name="diffusers/wan",
        family="diffusers",
        build=make_class("WanTransformer3DModel", **WAN),
        inputs=give_wan,
        cells=(2, 4, 5),
        output=read_sample,
        containers=("blocks",),
        tokenwise=(3,),
        notes="video grid, rotation, cross-attention",
    ),
    HostCase(
        name="diffusers/wan2.2",
        family="diffusers",
        build=make_class("WanTransformer3DModel", **WAN),
        inputs=give_wan_per_token,
        cells=(2, 4, 5),
        output=read_sample,
        containers=("blocks",),
        tokenwise=(2, 3),
        notes="modulation per token",
    ),
)
