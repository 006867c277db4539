"""Stable Diffusion 3 and 3.5 of diffusers: text in a sequence of its own beside the image."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from adaptok.backbones.diffusers_dit import grid_of_latents
from adaptok.backbones.diffusers_host import DiffusersHost
from adaptok.backbones.diffusers_inputs import (
    check_cells,
    condition_of,
    give,
    make_noise,
    make_times,
    name_halves,
)
from adaptok.calls import BlockCall, HostNumbers
from adaptok.hosts import HostInputs, bind_arguments

BLOCK = ("hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs")


class DiffusersSD3(DiffusersHost):
    """Adapter of `SD3Transformer2DModel`.

    Text is a stream of its own, which the last block gives up; positions are added before. Steps
    go from 1,000 (noise) to 0.

    Example:
        >>> from diffusers import SD3Transformer2DModel
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
        >>> text = {"joint_attention_dim": 8, "caption_projection_dim": 32}
        >>> model = SD3Transformer2DModel(**sizes, **text, in_channels=4, pooled_projection_dim=8)
        >>> host = DiffusersSD3.match(model)
        >>> host.width, host.depth
        (32, 2)

    Paper: Stable Diffusion 3, arXiv 2403.03206.
    """

    name = "diffusers-sd3"
    family = "diffusers SD3Transformer2DModel"
    branches = ("uncond", "cond")
    timestep_scale = (1000.0, 0.0)
    home = "transformer_sd3"
    host = "SD3Transformer2DModel"
    lists = ("transformer_blocks",)
    parameters = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "block_controlnet_hidden_states",
        "joint_attention_kwargs",
        "return_dict",
        "skip_layers",
    )
    attention_option = "joint_attention_kwargs"
    refused: ClassVar[Mapping[str, str]] = {
        "block_controlnet_hidden_states": "run a controlnet with the unwrapped model",
        "skip_layers": "leave skip-layer guidance off (skip_guidance_layers=None), or unwrap",
    }

    def find_numbers(self, model: nn.Module, given: dict[str, Any]) -> HostNumbers:
        """Return the grid of the latents (see `DiffusersHost.find_numbers`)."""
        latents = given["hidden_states"]
        grid = grid_of_latents(latents, int(model.config.patch_size))  # type: ignore[union-attr, arg-type]
        return HostNumbers(grid, 0, name_halves(self.first_list(model), latents, self.branches))

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        given = bind_arguments(BLOCK, args, kwargs)
        x, temb = given.pop("hidden_states"), given.pop("temb")
        check_cells(x, numbers.grid)
        return BlockCall(
            x,
            numbers.grid,
            streams={"text": given.pop("encoder_hidden_states")},
            sample_inputs={"temb": temb},
            shared=given,
            condition=condition_of(temb, x.shape[0]),
            timestep=numbers.spread_timestep(x),
        )

    def run_block(self, block: nn.Module, call: BlockCall) -> BlockCall:
        """Call one block (see `DiffusersHost.run_block`)."""
        return run_joint_block(block, call)

    def write(self, call: BlockCall) -> Any:  # noqa: ANN401
        """Return text and image (see `Backbone.write`)."""
        return call.streams["text"], call.x

    def example(self, model: nn.Module) -> HostInputs:
        """Return two latents with text (see `Backbone.example`)."""
        config: Any = model.config
        h, w = (config.patch_size * min(n, config.pos_embed_max_size) for n in (4, 6))
        return give(
            hidden_states=make_noise(model, 2, config.in_channels, h, w),
            encoder_hidden_states=make_noise(model, 2, 5, config.joint_attention_dim, seed=1),
            pooled_projections=make_noise(model, 2, config.pooled_projection_dim, seed=2),
            timestep=make_times(model, 200.0, 700.0),
        )


def run_joint_block(block: nn.Module, call: BlockCall, **further: Any) -> BlockCall:  # noqa: ANN401
    """Call a block that takes text beside the image, and gives both back, text first.

    Args:
        block: the block.
        call: what it takes; its stream is the text.
        further: arguments that are gathered.

    Returns:
        The call with both.
    """
    text, x = block(
        hidden_states=call.x,
        encoder_hidden_states=call.streams["text"],
        **call.sample_inputs,
        **further,
        **call.shared,
    )
    return replace(call, x=x, streams={"text": text})
