"""Flux of diffusers: two lists of blocks in a row, the grid in position ids that all share."""

import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
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
from adaptok.backbones.diffusers_sd3 import run_joint_block
from adaptok.calls import BlockCall, HostNumbers, TokenInput
from adaptok.errors import HandOverError, HostOptionError, ShapeError
from adaptok.hosts import HostInputs, bind_arguments
from adaptok.tokens import Grid

BLOCK = (
    "hidden_states",
    "encoder_hidden_states",
    "temb",
    "image_rotary_emb",
    "joint_attention_kwargs",
)
ROTARY = ("cos", "sin")
CONTROLNET = "run a controlnet with the unwrapped model"


class DiffusersFlux(DiffusersHost):
    """Adapter of `FluxTransformer2DModel`.

    Both lists run as one: their blocks take and give the same. The rotary table has text rows
    first and no batch axis, so that samples that keep different cells run one by one. Steps go
    from 1 (noise) to 0: the pipeline divides its own by 1,000.

    Example:
        >>> from diffusers import FluxTransformer2DModel
        >>> sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_single_layers": 3}
        >>> axes = {"axes_dims_rope": (4, 6, 6)}
        >>> model = FluxTransformer2DModel(**sizes, **axes, num_layers=2, in_channels=16)
        >>> host = DiffusersFlux.match(model)
        >>> host.width, host.depth
        (32, 5)
    """

    name = "diffusers-flux"
    family = "diffusers FluxTransformer2DModel"
    positions_per_sample = False
    branches = ("cond", "uncond")  # in separate calls
    timestep_scale = (1.0, 0.0)
    home = "transformer_flux"
    host = "FluxTransformer2DModel"
    lists = ("transformer_blocks", "single_transformer_blocks")
    parameters = (
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "img_ids",
        "txt_ids",
        "guidance",
        "joint_attention_kwargs",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "return_dict",
        "controlnet_blocks_repeat",
    )
    attention_option = "joint_attention_kwargs"
    refused: ClassVar[Mapping[str, str]] = {
        "controlnet_block_samples": CONTROLNET,
        "controlnet_single_block_samples": CONTROLNET,
    }

    def __init__(
        self, *, containers: tuple[str, ...], width: int, depth: int, grid_axes: int = 2
    ) -> None:
        super().__init__(containers=containers, width=width, depth=depth, grid_axes=grid_axes)
        self.reading: tuple[weakref.ref[Tensor], int, Grid] | None = None
        self.last: dict[int, Grid] = {}  # by number of cells, for graphs that cannot look

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read of a tensor that somebody else holds."""
        return self.__dict__ | {"reading": None}

    def entrances(self, model: nn.Module) -> tuple[str, ...]:
        """Listen to the model itself, and to its cache contexts (see `Backbone.entrances`)."""
        listen_for_contexts(model, self.first_list(model))
        return ("",)

    def find_numbers(self, model: nn.Module, given: dict[str, Any]) -> HostNumbers:
        """Return the grid of the position ids (see `DiffusersHost.find_numbers`)."""
        ids, n = given.get("img_ids"), given["hidden_states"].shape[1]
        if ids is None:
            raise HandOverError("the grid of Flux is in img_ids only, and none came: give them")
        ids = ids[0] if ids.ndim == 3 else ids
        if ids.ndim != 2 or ids.shape[0] != n or ids.shape[1] != 3:
            raise ShapeError(
                f"img_ids are ({n}, 3), image, row and column of each token, got {tuple(ids.shape)}"
            )
        return HostNumbers(self.find_grid(ids), 0, read_branch(self.first_list(model)))

    def find_grid(self, ids: Tensor) -> Grid:
        """Return the grid of position ids, read once while a caller gives the same tensor."""
        if torch.compiler.is_compiling():
            return self.find_traced_grid(ids)
        known, version = self.reading, None if ids.is_inference() else ids._version
        if known is not None and known[0]() is ids and known[1] == version:
            return known[2]
        grid: Grid = read_grid(ids)
        self.last = {ids.shape[0]: grid}
        self.reading = None if version is None else (weakref.ref(ids), version, grid)
        return grid

    def find_traced_grid(self, ids: Tensor) -> Grid:
        """Return the grid that a graph is made for; the graph checks that it stays so."""
        grid: Grid
        if torch.compiler.is_dynamo_compiling():
            grid = read_grid(ids)
        elif ids.shape[0] in self.last:
            grid = self.last[ids.shape[0]]
        else:
            raise HandOverError(
                "the grid of Flux is in the values of img_ids, which are not there while a model "
                "is exported: call the model once on these ids before"
            )
        same = (ids[:, 1:] - ids[:1, 1:] == make_rows(grid, ids)).all()
        torch._assert_async(same, "img_ids of another grid: compile or export again for it")
        return grid

    def read(
        self, numbers: HostNumbers, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> BlockCall:
        """Sort what a block is called with (see `Backbone.read`)."""
        given = bind_arguments(BLOCK, args, kwargs)
        x, text, temb = (given.pop(name) for name in BLOCK[:3])
        check_cells(x, numbers.grid)
        tables = given.pop("image_rotary_emb")
        s = tables[0].shape[0] - x.shape[1]
        return BlockCall(
            x,
            numbers.grid,
            streams={"text": text},
            token_inputs={
                name: TokenInput(table, axes=(0,), start=s, batched=False)
                for name, table in zip(ROTARY, tables, strict=True)
            },
            sample_inputs={"temb": temb},
            shared=given,
            condition=condition_of(temb, x.shape[0]),
            timestep=numbers.spread_timestep(x),
        )

    def run_block(self, block: nn.Module, call: BlockCall) -> BlockCall:
        """Call one block of either list (see `DiffusersHost.run_block`)."""
        tables = tuple(call.token_inputs[name].value for name in ROTARY)
        return run_joint_block(block, call, image_rotary_emb=tables)

    def write(self, call: BlockCall) -> Any:  # noqa: ANN401
        """Return text and image (see `Backbone.write`)."""
        return call.streams["text"], call.x

    def example(self, model: nn.Module) -> HostInputs:
        """Return two packed latents with text (see `Backbone.example`)."""
        config: Any = model.config
        guidance = make_times(model, 1.0, 3.5) if config.guidance_embeds else None
        times = make_times(model, 0.2, 0.7)
        rows = make_rows((4, 6), times)
        return give(
            hidden_states=make_noise(model, 2, 24, config.in_channels),
            encoder_hidden_states=make_noise(model, 2, 5, config.joint_attention_dim, seed=1),
            pooled_projections=make_noise(model, 2, config.pooled_projection_dim, seed=2),
            timestep=times,
            img_ids=torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1),
            txt_ids=torch.zeros(5, 3, device=times.device),
            guidance=guidance,
        )


def make_rows(grid: Grid, like: Tensor) -> Tensor:
    """Return row and column of each cell of a grid, `(n 2)`, on the device of a tensor."""
    h, w = grid
    options = {"device": like.device, "dtype": like.dtype}
    return torch.cartesian_prod(torch.arange(h, **options), torch.arange(w, **options))  # type: ignore[call-overload]


# In a graph the answer is a constant, and the graph checks it (see `find_traced_grid`).
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def read_grid(ids: Tensor) -> Grid:
    """Return the grid that position ids describe.

    Args:
        ids: image, row and column of each token, `(n 3)`.

    Returns:
        Rows and columns.

    Raises:
        HostOptionError: there are several images, or the ids are no grid, row by row.
    """
    values = ids.detach().to("cpu", torch.float64)
    if not bool((values[:, 0] == values[0, 0]).all()):
        raise HostOptionError(
            "img_ids put several images into one sequence, as Flux Kontext does with the image to "
            "change: only a sequence of one image is supported, unwrap the model"
        )
    places = values[:, 1:] - values[:1, 1:]
    if bool(places.isfinite().all()):
        h, w = (int(length) + 1 for length in places.amax(0).tolist())
        if h * w == len(ids) and torch.equal(places, make_rows((h, w), places)):
            return (h, w)
    raise HostOptionError(
        "img_ids are not the rows and columns of one grid, row by row: the cells of the image "
        "have no known places. Half precision rounds ids above 256 in bfloat16; give float32"
    )
