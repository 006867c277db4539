"""Z-Image of diffusers: one sequence of image and text, each padded, per sample."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptok.backbones.diffusers_host import DiffusersHost
from adaptok.backbones.diffusers_inputs import (
    check_cells,
    condition_of,
    make_noise,
    make_times,
    name_halves,
)
from adaptok.calls import BlockCall, HostNumbers, TokenInput
from adaptok.errors import HostOptionError, ShapeError
from adaptok.hosts import HostInputs, bind_arguments
from adaptok.tokens import Grid

BLOCK = ("x", "attn_mask", "freqs_cis", "adaln_input", "noise_mask", "adaln_noisy", "adaln_clean")


class DiffusersZImage(DiffusersHost):
    """Adapter of `ZImageTransformer2DModel` with one image per sample.

    The cells come first in the sequence, then padding, text and padding, whose lengths differ from
    sample to sample; mask and rotations are per sample, and all is gathered alike. Steps go from 0
    (noise) to 1.

    Example:
        >>> from diffusers import ZImageTransformer2DModel
        >>> sizes = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        >>> axes = {"axes_dims": [4, 6, 6], "axes_lens": [64, 8, 8]}
        >>> model = ZImageTransformer2DModel(**sizes, **axes, in_channels=4, cap_feat_dim=8)
        >>> host = DiffusersZImage.match(model)
        >>> host.width, host.depth
        (32, 2)

    Paper: Z-Image, arXiv 2511.22699.
    """

    name = "diffusers-zimage"
    family = "diffusers ZImageTransformer2DModel"
    branches = ("cond", "uncond")
    timestep_scale = (0.0, 1.0)
    timestep_argument = "t"
    home = "transformer_z_image"
    host = "ZImageTransformer2DModel"
    lists = ("layers",)
    parameters = (
        "x",
        "t",
        "cap_feats",
        "return_dict",
        "controlnet_block_samples",
        "siglip_feats",
        "image_noise_mask",
        "patch_size",
        "f_patch_size",
        "joint_attention_kwargs",
    )
    attention_option = "joint_attention_kwargs"
    refused: ClassVar[Mapping[str, str]] = {
        "controlnet_block_samples": "run a controlnet with the unwrapped model"
    }

    @classmethod
    def find_width(cls, model: nn.Module) -> int:
        """Return the features of a token (see `DiffusersHost.find_width`)."""
        return int(model.dim)  # type: ignore[arg-type]

    def find_numbers(self, model: nn.Module, given: dict[str, Any]) -> HostNumbers:
        """Return the grid that all images share (see `DiffusersHost.find_numbers`)."""
        images = given["x"]
        if isinstance(images[0], list):
            raise HostOptionError(
                "Z-Image in omni mode puts several images and their features into one sequence: "
                "only one image per sample is supported, unwrap the model"
            )
        sizes = {tuple(image.shape[1:]) for image in images}
        if len(sizes) > 1:
            raise ShapeError(
                "the images of one call of a wrapped Z-Image have one size, got "
                f"{', '.join(map(str, sorted(sizes)))} (f, h, w): call the model once per size"
            )
        patch, f_patch = given.get("patch_size", 2), given.get("f_patch_size", 1)
        f, h, w = images[0].shape[1:]
        grid: Grid = (f // f_patch, h // patch, w // patch)
        branches = name_halves(self.first_list(model), images, self.branches)
        return HostNumbers(grid[1:] if grid[0] == 1 else grid, 0, branches)

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        given = bind_arguments(BLOCK, args, kwargs)
        x, mask, rotations = (given.pop(name) for name in BLOCK[:3])
        check_cells(x, numbers.grid, exact=False)
        inputs = {"freqs_cis": TokenInput(rotations, axes=(1,))}
        if mask is not None:  # all lengths are equal otherwise
            inputs["attn_mask"] = TokenInput(mask, axes=(1,))
        return BlockCall(
            x,
            numbers.grid,
            token_inputs=inputs,
            sample_inputs={"adaln_input": given["adaln_input"]},
            condition=condition_of(given["adaln_input"], x.shape[0]),
            timestep=numbers.spread_timestep(x),
        )

    def run_block(self, block: nn.Module, call: BlockCall) -> BlockCall:
        """Call one block (see `DiffusersHost.run_block`)."""
        inputs = {name: given.value for name, given in call.token_inputs.items()}
        x = block(
            call.x,
            inputs.get("attn_mask"),
            inputs["freqs_cis"],
            call.sample_inputs["adaln_input"],
        )
        return call.with_x(x)

    def example(self, model: nn.Module) -> HostInputs:
        """Return two images, and texts that are padded to different lengths."""
        config: Any = model.config
        patch, f_patch = config.all_patch_size[0], config.all_f_patch_size[0]
        size = (config.in_channels, f_patch, 4 * patch, 6 * patch)
        images = list(make_noise(model, 2, *size))
        texts = [make_noise(model, s, config.cap_feat_dim, seed=s) for s in (3, 40)]
        options = {"patch_size": patch, "f_patch_size": f_patch}
        return HostInputs((images, make_times(model, 0.2, 0.7), texts), options)

    def output(self, output: Any) -> Tensor:  # noqa: ANN401
        """Return all images (see `Backbone.output`)."""
        images = output[0] if isinstance(output, tuple) else output.sample
        return torch.stack(list(images))
