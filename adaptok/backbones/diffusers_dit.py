"""DiT of diffusers: class-conditional, each block embeds time and class by itself."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptok.backbones.diffusers_host import DiffusersHost
from adaptok.backbones.diffusers_inputs import (
    check_cells,
    condition_of,
    give,
    make_noise,
    make_times,
    name_halves,
)
from adaptok.calls import BlockCall, HostNumbers, TokenInput
from adaptok.errors import HandOverError, HostOptionError
from adaptok.hosts import HostInputs, bind_arguments, device_of

BLOCK = (
    "hidden_states",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "timestep",
    "cross_attention_kwargs",
    "class_labels",
)
PER_SAMPLE = ("encoder_hidden_states", "encoder_attention_mask", "timestep", "class_labels")


class DiffusersDiT(DiffusersHost):
    """Adapter of `DiTTransformer2DModel`.

    Positions are added before the blocks; time and class go to each of them, one per sample.
    Steps are whole numbers, from 999 (noise) to 0.

    Example:
        >>> from diffusers import DiTTransformer2DModel
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
        >>> model = DiTTransformer2DModel(**sizes, in_channels=4, sample_size=8)
        >>> host = DiffusersDiT.match(model)
        >>> host.width, host.depth
        (32, 2)

    Paper: DiT, arXiv 2212.09748.
    """

    name = "diffusers-dit"
    family = "diffusers DiTTransformer2DModel"
    branches = ("cond", "uncond")
    timestep_scale = (999.0, 0.0)
    home = "dit_transformer_2d"
    host = "DiTTransformer2DModel"
    lists = ("transformer_blocks",)
    parameters: ClassVar[tuple[str, ...]] = (
        "hidden_states",
        "timestep",
        "class_labels",
        "cross_attention_kwargs",
        "return_dict",
    )
    attention_option = "cross_attention_kwargs"

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
        x, mask = given.pop("hidden_states"), given.pop("attention_mask", None)
        check_cells(x, numbers.grid)
        per_sample = {name: given.pop(name) for name in PER_SAMPLE if given.get(name) is not None}
        timestep = per_sample.get("timestep")
        return BlockCall(
            x,
            numbers.grid,
            token_inputs={} if mask is None else {"attention_mask": bias_of_cells(mask, x)},
            sample_inputs=per_sample,
            shared=given,
            condition=condition_of(timestep, x.shape[0]),
            timestep=numbers.spread_timestep(x),
        )

    def run_block(self, block: nn.Module, call: BlockCall) -> BlockCall:
        """Call one block (see `DiffusersHost.run_block`)."""
        masks = {name: given.value for name, given in call.token_inputs.items()}
        return call.with_x(block(call.x, **call.sample_inputs, **masks, **call.shared))

    def example(self, model: nn.Module) -> HostInputs:
        """Return two latents: the host takes its grid for a square, so the count is one."""
        config: Any = model.config
        h, w = 4 * config.patch_size, 9 * config.patch_size
        return give(
            hidden_states=make_noise(model, 2, config.in_channels, h, w),
            timestep=make_times(model, 200.0, 700.0).long(),
            class_labels=torch.tensor([0, 1], device=device_of(model)),
        )


def grid_of_latents(latents: Tensor, patch: int) -> tuple[int, int]:
    """Return the grid of latents `(b c h w)` that are cut into square patches."""
    if latents.ndim != 4:
        raise HandOverError(f"latents are (b, c, h, w), got the shape {tuple(latents.shape)}")
    return (latents.shape[-2] // patch, latents.shape[-1] // patch)


def bias_of_cells(mask: Tensor, x: Tensor) -> TokenInput:
    """Return a bias on self-attention as an input with cells along its last axis.

    Args:
        mask: `(b 1 n)` or `(b n n)`.
        x: the cells, `(b n d)`.

    Raises:
        HostOptionError: it has another shape.
    """
    b, n = x.shape[:2]
    allowed = {(samples, rows, n) for samples in (1, b) for rows in (1, n)}
    if tuple(mask.shape) not in allowed:
        raise HostOptionError(
            f"an attention_mask over {n} cells is (b, n), (b, 1, n) or (b, n, n), got the shape "
            f"{tuple(mask.shape)}: it is not known which of its rows belong to which cell"
        )
    return TokenInput(mask, axes=(1, 2))
