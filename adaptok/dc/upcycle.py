"""Upcycling: the blocks of a pretrained fixed-patch DiT inside the scaffold of DC-DiT."""

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adaptok.chunking import Layout
from adaptok.dc.config import DCDiTConfig
from adaptok.dc.host_dit import HostDiT, read_host
from adaptok.dc.model import DCDiT
from adaptok.errors import UnsupportedModelError

BLOCK_TOLERANCE = 1e-4  # relative; norms of other epsilons stay below, another GELU does not


def upcycle(
    dit: nn.Module,
    *,
    latent_size: int | tuple[int, int] | None = None,
    layout: Layout = "packed",
    target: float | None = None,
    dechunk_sigma: float = 1.0,
    narrowing: int = 4,
) -> DCDiT:
    """Put the blocks of a pretrained DiT into the scaffold of DC-DiT, at patch size 1.

    Blocks and embedders of time and label are copied; the embedders stay as they are in
    training, and a LayerNorm adapts the condition for encoder, decoder and final layer. These,
    the router and the dechunker are new and know nothing: distil them (`adaptok distill`), then
    fine-tune the whole. Position codes are those of the host, at the places of the cells inside
    the patches. To save tokens inside the host's own grid, without training, use `adaptok.wrap`.

    Args:
        dit: a DiT in the layout of its research code (`x_embedder`, `t_embedder`,
            `y_embedder`, `blocks`, `final_layer`), `adaptok.dc.baseline.DiT`, or diffusers'
            `DiTTransformer2DModel`; it is not changed.
        latent_size: height and width of a latent in cells; None takes the host's.
        layout: how kept tokens are run: `"packed"`, `"bucketed"` or `"fixed"`.
        target: compression that the ratio loss pulls to; None means as many tokens as the host
            has, the square of its patch size.
        dechunk_sigma: width of the smoothing in cells.
        narrowing: how much narrower encoder and decoder are than the blocks.

    Returns:
        A new model in float32 on the host's device.

    Raises:
        UnsupportedModelError: the host is of another layout, or a part of it does not compute what
            a part of DC-DiT computes; the message names it.
        ConfigError: its sizes do not fit the scaffold.

    Example:
        >>> from adaptok.dc.baseline import DiT
        >>> from adaptok.dc.config import DiTConfig
        >>> host = DiT(DiTConfig(hidden_size=64, depth=2, num_heads=4, latent_size=8))
        >>> model = upcycle(host)
        >>> model(torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.tensor([3])).shape
        torch.Size([1, 8, 8, 8])
        >>> torch.equal(model.backbone.blocks[0].mlp.fc1.weight, host.blocks[0].mlp.fc1.weight)
        True

    Paper: DC-DiT, arXiv 2603.06351.
    """
    host = read_host(dit)
    model = DCDiT(plan_config(host, latent_size, layout, target, dechunk_sigma, narrowing))
    take_over(model, host)
    model.to(host.patch_embed.weight.device)
    check_blocks(model, host)
    return model


def plan_config(
    host: HostDiT,
    latent_size: int | tuple[int, int] | None,
    layout: Layout,
    target: float | None,
    dechunk_sigma: float,
    narrowing: int,
) -> DCDiTConfig:
    """Return the options of the model around a host's blocks (see `upcycle`)."""
    channels, p = host.patch_embed.in_channels, host.patch_size
    if host.head_width not in (p**2 * channels, 2 * p**2 * channels):
        raise UnsupportedModelError(
            f"the final layer gives {host.head_width} numbers for a patch of {p} x {p} cells of "
            f"{channels} channels: {p**2 * channels} are needed, or twice as many with a learned "
            "variance"
        )
    size = (host.grid[0] * p, host.grid[1] * p) if latent_size is None else latent_size
    return DCDiTConfig(
        hidden_size=host.width,
        depth=len(host.blocks),
        num_heads=host.num_heads,
        latent_size=size,
        in_channels=channels,
        num_classes=host.labels.shape[0] - 1,
        learn_sigma=host.head_width == 2 * p**2 * channels,
        narrowing=narrowing,
        dechunk_sigma=dechunk_sigma,
        target=max(float(p**2), 2.0) if target is None else target,
        layout=layout,
        position_cells=p,
        frequency_shift=1 if host.frequency_shift else 0,
        condition_norm=True,
        train_embedders=False,
    )


def take_over(model: DCDiT, host: HostDiT) -> None:
    """Copy blocks and embedders of a host into a model around them."""
    model.timestep_embedder.mlp.load_state_dict(dict(host.time_weights))
    model.label_embedder.table.load_state_dict({"weight": host.labels})
    for number, (block, theirs) in enumerate(zip(model.backbone.blocks, host.blocks, strict=True)):
        state = rename_block(theirs.state_dict(), host.renames)
        needed = block.state_dict()
        problems = [f"no {name}" for name in sorted(needed.keys() - state.keys())]
        problems += [f"{name} is unknown" for name in sorted(state.keys() - needed.keys())]
        problems += [
            f"{name} has the shape {tuple(state[name].shape)} instead of {tuple(value.shape)}"
            for name, value in needed.items()
            if name in state and state[name].shape != value.shape
        ]
        if problems:
            raise UnsupportedModelError(
                f"block {number} ({type(theirs).__name__}) is no block of DiT: "
                f"{'; '.join(problems[:4])}"
            )
        block.load_state_dict(state)


def rename_block(
    state: Mapping[str, Tensor], renames: tuple[tuple[str, str], ...]
) -> dict[str, Tensor]:
    """Give the weights of a host's block the names that they have here.

    Queries, keys and values that come apart are joined; the embedders that each block of
    diffusers has are left out.
    """
    named = {}
    for name, value in state.items():
        if name.startswith("norm1.emb."):
            continue
        for old, new in renames:
            name = re.sub(f"^{re.escape(old)}", new, name)
        named[name] = value
    for kind in ("weight", "bias"):
        parts = [f"attn1.to_{letter}.{kind}" for letter in "qkv"]
        if all(part in named for part in parts):
            named[f"attn.qkv.{kind}"] = torch.cat([named.pop(part) for part in parts])
    return named


def check_blocks(model: DCDiT, host: HostDiT) -> None:
    """Raise unless each block here gives what the host's gives, its condition included."""
    device = host.patch_embed.weight.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, host.width, generator=generator).to(device)
    t = torch.tensor([20, 801], device=device)
    y = torch.tensor([0, host.labels.shape[0] - 1], device=device)
    whole = nn.ModuleList([host.model])  # one name for all modes
    modes = {module: module.training for module in whole.modules()}
    host.model.eval()
    try:
        with torch.no_grad():
            condition = model.timestep_embedder(t) + model.label_embedder(y)
            for number, (block, theirs) in enumerate(
                zip(model.backbone.blocks, host.blocks, strict=True)
            ):
                expected = host.run_block(copy.deepcopy(theirs).float(), x, t, y).float()
                found = block(x, condition)
                error = float((found - expected).abs().max() / expected.abs().max())
                if not error <= BLOCK_TOLERANCE:
                    raise UnsupportedModelError(
                        f"with the same weights, block {number} ({type(theirs).__name__}) gives "
                        f"something else than a block of DC-DiT (relative error {error:.2g}): its "
                        "activation, norms or condition are others"
                    )
    finally:
        for module, mode in modes.items():
            module.training = mode
