import copy

import pytest
import torch
from adaptok_patch.chunker import AptChunker, PatchPlan
from adaptok_patch.dechunker import AptDechunker
from adaptok_patch.router import AptRouter
from torch import nn

import adaptok
from adaptok import Budget, Context, Routing, Tokens
from adaptok.budgets import apply_budget
from adaptok.errors import BudgetError, ConfigError, ShapeError
from adaptok.testing import fill_weights
from adaptok.testing.cases import make_routing, make_tokens

GRIDS = [(4, 6), (5, 7), (3, 4, 5), (1, 9), (2, 4, 4)]
BUDGETS = [
    Budget(keep=0.4),
    Budget(tokens=[9, 3, 6]),
    Budget(),
    Budget(drop=[0.0, 0.9, 0.5]),
    Budget(tokens=1),
]
WIDTH = 24


def run(grid, budget, **options):
    tokens = make_tokens(grid, width=WIDTH)
    chunker = fill_weights(AptChunker(WIDTH, **options))
    with torch.no_grad():
        chunks, plan = chunker(tokens, make_routing(tokens), budget)
    return chunker, tokens, chunks, plan


def split(chunks, plan):
    """Return the tokens of each sample."""
    if chunks.is_packed:
        return torch.split(chunks.x, chunks.counts.tolist())
    return chunks.x.unbind()


def join_by_loop(chunker, x, h, w, edge, y, column):
    """Join the features of one block of one frame, part by part."""
    if edge == 1:
        return x[y * w + column]
    half = edge // 2
    conv = chunker.joiner.join[edge.bit_length() - 2]
    total = conv.bias.clone()
    for down in range(2):
        for aside in range(2):
            part = join_by_loop(chunker, x, h, w, half, y + down * half, column + aside * half)
            total = total + conv.weight[:, :, down, aside] @ part
    return total


