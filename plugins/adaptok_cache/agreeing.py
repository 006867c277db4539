"""Agreeing: processes that run one model together compute the same samples."""

from collections.abc import Sequence

import torch
from torch import distributed


def agree_on(compute: Sequence[bool], device: torch.device) -> list[bool]:
    """Return which samples are computed by any process, by one all-reduce of all of them.

    Args:
        compute: which samples this process has to compute.
        device: where the model runs; the reduction runs there too.

    Returns:
        Which samples every process computes; without other processes, the same.

    Example:
        >>> agree_on([True, False], torch.device("cpu"))
        [True, False]
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(compute)
    flags = torch.tensor(compute, dtype=torch.int32, device=device)
    distributed.all_reduce(flags, op=distributed.ReduceOp.MAX)
    return [flag > 0 for flag in flags.tolist()]
