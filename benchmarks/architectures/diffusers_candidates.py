"""Further diffusion transformers of diffusers: to be supported later, or refused by name."""

import torch
from torch import Tensor, nn

from .case import BATCH, HostCase, HostInputs, make_noise
from .diffusers_models import (
    CELLS,
    FLUX,
    FLUX_LISTS,
    FLUX_SHARED,
    HEADS,
    POOLED_WIDTH,
    TEXT,
    TEXT_LENGTHS,
    TEXT_WIDTH,
    give_flux,
    make_class,
    make_latents,
    make_packed,
    make_text,
    make_text_mask,
    make_times,
    make_video,
    read_sample,
)

FAMILY = "diffusers-extra"
VIDEO = (2, 3, 5)


def give_lumina2(model: nn.Module) -> HostInputs:
    """Make inputs of Lumina 2: texts of different lengths stand in front of the image."""
    return HostInputs(
        (),
        {
            "hidden_states": make_latents(),
            "timestep": make_times(1e-3),
            "encoder_hidden_states": make_text(),
            "encoder_attention_mask": make_text_mask(),
        },
    )


def give_aura_flow(model: nn.Module) -> HostInputs:
    """Make inputs of AuraFlow."""
    return HostInputs(
        (make_latents(),),
        {"encoder_hidden_states": make_text(), "timestep": make_times(1e-3)},
    )


def give_hunyuan_dit(model: nn.Module) -> HostInputs:
    """Make inputs of Hunyuan-DiT."""
    angles = make_noise(CELLS[0] * CELLS[1], 12, seed=4).repeat_interleave(2, dim=1)
    return HostInputs(
        (make_latents(), make_times()),
        {
            "encoder_hidden_states": make_text(),
            "text_embedding_mask": make_text_mask(),
            "encoder_hidden_states_t5": make_noise(BATCH, TEXT, POOLED_WIDTH, seed=5),
            "text_embedding_mask_t5": make_text_mask(),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        },
    )


def give_chroma(model: nn.Module) -> HostInputs:
    """Make inputs of Chroma."""
    inputs = dict(give_flux(model).kwargs)
    del inputs["pooled_projections"]
    image = torch.ones(BATCH, CELLS[0] * CELLS[1], dtype=torch.bool)
    inputs["attention_mask"] = torch.cat([make_text_mask().bool(), image], dim=1)
    return HostInputs((), inputs)


def give_qwen_image(model: nn.Module) -> HostInputs:
    """Make inputs of Qwen-Image."""
    return HostInputs(
        (),
        {
            "hidden_states": make_packed(),
            "encoder_hidden_states": make_text(),
            "encoder_hidden_states_mask": make_text_mask(),
            "timestep": make_times(1e-3),
            "img_shapes": [[(1, *CELLS)] for _ in range(BATCH)],
        },
    )


def give_sana(model: nn.Module) -> HostInputs:
    """Make inputs of Sana."""
    return HostInputs(
        (make_packed_image(),),
        {
            "encoder_hidden_states": make_text(),
            "timestep": make_times(),
            "encoder_attention_mask": make_text_mask(),
        },
    )


def make_packed_image() -> Tensor:
    """Make latents (b 16 h w) for a patch size of one."""
    return nn.functional.pixel_unshuffle(make_latents(), 2)


def give_cogvideox(model: nn.Module) -> HostInputs:
    """Make inputs of CogVideoX: frames before channels."""
    return HostInputs(
        (make_video(VIDEO).transpose(1, 2),),
        {"encoder_hidden_states": make_text(), "timestep": make_times().long()},
    )


def give_ltx(model: nn.Module) -> HostInputs:
    """Make inputs of LTX: tokens of a video, the grid as numbers."""
    frames, height, width = VIDEO
    packed = nn.functional.pixel_unshuffle(make_video(VIDEO).transpose(1, 2), 2)
    return HostInputs(
        (),
        {
            "hidden_states": packed.permute(0, 1, 3, 4, 2).flatten(1, 3),
            "encoder_hidden_states": make_text(),
            "timestep": make_times(),
            "encoder_attention_mask": make_text_mask(),
            "num_frames": frames,
            "height": height,
            "width": width,
        },
    )


CHROMA = {name: value for name, value in FLUX.items() if name != "pooled_projection_dim"}

