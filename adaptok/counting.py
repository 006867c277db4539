"""Floating-point operations of anything that runs, counted while it runs."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def count_attention(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> int:
    """Count `softmax(q k) v`; shapes are `(b heads n e)`, keys and values may have fewer heads."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


# What PyTorch's counter passes over: attention on a CPU is one operation that it has no formula for
# (with dropout it falls apart into products, which are seen).
UNSEEN = {
    aten._scaled_dot_product_flash_attention_for_cpu: count_attention,
    aten._scaled_dot_product_fused_attention_overrideable: count_attention,
}


def make_counter() -> FlopCounterMode:
    """Return PyTorch's counter with formulas for what it passes over.

    It sees matrix products, convolutions and attention, by the lengths that really run, and
    neither norms nor elementwise work.

    Example:
        >>> q = torch.ones(2, 4, 10, 16)
        >>> with make_counter() as counter:
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> counter.get_total_flops() == 2 * 4 * (2 * 10 * 10 * (16 + 16))
        True
    """
    return FlopCounterMode(display=False, custom_mapping=UNSEEN)


@contextmanager
def count_operations() -> Iterator[FlopCounterMode]:
    """Count the operations of the calls inside a `with` block, in eager mode.

    What is compiled runs uncompiled here, and PyTorch's own transformer layers without their
    fused form: both are closed boxes to the counter.

    Yields:
        The counter; take `get_total_flops()` at the end.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 32, batch_first=True).eval()
        >>> with torch.no_grad(), count_operations() as counter:
        ...     out = layer(torch.ones(1, 5, 8))
        >>> counter.get_total_flops() == 2 * 5 * (4 * 8 * 8 + 2 * 8 * 32) + 2 * 2 * 5 * 5 * (4 + 4)
        True
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    counter = make_counter()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            # the counter's hooks; they fire twice on the shell of a compiled model, which counts
            # nothing itself
            warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)`")
            with counter:
                yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
