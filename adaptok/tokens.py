"""Tokens: what flows between embedding, router, chunker, blocks and dechunker.

Letters of shapes, the same everywhere: `b` samples, `n` cells or dense tokens of a sample,
`m` tokens kept of a sample, `t` tokens of a whole packed batch, `d` width, `c` image
channels, `h w` grid.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from adaptok.errors import DeviceError, ShapeError

Grid = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Features of tokens, dense (`b n d`) or packed (`t d` with `batch` and `ptr`).

    Packed tokens speak the language of torch-geometric: `x`, `batch`, `ptr`.

    Args:
        x: features, `(b n d)` when dense and `(t d)` when packed.
        grid: lengths of the grid axes, `(h, w)` for images and `(f, h, w)` for video; None
            where the tokens do not come from a grid.
        cells: flat index of the grid cell that each token sits in, `(b n)` or `(t)`; None
            means that the tokens are all the cells in order.
        valid: for dense tokens only, False where a row is padding, `(b n)`.
        batch: for packed tokens only, the sample that each token belongs to, `(t)`.
        ptr: for packed tokens only, where each sample starts, and the end, `(b + 1)`.

    Raises:
        ShapeError: the parts do not fit each other.
        DeviceError: the parts lie on several devices.

    Example:
        >>> tokens = Tokens(torch.zeros(2, 6, 8), grid=(2, 3))
        >>> tokens.num_samples, tokens.width, tokens.is_packed
        (2, 8, False)
    """

    x: Float[Tensor, "b n d"] | Float[Tensor, "t d"]
    grid: Grid | None = None
    cells: Int[Tensor, "b n"] | Int[Tensor, " t"] | None = None
    valid: Bool[Tensor, "b n"] | None = None
    batch: Int[Tensor, " t"] | None = None
    ptr: Int[Tensor, " b_plus_1"] | None = None

    def __post_init__(self) -> None:
        if (self.batch is None) != (self.ptr is None):
            raise ShapeError("packed tokens need both batch and ptr, and only one of them came")
        axes = 2 if self.is_packed else 3
        if self.x.ndim != axes:
            raise ShapeError(
                f"x of {'packed' if self.is_packed else 'dense'} tokens has {axes} axes "
                f"({'t d' if self.is_packed else 'b n d'}), got the shape {tuple(self.x.shape)}"
            )
        if self.is_packed and self.valid is not None:
            raise ShapeError("packed tokens have no padding: leave valid out")
        rows = tuple(self.x.shape[:-1])
        for name in ("cells", "valid", "batch"):
            part = getattr(self, name)
            if part is not None and tuple(part.shape) != rows:
                raise ShapeError(f"{name} needs the shape {rows}, got {tuple(part.shape)}")
        for name in ("cells", "valid", "batch", "ptr"):
            part = getattr(self, name)
            if part is not None and part.device != self.x.device:
                raise DeviceError(f"{name} lies on {part.device} and x on {self.x.device}")
        if self.grid is not None and self.cells is None and not self.is_packed:
            check_grid(self.grid, self.x.shape[1])

    @property
    def is_packed(self) -> bool:
        """Whether all samples lie in one run of tokens."""
        return self.ptr is not None

    @property
    def num_samples(self) -> int:
        """How many samples there are (`b`)."""
        return self.x.shape[0] if self.ptr is None else self.ptr.shape[0] - 1

    @property
    def width(self) -> int:
        """How many features a token has (`d`)."""
        return self.x.shape[-1]

    @property
    def counts(self) -> Int[Tensor, " b"]:
        """How many tokens each sample has, padding not counted."""
        if self.ptr is not None:
            return self.ptr.diff()
        if self.valid is not None:
            return self.valid.sum(1)
        return torch.full((self.x.shape[0],), self.x.shape[1], device=self.x.device)

    def with_x(self, x: Tensor) -> "Tokens":
        """Return the same tokens with other features.

        Args:
            x: features with as many rows as before; the width may change.

        Returns:
            New tokens; the old ones stay as they are.
        """
        return Tokens(x, self.grid, self.cells, self.valid, self.batch, self.ptr)