CANDIDATE_CASES = (
    HostCase(
        name="diffusers/lumina2",
        family=FAMILY,
        build=make_class(
            "Lumina2Transformer2DModel",
            in_channels=4,
            hidden_size=48,
            num_layers=4,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(64, 32, 32),
            cap_feat_dim=TEXT_WIDTH,
        ),
        inputs=give_lumina2,
        cells=CELLS,
        output=read_sample,
        containers=("layers",),
        prefix=TEXT,
        begins=TEXT_LENGTHS,
        tokenwise=(1, 2),
        notes="one sequence: text, image, padding; the image begins where each text ends",
    ),
    HostCase(
        name="diffusers/aura_flow",
        family=FAMILY,
        build=make_class(
            "AuraFlowTransformer2DModel",
            **HEADS,
            sample_size=16,
            in_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=48,
            pos_embed_max_size=256,
        ),
        inputs=give_aura_flow,
        cells=CELLS,
        output=read_sample,
        containers=("joint_transformer_blocks", "single_transformer_blocks"),
        notes="the host joins text and image between the two lists",
    ),
    HostCase(
        name="diffusers/hunyuan_dit",
        family=FAMILY,
        build=make_class(
            "HunyuanDiT2DModel",
            **HEADS,
            in_channels=4,
            patch_size=2,
            sample_size=16,
            hidden_size=48,
            num_layers=4,
            cross_attention_dim=TEXT_WIDTH,
            cross_attention_dim_t5=POOLED_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
            text_len=TEXT,
            text_len_t5=TEXT,
            use_style_cond_and_image_meta_size=False,
        ),
        inputs=give_hunyuan_dit,
        cells=CELLS,
        output=read_sample,
        containers=("blocks",),
        shared=frozenset({"image_rotary_emb"}),
        tokenwise=("image_rotary_emb",),
        notes="skip connections between blocks, made by the host",
    ),
    HostCase(
        name="diffusers/chroma",
        family=FAMILY,
        build=make_class(
            "ChromaTransformer2DModel",
            **CHROMA,
            approximator_num_channels=16,
            approximator_hidden_dim=48,
            approximator_layers=2,
        ),
        inputs=give_chroma,
        cells=CELLS,
        output=read_sample,
        containers=FLUX_LISTS,
        shared=FLUX_SHARED,
        tokenwise=("image_rotary_emb",),
        notes="another modulation for each block, chosen by the host",
    ),
    HostCase(
        name="diffusers/qwen_image",
        family=FAMILY,
        build=make_class(
            "QwenImageTransformer2DModel",
            **HEADS,
            in_channels=16,
            out_channels=4,
            num_layers=4,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(8, 8, 8),
        ),
        inputs=give_qwen_image,
        cells=CELLS,
        output=read_sample,
        containers=("transformer_blocks",),
        tokenwise=("image_rotary_emb",),
        notes="text beside the image, masked; rotation without a batch axis",
    ),
    HostCase(
        name="diffusers/sana",
        family=FAMILY,
        build=make_class(
            "SanaTransformer2DModel",
            **HEADS,
            in_channels=16,
            out_channels=16,
            num_layers=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=24,
            cross_attention_dim=48,
            caption_channels=TEXT_WIDTH,
            sample_size=8,
        ),
        inputs=give_sana,
        cells=CELLS,
        output=read_sample,
        containers=("transformer_blocks",),
        notes="linear attention and a convolution over the grid in each block",
    ),
    HostCase(
        name="diffusers/cogvideox",
        family=FAMILY,
        build=make_class(
            "CogVideoXTransformer3DModel",
            **HEADS,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=TEXT_WIDTH,
            num_layers=4,
            sample_width=10,
            sample_height=6,
            sample_frames=5,
            max_text_seq_length=TEXT,
        ),
        inputs=give_cogvideox,
        cells=VIDEO,
        output=read_sample,
        containers=("transformer_blocks",),
        notes="video grid; blocks return the image before the text",
    ),
    HostCase(
        name="diffusers/ltx",
        family=FAMILY,
        build=make_class(
            "LTXVideoTransformer3DModel",
            **HEADS,
            in_channels=16,
            out_channels=16,
            cross_attention_dim=48,
            num_layers=4,
            caption_channels=TEXT_WIDTH,
        ),
        inputs=give_ltx,
        cells=VIDEO,
        output=read_sample,
        containers=("transformer_blocks",),
        tokenwise=("image_rotary_emb",),
        notes="video grid, rotation with a batch axis",
    ),
)
