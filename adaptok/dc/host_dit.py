"""What is read off a pretrained fixed-patch DiT, so that its blocks can be used elsewhere."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.blocks import find_adaptive
from adaptok.dc.checkpoint import POSITION_TOLERANCE
from adaptok.dc.position import encode_grid
from adaptok.errors import UnsupportedModelError

RunBlock = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

# (name there, name here), matched anywhere in the name of a weight
FACEBOOK_BLOCK = (("adaLN_modulation.", "modulation."),)
DIFFUSERS_BLOCK = (
    ("norm1.linear.", "modulation.1."),
    ("attn1.to_out.0.", "attn.proj."),
    ("ff.net.0.proj.", "mlp.fc1."),
    ("ff.net.2.", "mlp.fc2."),
)


@dataclass(frozen=True, slots=True, eq=False)
class HostDiT:
    """What is read off a fixed-patch DiT.

    Args:
        model: the host.
        patch_embed: the convolution that makes tokens of patches.
        blocks: its blocks.
        num_heads: heads of their attention.
        positions: its table of position codes, `(m d)`.
        grid: patches per column and row.
        time_weights: weights of the two layers that embed time, by their names here.
        labels: vectors of the classes, the null class last, `(k d)`.
        head_width: numbers that its final layer gives for a patch.
        renames: names of the weights of a block there and here.
        run_block: runs a block on tokens, time and label.
        frequency_shift: see `DCDiTConfig`.
    """

    model: nn.Module
    patch_embed: nn.Conv2d
    blocks: tuple[nn.Module, ...]
    num_heads: int
    positions: Float[Tensor, "m d"]
    grid: tuple[int, int]
    time_weights: Mapping[str, Tensor]
    labels: Float[Tensor, "k d"]
    head_width: int
    renames: tuple[tuple[str, str], ...]
    run_block: RunBlock
    frequency_shift: int = 0

    @property
    def patch_size(self) -> int:
        """Cells per side of a patch."""
        return int(self.patch_embed.kernel_size[0])

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.patch_embed.out_channels

    @property
    def out_channels(self) -> int:
        """Channels of its output."""
        return self.head_width // self.patch_size**2


def read_host(dit: nn.Module) -> HostDiT:
    """Read a fixed-patch DiT.

    Args:
        dit: the model (see `upcycle`).

    Returns:
        Its parts; tensors are its own and not copied.

    Raises:
        UnsupportedModelError: it is of another layout.
    """
    if not isinstance(dit, nn.Module):
        raise UnsupportedModelError(
            f"upcycle takes a torch.nn.Module, got a {type(dit).__name__}: of a pipeline take its "
            "transformer"
        )
    if find_adaptive(dit) is not None:
        raise UnsupportedModelError("this DiT is wrapped: call adaptok.unwrap(dit) first")
    if hasattr(dit, "transformer_blocks"):
        return read_diffusers(dit)
    return read_facebook(dit)


def read_facebook(dit: nn.Module) -> HostDiT:
    """Read a DiT in the layout of its research code (see `read_host`)."""
    blocks = find_blocks(dit, "blocks")
    patch_embed = find_patch_embed(dit, "x_embedder")
    table = find_table(dit, "y_embedder")
    check_null_class(table, getattr(dit.get_submodule("y_embedder"), "num_classes", None))
    positions = find_positions(getattr(dit, "pos_embed", None))
    time = named_weights(find_part(dit, "t_embedder.mlp"), {"0": "0", "2": "2"}, "t_embedder.mlp")
    embedder = dit.get_submodule("t_embedder")

    def run_block(block: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        exact = copy.deepcopy(embedder).float()  # as the weights that are taken over
        out: Tensor = block(x, exact(t).to(x.dtype) + table[y].to(x.dtype))
        return out

    return HostDiT(
        model=dit,
        patch_embed=patch_embed,
        blocks=blocks,
        num_heads=find_heads(blocks[0], "attn", "num_heads"),
        positions=positions,
        grid=find_grid(dit, positions, patch_embed),
        time_weights=time,
        labels=table,
        head_width=find_linear(dit, "final_layer.linear").out_features,
        renames=FACEBOOK_BLOCK,
        run_block=run_block,
    )


def read_diffusers(dit: nn.Module) -> HostDiT:
    """Read diffusers' `DiTTransformer2DModel` (see `read_host`)."""
    blocks = find_blocks(dit, "transformer_blocks")
    find_part(dit, "transformer_blocks.0.norm1.emb.timestep_embedder")
    embedders = [block.get_submodule("norm1.emb") for block in blocks]
    first = embedders[0].state_dict()
    for number, embedder in enumerate(embedders):
        if any(
            not torch.equal(value, first[name]) for name, value in embedder.state_dict().items()
        ):
            raise UnsupportedModelError(
                f"block {number} embeds time and label otherwise than block 0, and DC-DiT has one "
                "condition for all blocks: this DiT cannot be upcycled"
            )
    patch_embed = find_patch_embed(dit, "pos_embed")
    positions = find_positions(dit.get_submodule("pos_embed").pos_embed)
    time = named_weights(
        embedders[0].get_submodule("timestep_embedder"),
        {"linear_1": "0", "linear_2": "2"},
        "norm1.emb.timestep_embedder",
    )
    table = find_table(embedders[0], "class_embedder")
    check_null_class(table, getattr(embedders[0].get_submodule("class_embedder"), "num_classes", 0))

    def run_block(block: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = block(x, timestep=t, class_labels=y)
        return out

    return HostDiT(
        model=dit,
        patch_embed=patch_embed,
        blocks=blocks,
        num_heads=find_heads(blocks[0], "attn1", "heads"),
        positions=positions,
        grid=find_grid(dit, positions, patch_embed),
        time_weights=time,
        labels=table,
        head_width=find_linear(dit, "proj_out_2").out_features,
        renames=DIFFUSERS_BLOCK,
        run_block=run_block,
        frequency_shift=1,
    )


def find_part(dit: nn.Module, path: str) -> nn.Module:
    """Return a submodule, or raise an error that names it."""
    try:
        return dit.get_submodule(path)
    except AttributeError:
        raise UnsupportedModelError(
            f"{type(dit).__name__} has no {path}: upcycle takes a DiT in the layout of its "
            "research code, adaptok.dc.baseline.DiT, or diffusers' DiTTransformer2DModel"
        ) from None


def find_blocks(dit: nn.Module, path: str) -> tuple[nn.Module, ...]:
    """Return the blocks of a host."""
    blocks = tuple(find_part(dit, path).children())
    if not blocks:
        raise UnsupportedModelError(f"{path} of {type(dit).__name__} has no block")
    return blocks


def find_linear(dit: nn.Module, path: str) -> nn.Linear:
    """Return a linear layer of a host."""
    layer = find_part(dit, path)
    if not isinstance(layer, nn.Linear):
        raise UnsupportedModelError(f"{path} is a {type(layer).__name__}: a Linear is needed")
    return layer


def find_patch_embed(dit: nn.Module, path: str) -> nn.Conv2d:
    """Return the convolution that cuts patches."""
    layers = [layer for layer in find_part(dit, path).modules() if isinstance(layer, nn.Conv2d)]
    if len(layers) != 1:
        raise UnsupportedModelError(f"{path} has {len(layers)} convolutions, and one is needed")
    layer = layers[0]
    if layer.kernel_size != layer.stride or len(set(layer.kernel_size)) != 1:
        raise UnsupportedModelError(
            f"{path} has a kernel of {layer.kernel_size} and a stride of {layer.stride}: square "
            "patches that do not overlap are needed"
        )
    return layer


def find_table(module: nn.Module, path: str) -> Tensor:
    """Return the vectors of the classes."""
    tables = [part for part in find_part(module, path).modules() if isinstance(part, nn.Embedding)]
    if len(tables) != 1:
        raise UnsupportedModelError(
            f"{path} has {len(tables)} tables of classes, and one is needed: models that take text "
            "instead of a class cannot be upcycled"
        )
    return tables[0].weight.detach()


def check_null_class(table: Tensor, num_classes: object) -> None:
    """Raise unless the table of classes has a last row for no class."""
    if isinstance(num_classes, int) and table.shape[0] != num_classes + 1:
        raise UnsupportedModelError(
            f"the table of classes has {table.shape[0]} rows for {num_classes} classes: one more, "
            "for no class, is needed (train the DiT with class dropout)"
        )


def find_positions(table: object) -> Tensor:
    """Return the table of position codes."""
    if not isinstance(table, Tensor) or table.ndim != 3:
        raise UnsupportedModelError(
            "no table of position codes (pos_embed) was found: models with rotary or without "
            "positions cannot be upcycled"
        )
    return table.detach()[0].float()


def find_grid(dit: nn.Module, positions: Tensor, patch_embed: nn.Conv2d) -> tuple[int, int]:
    """Return the patches per column and row, for which the position codes are the fixed ones."""
    m, d = positions.shape
    side = math.isqrt(m)
    known = getattr(getattr(dit, "config", None), "grid", None)
    p = patch_embed.kernel_size[0]
    grid = (known[0] // p, known[1] // p) if isinstance(known, tuple) else (side, side)
    if math.prod(grid) != m or d % 4:
        raise UnsupportedModelError(f"{m} position codes of {d} features fit no grid of patches")
    codes = encode_grid(grid, d, positions.device)
    if not torch.allclose(positions, codes, atol=POSITION_TOLERANCE):
        raise UnsupportedModelError(
            "the position codes are not the fixed sine-cosine table of DiT, so that codes between "
            "the patches are not known: this DiT cannot be upcycled"
        )
    return grid


def find_heads(block: nn.Module, path: str, name: str) -> int:
    """Return the heads of a block's attention."""
    heads = getattr(find_part(block, path), name, None)
    if not isinstance(heads, int):
        raise UnsupportedModelError(f"{path} of {type(block).__name__} does not say its {name}")
    return heads


def named_weights(module: nn.Module, names: Mapping[str, str], path: str) -> dict[str, Tensor]:
    """Return the weights of two linear layers by the names that they have here."""
    weights = {}
    for there, here in names.items():
        layer = find_linear(module, there)
        weights[f"{here}.weight"] = layer.weight.detach()
        if layer.bias is None:
            raise UnsupportedModelError(f"{path}.{there} has no bias, and one is needed")
        weights[f"{here}.bias"] = layer.bias.detach()
    return weights
