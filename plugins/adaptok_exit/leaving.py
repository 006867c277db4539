"""What leaves: features mapped into the space behind the last block, and put back by index."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from adaptok import BlockCall


class ExitAdapter(nn.Module):
    """Maps features at an exit into the space behind the last block; it starts as the identity.

    `x + W norm(x) + c` with W and c of zero.

    Args:
        width: features of a token.

    Example:
        >>> x = torch.randn(2, 5, 8)
        >>> torch.equal(ExitAdapter(8)(x), x)
        True
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Map all tokens of a sequence.

        Args:
            x: features at the exit.

        Returns:
            Features that the host's own norm and head can read.
        """
        moved: Tensor = self.linear(self.norm(x))
        return x + moved.to(x.dtype)


def adapt(call: BlockCall, adapter: nn.Module) -> BlockCall:
    """Return a call with its tokens mapped by an adapter."""
    return call.with_x(adapter(call.x))


def select_samples(call: BlockCall, samples: Sequence[int]) -> BlockCall:
    """Return the call of some samples; the call itself, where these are all of them in order."""
    if list(samples) == list(range(call.x.shape[0])):
        return call
    return call.select(torch.tensor(list(samples), device=call.x.device))


def join_samples(
    call: BlockCall, parts: Sequence[BlockCall], samples: Sequence[Sequence[int]]
) -> BlockCall:
    """Put groups of samples back where they were in the batch.

    Args:
        call: the whole batch, as it came.
        parts: the groups after their blocks.
        samples: which samples of the batch each group has.

    Returns:
        The whole batch with the features and streams of the groups.

    Example:
        >>> call = BlockCall(torch.zeros(3, 2, 1), grid=(1, 2))
        >>> ends = [call.select(torch.tensor(who)) for who in ([1], [2, 0])]
        >>> ends = [end.with_x(end.x + i) for i, end in enumerate(ends)]
        >>> join_samples(call, ends, [[1], [2, 0]]).x[:, 0, 0]
        tensor([1., 0., 1.])
    """
    order = [sample for group in samples for sample in group]
    if len(parts) == 1 and order == sorted(order):
        return replace(call, x=parts[0].x, streams=parts[0].streams)
    back: Int[Tensor, " b"] = torch.tensor(order, device=call.x.device).argsort()
    streams: dict[str, Tensor | None] = {}
    for name in call.streams:
        found = [part.streams[name] for part in parts]
        kept = [value for value in found if value is not None]
        streams[name] = torch.cat(kept).index_select(0, back) if kept else None
    x = torch.cat([part.x for part in parts]).index_select(0, back)
    return replace(call, x=x, streams=streams)


def tell_depths(call: BlockCall, stage: str, depths: Sequence[int]) -> None:
    """Tell everybody who looks on in front of which block each sample left."""
    for observer in call.observers:
        observer.note_depth(stage, torch.tensor(list(depths)))
