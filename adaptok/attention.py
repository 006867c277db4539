"""Attention over packed tokens: no token sees another sample.

Three rungs compute the same: `varlen` (PyTorch's own variable-length kernel: a GPU and half
precision), `padded` (samples of similar length share one masked call: a GPU in float32) and
`loop` (one call per sample: a CPU, and the oracle of the others).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from adaptok import ragged_op
from adaptok.errors import ConfigError, DeviceError, DtypeError, ShapeError

Rung = Literal["varlen", "padded", "loop"]
RUNGS: tuple[Rung, ...] = ("varlen", "padded", "loop")

LENGTH_BUCKET = 64  # lengths that round up to the same multiple share a padded call
FEATURE_STEP = 8  # the variable-length kernel takes head widths that are multiples of it
MOST_FEATURES = 256  # and not more than so many


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Where the samples of a packed run of tokens lie.

    Args:
        batch: sample of each token, `(t)`.
        ptr: where each sample starts, and the end, `(b + 1)`.
        lengths: tokens of each sample, known to the host.
        rung: how attention is computed; None takes the best way that fits.

    Example:
        >>> Ragged(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 3]), (1, 2)).longest
        64
    """

    batch: Int[Tensor, " t"]
    ptr: Int[Tensor, " b_plus_1"]
    lengths: tuple[int, ...]
    rung: Rung | None = None
    longest: int = field(init=False)  # rounded up, so that a compiled kernel sees few values
    sizes: Int[Tensor, " b"] = field(init=False)  # the lengths once more, as a tensor on the host

    def __post_init__(self) -> None:
        longest = -(-max(self.lengths, default=1) // LENGTH_BUCKET) * LENGTH_BUCKET
        object.__setattr__(self, "longest", longest)
        object.__setattr__(self, "sizes", torch.tensor(self.lengths, dtype=torch.long))


def attend_packed(
    q: Float[Tensor, "t heads e"],
    k: Float[Tensor, "t heads e"],
    v: Float[Tensor, "t heads e"],
    ragged: Ragged,
    *,
    key_bias: Float[Tensor, "t heads"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "t heads e"]:
    """Let the tokens of each sample attend to each other.

    Args:
        q: queries of the tokens of all samples, `(t heads e)`.
        k: keys, `(t heads e)`.
        v: values, `(t heads e)`.
        ragged: where the samples lie, and which rung to take.
        key_bias: number added to every logit of a key, `(t heads)`.
        scale: factor of the logits; None means `e ** -0.5`.

    Returns:
        The attended values, `(t heads e)`.

    Raises:
        ShapeError: lengths and tokens do not fit each other.
        DtypeError: `varlen` was asked for in another precision than float16 or bfloat16.
        DeviceError: `varlen` was asked for away from a GPU.
        ConfigError: the rung is unknown.

    Example:
        >>> q = torch.randn(5, 2, 4)
        >>> ragged = Ragged(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 2, 5]), (2, 3))
        >>> attend_packed(q, q, q, ragged).shape
        torch.Size([5, 2, 4])
    """
    if not torch.compiler.is_compiling():  # reading every length would make a graph per batch
        check_ragged(q, k, v, ragged)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rung = choose_rung(q, key_bias) if ragged.rung is None else ragged.rung
    if rung == "varlen":
        return attend_varlen(q, k, v, ragged, key_bias, scale)
    if rung in ragged_op.RUNGS and torch.compiler.is_compiling():
        attended: Tensor = torch.ops.adaptok.attend_ragged(
            q, k, v, ragged.sizes, key_bias, scale, rung
        )
        return attended
    if rung in ragged_op.RUNGS:
        return ragged_op.RUNGS[rung](q, k, v, ragged.lengths, key_bias, scale)
    raise ConfigError(f"rung is one of {', '.join(RUNGS)}, got {rung!r}")


def check_ragged(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> None:
    """Raise a `ShapeError` unless queries, keys, values and lengths fit each other."""
    if q.shape != k.shape or q.shape != v.shape:
        raise ShapeError(
            f"q, k and v need one shape (t, heads, e), got {tuple(q.shape)}, {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )
    lengths, samples = ragged.lengths, ragged.ptr.shape[0] - 1
    if len(lengths) != samples or sum(lengths) != q.shape[0]:
        raise ShapeError(
            f"{len(lengths)} lengths of {sum(lengths)} tokens together came for {samples} "
            f"samples of {q.shape[0]} tokens"
        )


def choose_rung(q: Float[Tensor, "t heads e"], key_bias: Tensor | None = None) -> Rung:
    """Return the best rung for these queries.

    On a CPU one call per sample takes half to four fifths of the time of padding, for few long
    samples and many short ones alike (`benchmarks/attention.py`).
    """
    if not q.is_cuda:
        return "loop"
    features = q.shape[-1] + (key_bias is not None)
    half = q.dtype in (torch.float16, torch.bfloat16)
    return "varlen" if half and features <= MOST_FEATURES else "padded"


def attend_varlen(
    q: Float[Tensor, "t heads e"],
    k: Float[Tensor, "t heads e"],
    v: Float[Tensor, "t heads e"],
    ragged: Ragged,
    key_bias: Float[Tensor, "t heads"] | None,
    scale: float,
) -> Float[Tensor, "t heads e"]:
    """Attend with PyTorch's variable-length kernel (see `attend_packed`).

    The kernel has no bias argument: an additive key bias becomes one more feature, 1 in every
    query and the bias itself in the key. Widths are filled up with zeros to a multiple of 8.
    """
    if not q.is_cuda:
        raise DeviceError(f'rung "varlen" needs a GPU, the tokens lie on {q.device}: use "padded"')
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise DtypeError(
            f'rung "varlen" needs float16 or bfloat16, got {q.dtype}: cast, or use "padded"'
        )
    from torch.nn.attention.varlen import varlen_attn

    e = q.shape[-1]
    if key_bias is not None:
        # q * scale now, so that the bias column is not scaled
        q = torch.cat([q * scale, torch.ones_like(q[..., :1])], dim=-1)
        k = torch.cat([k, key_bias[..., None].to(k.dtype)], dim=-1)
        scale = 1.0
    width = -(-q.shape[-1] // FEATURE_STEP) * FEATURE_STEP
    factor = scale * width**0.5  # the kernel divides by the root of the width that it sees
    if abs(factor - 1.0) > 1e-6:
        q = q * factor
    if width != e:
        q, k, v = (F.pad(part, (0, width - part.shape[-1])) for part in (q, k, v))
    offsets = ragged.ptr.to(torch.int32)
    out = varlen_attn(q, k, v, offsets, offsets, ragged.longest, ragged.longest)
    assert isinstance(out, Tensor)  # a tuple only where the log-sum-exp was asked for
    return out[..., :e]


def attend_padded(
    q: Float[Tensor, "t heads e"],
    k: Float[Tensor, "t heads e"],
    v: Float[Tensor, "t heads e"],
    lengths: tuple[int, ...],
    key_bias: Float[Tensor, "t heads"] | None,
    scale: float,
) -> Float[Tensor, "t heads e"]:
    """Attend in masked calls over samples of similar length (see `attend_packed`)."""
    starts = starts_on_host(lengths)
    groups: dict[int, list[int]] = {}
    for sample, length in enumerate(lengths):
        if length > 0:
            groups.setdefault(-(-length // LENGTH_BUCKET), []).append(sample)
    qkv = torch.stack([q, k, v])
    pieces: list[Tensor] = [q[:0]] * len(lengths)
    for samples in groups.values():
        longest = max(lengths[sample] for sample in samples)
        uneven = any(lengths[sample] != longest for sample in samples)
        rows = torch.stack(
            [pad_rows(qkv, starts[sample], lengths[sample], longest) for sample in samples]
        )
        queries, keys, values = rearrange(rows, "b three m heads e -> three b heads m e")
        bias = None
        if key_bias is not None:
            bias = torch.stack(
                [
                    pad_rows(key_bias[None], starts[sample], lengths[sample], longest)[0]
                    for sample in samples
                ]
            )
            bias = rearrange(bias, "b m heads -> b heads 1 m").to(q.dtype)
        mask: Tensor | None = bias
        if uneven:
            sizes = torch.tensor([lengths[sample] for sample in samples], device=q.device)
            valid = torch.arange(longest, device=q.device) < sizes[:, None]
            valid = rearrange(valid, "b m -> b 1 1 m")
            mask = valid if bias is None else bias.masked_fill(~valid, float("-inf"))
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        for row, sample in enumerate(samples):
            pieces[sample] = rearrange(out[row, :, : lengths[sample]], "heads m e -> m heads e")
    return torch.cat(pieces)


def pad_rows(x: Float[Tensor, "k t ..."], start: int, length: int, longest: int) -> Tensor:
    """Cut one sample's tokens out of a run and fill them up with zeros."""
    piece = x[:, start : start + length]
    return F.pad(piece, [0, 0] * (piece.ndim - 2) + [0, longest - length])


def attend_loop(
    q: Float[Tensor, "t heads e"],
    k: Float[Tensor, "t heads e"],
    v: Float[Tensor, "t heads e"],
    lengths: tuple[int, ...],
    key_bias: Float[Tensor, "t heads"] | None,
    scale: float,
) -> Float[Tensor, "t heads e"]:
    """Attend sample by sample (see `attend_packed`)."""
    outs = []
    for start, length in zip(starts_on_host(lengths), lengths, strict=True):
        piece = slice(start, start + length)
        one = [part[piece].transpose(0, 1)[None] for part in (q, k, v)]  # 1 heads m e
        bias = None
        if key_bias is not None:
            bias = rearrange(key_bias[piece], "m heads -> 1 heads 1 m").to(q.dtype)
        out = F.scaled_dot_product_attention(one[0], one[1], one[2], attn_mask=bias, scale=scale)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def starts_on_host(lengths: Sequence[int]) -> list[int]:
    """Return where each sample starts in the run."""
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts


# How compiled graphs find these: there they are one operator, which does not look at the lengths.
ragged_op.RUNGS.update(padded=attend_padded, loop=attend_loop)
