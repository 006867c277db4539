"""A broken twin of a part: what a check must catch, and what may catch it too."""

import copy
from dataclasses import dataclass, field

import torch
from timm.models.vision_transformer import Block
from torch import nn

ALL = frozenset({"*"})


@dataclass(frozen=True)
class Twin:
    """A broken part.

    Args:
        part: what is given to the check function.
        also: the other checks that fail for the same reason; ALL: any may.
        options: further arguments of the check function.
    """

    part: object
    also: frozenset[str] = frozenset()
    options: dict = field(default_factory=dict)


class SharesWeights(nn.Module):
    """A deep copy that uses the weights of the original."""

    def __deepcopy__(self, memo):
        return copy.copy(self)


class HoldsLambda(nn.Module):
    """Cannot be pickled."""

    def __new__(cls, *args, **kwargs):
        made = super().__new__(cls)
        made.__dict__["nothing"] = lambda x: x
        return made


class LosesPrefix(nn.Module):
    """Writes its weights under names of its own."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, "", keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        super()._load_from_state_dict(state_dict, "", *args)


class PatchesTimm(nn.Module):
    """Changes a class of the host for good, a little more in each call."""

    def __call__(self, *args, **kwargs):
        patch_block()
        return super().__call__(*args, **kwargs)


def patch_block():
    known = Block.forward

    def forward(self, x, *args, **kwargs):
        return 1.01 * known(self, x, *args, **kwargs)

    Block.forward = forward


def break_on_a_line(grid):
    """Take the second column, which a line of cells has not."""
    torch.zeros(grid)[..., 1]


def not_a_number_if_alike(x):
    """0, or NaN where all cells of a sample are alike."""
    if x.shape[1] == 1:
        return 0.0
    spread = x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    return 0.0 * (spread / spread).nan_to_num(posinf=0.0, nan=float("nan")).mean()
