import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from adaptok import Budget, Routing
from adaptok.backbones.packed_forms import pack_blocks
from adaptok.calls import BlockCall, TokenInput
from adaptok.chunk_stage import run_groups
from adaptok.dc import DCChunker
from adaptok.errors import ShapeError, StackError
from adaptok.packed_run import run_packed
from adaptok.stages import BlockRange
from benchmarks.architectures.case import randomise

WIDTH, GRID = 48, (3, 5)
COUNTS = (3, 15, 1)


class Modulated(nn.Module):
    """A block of DiT without attention's details."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn = Block(WIDTH, 3).attn
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(20, 6 * WIDTH))

    def forward(self, x, c):
        parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + parts[2] * self.attn(self.norm1(x) * (1 + parts[1]) + parts[0])
        return x + parts[5] * self.mlp(self.norm2(x) * (1 + parts[4]) + parts[3])


def make_call(start, behind, **options):
    x = torch.randn(3, start + 15 + behind, WIDTH, requires_grad=True)
    return BlockCall(x, GRID, start, **options)


def make_plan(call, layout="packed"):
    prob = torch.rand(3, 15)
    budget = Budget(tokens=list(COUNTS)) if layout == "packed" else Budget(tokens=4)
    return DCChunker(layout)(call.tokens, Routing(prob), budget)


def run_blocks_on(blocks):
    def run(call, first, last):
        for block in blocks[first:last]:
            beside = () if call.condition is None else (call.condition,)
            call = call.with_x(block(call.x, *beside))
        return call

    return BlockRange(run, 0, len(blocks))


@pytest.mark.parametrize(("start", "behind"), [(0, 0), (1, 0), (4, 0), (0, 3), (2, 2)])
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_one_run_equals_groups_of_equal_length(start, behind, conditioned, checkpoint):
    make = Modulated if conditioned else lambda: Block(WIDTH, 3, qkv_bias=True, init_values=1.0)
    blocks = nn.ModuleList([randomise(make()) for _ in range(2)])
    condition = torch.randn(3, 20) if conditioned else None
    call = make_call(start, behind, condition=condition, checkpoint=checkpoint)
    chunks, plan = make_plan(call)
    assert plan.lengths == COUNTS
    expected, (rest, streams) = run_groups(run_blocks_on(blocks), call, chunks, plan)
    found, (others, same) = run_packed(pack_blocks(list(blocks)), call, chunks, plan)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(others, rest, rtol=0, atol=1e-5)
    assert others.shape == (3, start + behind, WIDTH)
    assert streams == same == {}
    directions = torch.randn_like(expected), torch.randn_like(rest)
    inputs = [call.x, *blocks.parameters()]

    def pull(x, r):
        for value in inputs:
            value.grad = None
        # checkpoints know no torch.autograd.grad; both ways share the chunks' graph
        ((x * directions[0]).sum() + (r * directions[1]).sum()).backward(retain_graph=True)
        return [value.grad for value in inputs]

    for mine, other in zip(pull(found, others), pull(expected, rest), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_other_tokens_of_a_sample_stay_its_own():
    call = make_call(2, 1)
    chunks, plan = make_plan(call)
    seen = []

    def look(x, ragged, condition):
        seen.append((x, ragged))
        return x

    found, (rest, _) = run_packed([look], call, chunks, plan)
    assert torch.equal(found, chunks.x)
    assert torch.equal(rest, call.rest_x)
    ((x, ragged),) = seen
    assert ragged.lengths == (6, 18, 4)
    assert ragged.ptr.tolist() == [0, 6, 24, 28]
    assert ragged.batch.tolist() == [0] * 6 + [1] * 18 + [2] * 4
    for sample, kept in enumerate(plan.keep_mask):
        rows = torch.cat([torch.arange(2), 2 + kept.nonzero().flatten(), torch.tensor([17])])
        start, end = ragged.ptr[sample], ragged.ptr[sample + 1]
        assert torch.equal(x[start:end], call.x[sample, rows])


def test_what_blocks_take_beside_tokens_is_refused():
    mask = TokenInput(torch.ones(1, 1, 16, 16), axes=(2, 3), start=1)
    for options, name in (
        ({"token_inputs": {"attn_mask": mask}}, "attn_mask"),
        ({"depth_inputs": {"rope": [mask]}}, "rope"),
        ({"sample_inputs": {"size": torch.ones(3)}}, "size"),
        ({"streams": {"text": torch.ones(3, 2, WIDTH)}}, "text"),
        ({"shared": {"scale": 2.0}}, "scale"),
    ):
        call = make_call(1, 0, **options)
        chunks, plan = make_plan(make_call(1, 0))
        with pytest.raises(StackError, match=f"take {name} too: use layout"):
            run_packed([], call, chunks, plan)


def test_taken_cells_and_dense_chunks_are_refused():
    call = make_call(1, 0)
    chunks, plan = make_plan(call)
    with pytest.raises(StackError, match="let it run first"):
        run_packed([], call.take(torch.arange(15).expand(3, 15)), chunks, plan)
    with pytest.raises(ShapeError, match="packed run needs packed chunks"):
        run_packed([], call, *make_plan(call, "fixed"))