def check_grid(grid: Grid, num_tokens: int) -> None:
    """Raise a `ShapeError` unless the grid has as many cells as there are tokens."""
    if not grid or any(length < 1 for length in grid):
        raise ShapeError(f"a grid has one or more axes of positive length, got {grid}")
    if math.prod(grid) != num_tokens:
        raise ShapeError(
            f"the grid {grid} has {math.prod(grid)} cells, but {num_tokens} tokens came"
        )


def pack(tokens: Tokens) -> Tokens:
    """Put the valid tokens of all samples into one run, without padding.

    Args:
        tokens: dense tokens; padding is named by `valid`, and may lie anywhere.

    Returns:
        Packed tokens in the order of the samples. `unpack` is the inverse, but for padding,
        which comes back as zeros behind each sample's tokens.

    Raises:
        ShapeError: the tokens are packed already.

    Example:
        >>> x = torch.arange(6.0).reshape(2, 3, 1)
        >>> valid = torch.tensor([[True, False, False], [True, True, True]])
        >>> pack(Tokens(x, valid=valid)).ptr
        tensor([0, 1, 4])
    """
    if tokens.is_packed:
        raise ShapeError("pack takes dense tokens (b n d), and these are packed already")
    b, n, _ = tokens.x.shape
    device = tokens.x.device
    valid = tokens.valid
    if valid is None:
        batch = torch.arange(b, device=device).repeat_interleave(n)
        ptr = torch.arange(b + 1, device=device) * n
        x = rearrange(tokens.x, "b n d -> (b n) d")
        cells = None if tokens.cells is None else tokens.cells.flatten()
        if cells is None and tokens.grid is not None:
            cells = torch.arange(n, device=device).repeat(b)
        return Tokens(x, tokens.grid, cells, batch=batch, ptr=ptr)
    rows = valid.flatten().nonzero().squeeze(1)
    cells = rows % n if tokens.cells is None else tokens.cells.flatten()[rows]
    return Tokens(
        rearrange(tokens.x, "b n d -> (b n) d")[rows],
        tokens.grid,
        cells if tokens.grid is not None or tokens.cells is not None else None,
        batch=rows // n,
        ptr=starts_of(valid.sum(1)),
    )


def unpack(tokens: Tokens) -> Tokens:
    """Spread packed tokens to one row per sample, with zeros as padding at the end.

    Args:
        tokens: packed tokens.

    Returns:
        Dense tokens, as long as the longest sample. `valid` is set unless all samples have
        the same length; the cell of a padding row is 0.

    Raises:
        ShapeError: the tokens are dense already.

    Example:
        >>> x = torch.arange(4.0).reshape(4, 1)
        >>> packed = Tokens(x, batch=torch.tensor([0, 1, 1, 1]), ptr=torch.tensor([0, 1, 4]))
        >>> unpack(packed).x.squeeze(-1)
        tensor([[0., 0., 0.],
                [1., 2., 3.]])
    """
    if tokens.ptr is None or tokens.batch is None:
        raise ShapeError("unpack takes packed tokens (t d), and these are dense already")
    counts = tokens.counts
    b, longest = tokens.num_samples, int(counts.max())
    t, d = tokens.x.shape
    rows = torch.arange(t, device=tokens.x.device) - tokens.ptr[tokens.batch]
    target = tokens.batch * longest + rows
    x = tokens.x.new_zeros(b * longest, d).index_copy(0, target, tokens.x)
    cells = tokens.cells
    if cells is not None:
        cells = cells.new_zeros(b * longest).index_copy(0, target, cells).view(b, longest)
    full = t == b * longest
    steps = torch.arange(longest, device=tokens.x.device)
    return Tokens(
        rearrange(x, "(b n) d -> b n d", b=b),
        tokens.grid,
        cells,
        valid=None if full else steps < counts[:, None],
    )


def starts_of(counts: Int[Tensor, " b"]) -> Int[Tensor, " b_plus_1"]:
    """Return where each sample starts in a packed run, with the end as the last entry."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