@pytest.mark.parametrize(("layout", "kind"), [("bucketed", "mean"), ("packed", "member")])
@pytest.mark.parametrize("budget", BUDGETS, ids=Budget.describe)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_token_is_made_of_its_cells_and_what_is_learned_of_a_whole_block(
    grid, budget, layout, kind
):
    chunker, tokens, chunks, plan = run(grid, budget, layout=layout, token=kind)
    *_, h, w = grid
    for sample, found in enumerate(split(chunks, plan)):
        token = plan.provenance.token[sample]
        for number, x in enumerate(found):
            cells = (token == number).nonzero().flatten()
            frames = set((cells // (h * w)).tolist())
            place = plan.keep_mask[sample].nonzero()[number, 0]
            assert place in cells
            own = tokens.x[sample]
            expected = own[cells].mean(0) if kind == "mean" else own[place]
            rows, columns = cells % (h * w) // w, cells % w
            edge = int(rows.max() - rows.min()) + 1
            square = len(cells) == edge**2 and int(columns.max() - columns.min()) + 1 == edge
            top, left = int(rows.min()), int(columns.min())
            aligned = top % edge == 0 and left % edge == 0
            if len(frames) == 1 and square and aligned and edge in (2, 4):
                frame = frames.pop()
                own = tokens.x[sample, frame * h * w : (frame + 1) * h * w]
                joined = join_by_loop(chunker, own, h, w, edge, top, left)
                expected = expected + chunker.joiner.out[str(edge.bit_length() - 1)](joined)
            assert torch.allclose(x, expected, atol=1e-5), (sample, number, len(cells))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_learned_parts_are_met(grid):
    """The oracle above would say nothing if no block were whole."""
    if min(grid[-2:]) < 2:
        pytest.skip("no block of two by two")
    _, _, _, plan = run(grid, Budget(keep=0.4))
    assert (plan.members == 4).any()
    assert grid[-2:] != (4, 4) or (run(grid, Budget(tokens=2))[3].members == 16).all()


@pytest.mark.parametrize("budget", BUDGETS, ids=Budget.describe)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_counts_are_exact_or_rounded_up_to_a_bucket(grid, budget):
    tokens = make_tokens(grid, width=WIDTH)
    routing = make_routing(tokens)
    wanted = apply_budget(routing, budget).kept
    n = tokens.x.shape[1]
    for layout in ("packed", "bucketed"):
        chunks, plan = AptChunker(WIDTH, layout)(tokens, routing, budget)
        assert plan.requested.equal(wanted)
        computed = chunks.counts
        assert computed.equal(plan.computed)
        if layout == "packed" or budget.is_exact:
            assert computed.equal(wanted)
        else:
            step = -(-n // 16)
            assert computed.tolist() == [min(-(-k // step) * step, n) for k in wanted.tolist()]
        assert plan.keep_mask[plan.routing.keep_mask].all()  # a bucket undoes the last merges


def test_a_smaller_budget_merges_a_superset():
    tokens = make_tokens((5, 6), width=WIDTH)
    routing = make_routing(tokens)
    chunker = AptChunker(WIDTH, learned=False)
    finer = torch.arange(30).expand(3, 30)
    mask = torch.ones(3, 30, dtype=torch.bool)
    for count in range(30, 0, -1):
        _, plan = chunker(tokens, routing, Budget(tokens=count))
        token = plan.provenance.token
        pairs = finer[:, :, None] == finer[:, None]
        assert (token[:, :, None] == token[:, None])[pairs].all()
        assert not plan.keep_mask[~mask].any()
        finer, mask = token, plan.keep_mask


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("budget", BUDGETS, ids=Budget.describe)
def test_every_cell_gets_the_update_of_its_patch(grid, budget):
    _, tokens, chunks, plan = run(grid, budget)
    after = AptDechunker()(chunks.with_x(2 * chunks.x + 1), plan, tokens)
    for sample, made in enumerate(split(chunks, plan)):
        token = plan.provenance.token[sample]
        for cell in range(len(token)):
            x, e = tokens.x[sample, cell], made[token[cell]]
            expected = x + (e + 1)
            assert torch.allclose(after.x[sample, cell], expected, atol=1e-5)
            if (token == token[cell]).sum() == 1:
                assert torch.equal(after.x[sample, cell], 2 * e + 1)


def test_trained_weights_keep_the_identity_of_blocks_that_change_nothing():
    _, tokens, chunks, plan = run((4, 6), Budget(keep=0.3))
    assert isinstance(plan, PatchPlan)
    assert torch.allclose(AptDechunker()(chunks, plan, tokens).x, tokens.x, atol=1e-6)
    plain = AptChunker(WIDTH, learned=False)(tokens, make_routing(tokens), Budget(keep=0.3))[0]
    assert not torch.allclose(plain.x, chunks.x, atol=1e-2)


def test_at_full_budget_tokens_are_untouched_by_trained_weights():
    _, tokens, chunks, _ = run((4, 6), Budget(keep=1.0))
    assert torch.equal(chunks.x, tokens.x)


def test_half_precision_adds_up_in_float32():
    tokens = make_tokens((8, 8), width=WIDTH, dtype=torch.bfloat16)
    chunker = AptChunker(WIDTH, learned=False, token="mean")
    chunks, plan = chunker(tokens, make_routing(tokens), Budget(tokens=1))
    expected = tokens.x.float().mean(1, keepdim=True).bfloat16()
    assert torch.equal(chunks.x, expected)
    assert chunks.x.dtype == torch.bfloat16
    assert (plan.members == 64).all()


def test_the_place_of_a_patch_is_a_cell_near_its_centre():
    x = torch.zeros(1, 64, 4)
    tokens = Tokens(x, (8, 8))
    routing = AptRouter(thresholds=(1.0, 1.0))(tokens, Context())
    _, plan = AptChunker(4, "packed")(tokens, routing, Budget())
    assert plan.cells.tolist() == [18, 22, 50, 54]  # (2, 2), (2, 6), (6, 2), (6, 6)


class Scores(adaptok.Router):
    """A router with weights and no threshold."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, tokens, context):
        return Routing(self.score(tokens.x)[..., 0].sigmoid(), threshold=None)


@pytest.mark.parametrize("layout", ["bucketed", "packed", "fixed"])
def test_a_router_with_weights_learns_and_values_stay(layout):
    tokens = make_tokens((4, 6), width=WIDTH)
    router, chunker = fill_weights(Scores()), fill_weights(AptChunker(WIDTH, layout))
    routing = router(tokens, Context())
    chunks, plan = chunker(tokens, routing, Budget(keep=0.5))
    with torch.no_grad():
        still, _ = copy.deepcopy(chunker)(tokens, Routing(routing.keep_prob.detach()), Budget(0.5))
    assert torch.allclose(chunks.x.reshape(-1, WIDTH), still.x.reshape(-1, WIDTH), atol=1e-6)
    AptDechunker()(chunks.with_x(chunks.x.tanh()), plan, tokens).x.square().sum().backward()
    for module in (router, chunker):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all()
    assert router.score.weight.grad.abs().sum() > 0
    assert chunker.joiner.out["1"].weight.grad.abs().sum() > 0


def test_gradient_agrees_with_numbers():
    x = torch.randn(1, 16, 3, dtype=torch.float64, requires_grad=True)
    routing = Routing(torch.rand(1, 16))
    chunker = fill_weights(AptChunker(3, token="mean")).double()

    def through(x):
        chunks, _ = chunker(Tokens(x, (4, 4)), routing, Budget(tokens=6))
        return chunks.x

    assert torch.autograd.gradcheck(through, (x,))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "ragged"}, "layout is one of packed, bucketed, fixed"),
        ({"buckets": 0}, "buckets is at least 1"),
        ({"layout": "fixed", "buckets": 4}, "'fixed' has none"),
        ({"scales": (1, 3)}, "powers of two"),
        ({"scales": (2, 4)}, "powers of two"),
        ({"scales": (1,)}, "powers of two"),
        ({"token": "median"}, "token is mean or member, got 'median'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        AptChunker(WIDTH, **options)


def test_bad_input():
    tokens = make_tokens((4, 6), width=WIDTH)
    routing = make_routing(tokens)
    with pytest.raises(BudgetError, match='layout "fixed" runs the same count'):
        AptChunker(WIDTH, "fixed")(tokens, routing, Budget(tokens=[4, 5, 6]))
    with pytest.raises(BudgetError, match="more than the 24 cells"):
        AptChunker(WIDTH)(tokens, routing, Budget(tokens=25))
    with pytest.raises(ShapeError, match=r"shape \(2, 24\) and the tokens \(3, 24\)"):
        AptChunker(WIDTH)(tokens, Routing(torch.rand(2, 24)), Budget(keep=0.5))
    cells = torch.arange(24).expand(3, 24)
    with pytest.raises(ShapeError, match="AptChunker needs dense tokens"):
        AptChunker(WIDTH)(Tokens(tokens.x, (4, 6), cells), routing, Budget(keep=0.5))
    with pytest.raises(ShapeError, match=r"needs a grid \(h, w\) or \(f, h, w\), got \(24,\)"):
        AptChunker(WIDTH)(Tokens(tokens.x, (24,)), routing, Budget(keep=0.5))
    with pytest.raises(BudgetError, match="only ranks cells"):
        AptChunker(WIDTH)(tokens, Routing(torch.rand(3, 24), threshold=None), Budget())
