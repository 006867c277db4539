"""Running blocks on packed tokens: prefix, kept cells and whatever follows, sample after sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adaptok.attention import Ragged
from adaptok.calls import BlockCall
from adaptok.chunking import ChunkPlan
from adaptok.errors import ShapeError, StackError
from adaptok.regions import mark_dynamic
from adaptok.tokens import Tokens


class PackedBlock(Protocol):
    """A block as a function of packed tokens."""

    def __call__(
        self, x: Float[Tensor, "t d"], ragged: Ragged, condition: Float[Tensor, "b c"] | None
    ) -> Float[Tensor, "t d"]:
        """Run the block on the tokens of all samples in one run."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedRows:
    """Where the tokens of a run came from, and where they go.

    Args:
        cells: row in the run of each kept cell, `(t)`.
        others: row in the run of each further token, sample after sample, `(b r)`.
        order: for each row of the run, its row in kept cells followed by further tokens, `(t)`.
        ragged: where the samples lie in the run.
    """

    cells: Int[Tensor, " t"]
    others: Int[Tensor, "b r"]
    order: Int[Tensor, " t_plus_br"]
    ragged: Ragged


def run_packed(
    blocks: Sequence[PackedBlock],
    call: BlockCall,
    chunks: Tokens,
    plan: ChunkPlan,
    run: "RunForms | None" = None,
) -> tuple[Float[Tensor, "t d"], tuple[Float[Tensor, "b r d"], dict[str, Tensor | None]]]:
    """Run blocks on the kept cells of all samples in one run.

    Each sample's further tokens, such as its class token, come along: in front of its cells and
    behind them, as in the whole sequence.

    Args:
        blocks: packed forms of the blocks inside the stage, in order.
        call: the call with all cells.
        chunks: the kept cells, packed `(t d)`.
        plan: what the chunker returned.
        run: runs the blocks, as `run_forms` does; a compiled form of it.

    Returns:
        The features of the chunks, and what came of the other tokens and the streams, as
        `chunk_stage.run_chunks` does.

    Raises:
        StackError: the blocks take something beside tokens and a condition, such as a mask.
        ShapeError: the chunks are not packed.

    Example:
        >>> from adaptok import Budget, Routing
        >>> from adaptok.dc import DCChunker
        >>> call = BlockCall(torch.randn(2, 5, 8), grid=(2, 2), start=1)
        >>> routing = Routing(torch.tensor([[0.9, 0.1, 0.2, 0.1], [0.9, 0.8, 0.7, 0.1]]))
        >>> chunks, plan = DCChunker("packed")(call.tokens, routing, Budget())
        >>> def double(x, ragged, condition):
        ...     print(tuple(x.shape), ragged.lengths)
        ...     return 2 * x
        >>> x, (rest, _) = run_packed([double], call, chunks, plan)
        (6, 8) (2, 4)
        >>> torch.equal(x, 2 * chunks.x), torch.equal(rest, 2 * call.x[:, :1])
        (True, True)
    """
    check_packable(call)
    rows = lay_out(plan, call.start, call.x.shape[1] - call.num_cells)
    rest = call.rest_x
    flat = torch.cat([chunks.x.to(rest.dtype), rearrange(rest, "b r d -> (b r) d")])
    x = flat.index_select(0, rows.order)
    for tensor in (x, rows.ragged.batch):
        mark_dynamic(tensor, 0)
    x = (run or run_forms)(
        tuple(blocks), x, rows.ragged, call.condition, checkpointed=call.checkpoint
    )
    b, r = rows.others.shape
    after = rearrange(x.index_select(0, rows.others.flatten()), "(b r) d -> b r d", b=b, r=r)
    return x.index_select(0, rows.cells), (after, dict(call.streams))


def run_forms(
    blocks: Sequence[PackedBlock],
    x: Float[Tensor, "t d"],
    ragged: Ragged,
    condition: Float[Tensor, "b c"] | None,
    *,
    checkpointed: bool,
) -> Float[Tensor, "t d"]:
    """Run packed blocks one after the other.

    Args:
        blocks: packed forms.
        x: packed tokens, `(t d)`.
        ragged: where the samples lie.
        condition: conditioning vector of each sample.
        checkpointed: keep no activations of a block, compute them again for the gradient.

    Returns:
        Packed tokens.
    """
    for block in blocks:
        if checkpointed:
            x = checkpoint(block, x, ragged, condition, use_reentrant=False)
        else:
            x = block(x, ragged, condition)
    return x


RunForms = Callable[..., Tensor]


def check_packable(call: BlockCall) -> None:
    """Raise a `StackError` unless the blocks take only tokens and a condition."""
    if call.cells is not None:
        raise StackError("a stage around this one has taken cells away: let it run first")
    beside = [
        *call.token_inputs,
        *call.depth_inputs,
        *call.sample_inputs,
        *(name for name, stream in call.streams.items() if stream is not None),
        *(name for name, value in call.shared.items() if value is not None),
    ]
    if beside:
        raise StackError(
            f'layout "packed" runs blocks on tokens and a condition, and these take '
            f'{", ".join(beside)} too: use layout "bucketed" or "fixed"'
        )


def lay_out(plan: ChunkPlan, start: int, others: int) -> PackedRows:
    """Place the kept cells of each sample between its further tokens.

    Args:
        plan: what the chunker returned.
        start: how many further tokens stand in front of the cells.
        others: how many there are, with those behind the cells.

    Returns:
        The places.

    Raises:
        ShapeError: the plan is of dense tokens.
    """
    if plan.batch is None or plan.ptr is None or plan.lengths is None:
        raise ShapeError("a packed run needs packed chunks: batch, ptr and lengths in the plan")
    b, device = len(plan.lengths), plan.batch.device
    shifts = torch.arange(b, device=device) * others
    t = plan.batch.shape[0]
    cells = torch.arange(t, device=device) + shifts.index_select(0, plan.batch) + start
    places = torch.arange(others, device=device)
    ends = torch.where(places < start, plan.ptr[:-1, None], plan.ptr[1:, None])
    rows = ends + shifts[:, None] + places
    order = torch.cat([cells, rows.flatten()])
    back = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=device))
    samples = torch.arange(b, device=device).repeat_interleave(others)
    ragged = Ragged(
        torch.cat([plan.batch, samples]).index_select(0, back),
        plan.ptr + torch.arange(b + 1, device=device) * others,
        tuple(length + others for length in plan.lengths),
    )
    return PackedRows(cells, rows, back, ragged)
