"""Wan of diffusers: video, with cross-attention to text."""

from typing import Any

from torch import Tensor, nn

from adaptok.backbones.diffusers_contexts import listen_for_contexts, read_branch
from adaptok.backbones.diffusers_host import DiffusersHost
from adaptok.backbones.diffusers_inputs import (
    check_cells,
    condition_of,
    give,
    make_noise,
    make_times,
)
from adaptok.calls import BlockCall, HostNumbers, TokenInput
from adaptok.errors import HandOverError
from adaptok.hosts import HostInputs, bind_arguments

BLOCK = ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb")
ROTARY = ("cos", "sin")
TEXT_BEHIND_IMAGE = 512  # what its attention counts on where image features precede the text
IMAGE_FEATURES = 257


class DiffusersWan(DiffusersHost):
    """Adapter of `WanTransformer3DModel`, Wan 2.1 and 2.2.

    The grid is that of the video, `(f, h, w)`. Rotations are gathered, and so is the modulation
    where each token has a timestep of its own. Steps go from 1,000 (noise) to 0; where they are
    per token, a sample's is its largest: what the other tokens have is given already.

    Example:
        >>> from diffusers import WanTransformer3DModel
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
        >>> widths = {"in_channels": 4, "out_channels": 4, "text_dim": 8, "ffn_dim": 64}
        >>> host = DiffusersWan.match(WanTransformer3DModel(**sizes, **widths))
        >>> host.width, host.depth, host.grid_axes
        (32, 2, 3)

    Paper: Wan, arXiv 2503.20314.
    """

    name = "diffusers-wan"
    family = "diffusers WanTransformer3DModel"
    branches = ("cond", "uncond")  # in separate calls
    timestep_scale = (1000.0, 0.0)
    home = "transformer_wan"
    host = "WanTransformer3DModel"
    lists = ("blocks",)
    parameters = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_hidden_states_image",
        "return_dict",
        "attention_kwargs",
    )
    attention_option = "attention_kwargs"
    axes = 3

    @classmethod
    def find_width(cls, model: nn.Module) -> int:
        """Return the features of a token (see `DiffusersHost.find_width`)."""
        config: Any = model.config
        return int(config.num_attention_heads * config.attention_head_dim)

    def entrances(self, model: nn.Module) -> tuple[str, ...]:
        """Listen to the model itself, and to its cache contexts (see `Backbone.entrances`)."""
        listen_for_contexts(model, self.first_list(model))
        return ("",)

    def find_numbers(self, model: nn.Module, given: dict[str, Any]) -> HostNumbers:
        """Return the grid of the video (see `DiffusersHost.find_numbers`)."""
        video: Tensor = given["hidden_states"]
        if video.ndim != 5:
            raise HandOverError(f"videos are (b, c, f, h, w), got the shape {tuple(video.shape)}")
        patch: tuple[int, ...] = model.config.patch_size  # type: ignore[union-attr, assignment]
        sides = zip(video.shape[2:], patch, strict=True)
        grid = tuple(length // side for length, side in sides)
        return HostNumbers(grid, 0, read_branch(self.first_list(model)))

    def find_timestep(self, given: dict[str, Any]) -> Tensor | None:
        """Return the step of each sample, its largest (see `DiffusersHost.find_timestep`)."""
        steps = super().find_timestep(given)
        return steps if steps is None or steps.ndim < 2 else steps.flatten(1).amax(1)

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        given = bind_arguments(BLOCK, args, kwargs)
        x, text, temb, tables = (given[name] for name in BLOCK)
        check_cells(x, numbers.grid)
        inputs = {
            name: TokenInput(table, axes=(1,)) for name, table in zip(ROTARY, tables, strict=True)
        }
        per_sample, condition = {"text": text}, None
        if temb.ndim == 4:  # (b n 6 d): a timestep per token
            inputs["temb"] = TokenInput(temb, axes=(1,))
        else:
            per_sample["temb"] = temb
            condition = condition_of(temb, x.shape[0])
        return BlockCall(
            x,
            numbers.grid,
            token_inputs=inputs,
            sample_inputs=per_sample,
            condition=condition,
            timestep=numbers.spread_timestep(x),
        )

    def run_block(self, block: nn.Module, call: BlockCall) -> BlockCall:
        """Call one block (see `DiffusersHost.run_block`)."""
        inputs = {name: given.value for name, given in call.token_inputs.items()}
        tables = tuple(inputs[name] for name in ROTARY)
        temb = inputs["temb"] if "temb" in inputs else call.sample_inputs["temb"]
        return call.with_x(block(call.x, call.sample_inputs["text"], temb, tables))

    def example(self, model: nn.Module) -> HostInputs:
        """Return two short videos with text, and an image where the model is made for one."""
        config: Any = model.config
        sides = (n * side for n, side in zip((2, 3, 4), config.patch_size, strict=True))
        text, image = 6, None
        if config.image_dim is not None:
            features, images = IMAGE_FEATURES, 2
            if config.pos_embed_seq_len is not None:  # the first and the last frame
                features, images = config.pos_embed_seq_len // 2, 4
            image = make_noise(model, images, features, config.image_dim, seed=2)
        if config.added_kv_proj_dim is not None:
            text = TEXT_BEHIND_IMAGE
        return give(
            hidden_states=make_noise(model, 2, config.in_channels, *sides),
            timestep=make_times(model, 200.0, 700.0),
            encoder_hidden_states=make_noise(model, 2, text, config.text_dim, seed=1),
            encoder_hidden_states_image=image,
        )
