"""Sharded training: each process holds a part of the weights, averages and moments."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from adaptok.dc.blocks import DiTBlock
from adaptok.dc.scaffold import ConvBlock
from adaptok.errors import ConfigError

if TYPE_CHECKING:  # takes most of a second, which a run that shards nothing does not wait
    from torch.distributed.tensor import DTensor

UNITS = (DiTBlock, ConvBlock)
YES = ("y", "yes", "t", "true", "on", "1")
REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "to keep the weights in host memory: leave --fsdp_offload_params out",
    "FSDP_ACTIVATION_CHECKPOINTING": "to compute activations again: leave "
    "--fsdp_activation_checkpointing out and set gradient_checkpointing of the model",
}


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a model is cut into parts, one for each process.

    Args:
        reshard: give whole weights back behind the forward pass of a block, and collect them again
            for its gradient. Saves memory, and costs a third collection.
    """

    reshard: bool = True


def read_sharding(environment: Mapping[str, str]) -> Sharding | None:
    """Read what `accelerate launch --use_fsdp --fsdp_version 2` asks for.

    Which parts are units is not the launcher's to say, and neither is the precision: a run must
    not change with the way it is started.

    Args:
        environment: variables that the launcher set.

    Returns:
        How to shard; None where the launcher does not ask for it.

    Raises:
        ConfigError: it asks for something else than the weights of each block in parts.

    Example:
        >>> read_sharding({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
        Sharding(reshard=True)
    """

    def says_yes(name: str, default: str = "false") -> bool:
        return environment.get(name, default).lower() in YES

    if not says_yes("ACCELERATE_USE_FSDP"):
        return None
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(
            f"the launcher asks for FSDP {version}, which joins weights of several layers, so that "
            "no checkpoint fits another number of processes: start with --fsdp_version 2"
        )
    for name, advice in REFUSED.items():
        if says_yes(name):
            raise ConfigError(f"the launcher asks {advice}")
    return Sharding(reshard=says_yes("FSDP_RESHARD_AFTER_FORWARD", "true"))


def shard_model(model: nn.Module, device: torch.device, sharding: Sharding) -> None:
    """Leave each process its part of the weights of a model, in place.

    DiT blocks and the conv blocks of encoder and decoder are collected one by one; all else
    (embedders, router, dechunker, norms) is collected once per step. Weights stay float32,
    whatever the precision of the run.

    Args:
        model: the model, with the same weights in all processes.
        device: of this process; weights elsewhere are moved there block by block.
        sharding: how to shard.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # It says what must not be done with a view that a model returns; the loss only reads it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in model.modules():
        if isinstance(module, UNITS):
            fully_shard(module, mesh=mesh, reshard_after_forward=sharding.reshard)
    # Its weights are needed first in the backward pass, and what the router says is no plain
    # tensor, so that its gradient would not call for them.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Say whether a tensor is a part of a larger one."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor; it shares the memory."""
    with torch.no_grad():
        return tensor.to_local() if is_sharded(tensor) else tensor


def gather_whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole, in every process; all processes must call it alike."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gather_state(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Collect tensors of which each process holds a part; all processes must call it alike.

    Args:
        tensors: sharded or whole ones by name.
        keep: whether this process wants them.

    Returns:
        Whole tensors by name, sharded ones on the CPU: one at a time is whole on the device.
        Empty where they are not kept.
    """
    found = {}
    for name, tensor in tensors.items():
        whole = gather_whole(tensor.detach())
        if keep:
            found[name] = whole.cpu() if is_sharded(tensor) else whole
    return found


def shard_like(whole: Tensor, example: Tensor) -> Tensor:
    """Return this process's part of a tensor, or the tensor where the example is no part.

    Args:
        whole: a tensor that all processes have.
        example: sharded as the result shall be.

    Returns:
        The tensor, sharded like the example and on its device.
    """
    if not is_sharded(example):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh = example.device_mesh
    return distribute_tensor(whole.to(example.device), mesh, example.placements, src_data_rank=None)
