from dataclasses import replace

import pytest
import torch
from adaptok_hnet.chunker import HNetChunker
from adaptok_hnet.dechunker import HNetDechunker
from adaptok_hnet.scan import SCANS, order_cells

from adaptok import Budget, Provenance, Routing, Tokens
from adaptok.dc import DCChunker
from adaptok.errors import DtypeError

GRID = (5, 8)
D = 6
CASES = [
    ("packed", Budget()),
    ("packed", Budget(drop=0.5)),
    ("bucketed", Budget(keep=[0.05, 0.6, 1.0])),
    ("bucketed", Budget(drop=0.3)),
    ("fixed", Budget(tokens=7)),
]


def make_case(scan, layout, budget):
    """Cells, tokens that the blocks have changed, a plan, and the leaf of the probabilities."""
    before = Tokens(torch.randn(3, 40, D), GRID)
    prob = torch.rand(3, 40).pow(torch.tensor([[0.5], [1.0], [4.0]]))
    prob[:, 0], prob[:, 7] = 1.0, 1e-6
    prob = prob.requires_grad_()
    kept, plan = HNetChunker(scan, layout)(before, Routing(prob), budget)
    chunks = kept.with_x(torch.randn(kept.x.shape).requires_grad_())
    return before.with_x(before.x.requires_grad_()), chunks, plan, prob


def dechunk_by_loop(chunks, plan, before, gate, scan):
    """Walk along the scan of each sample, one cell after the other."""
    h, start, out = chunks.x.reshape(-1, D), 0, []
    natural = plan.routing.natural_mask
    for sample, mask in enumerate(plan.keep_mask):
        prob = plan.routing.keep_prob[sample]
        row = {cell: start + k for k, cell in enumerate(mask.nonzero().flatten().tolist())}
        start += len(row)
        order = order_cells(GRID, scan).tolist()
        first = next(cell for cell in order if cell in row)
        z, token, rows = None, first, [None] * 40
        for cell in order:
            if cell in row:
                token = cell
                p = prob[cell].clamp(1e-4, 1 - 1e-4)
                z = h[row[cell]] if z is None else p * h[row[cell]] + (1 - p) * z
            x, update = before.x[sample, cell], h[row[token]] - before.x[sample, token]
            chosen = prob[cell] if natural[sample, cell] else 1 - prob[cell]
            base = h[row[cell]] if cell in row else x + update
            base = base + update.detach() * (chosen - chosen.detach())
            rows[cell] = base + gate * ((h[row[first]] if z is None else z) - base)
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.parametrize("gate", [0.0, 1.0, None])
@pytest.mark.parametrize(("layout", "budget"), CASES)
@pytest.mark.parametrize("scan", SCANS)
def test_values_and_gradients_are_those_of_the_loop(scan, layout, budget, gate):
    before, chunks, plan, prob = make_case(scan, layout, budget)
    dechunker = HNetDechunker(D)
    with torch.no_grad():
        dechunker.gate.copy_(torch.randn(D) if gate is None else torch.full((D,), gate))
    found = dechunker(chunks, plan, before).x
    expected = dechunk_by_loop(chunks, plan, before, dechunker.gate, scan)
    assert torch.allclose(found, expected, atol=1e-5)
    probe = torch.randn(found.shape)
    leaves = (chunks.x, before.x, prob, dechunker.gate)
    ours = torch.autograd.grad((found * probe).sum(), leaves)
    theirs = torch.autograd.grad((expected * probe).sum(), leaves)
    for name, a, b in zip(("h", "x", "prob", "gate"), ours, theirs, strict=True):
        # with a gate of one the features before enter by the straight-through part only
        assert b.abs().max() > 0 or (name, gate) == ("x", 1.0)
        assert torch.allclose(a, b, atol=1e-4 * max(1.0, b.abs().max().item())), name


@pytest.mark.parametrize("scan", SCANS)
def test_a_fresh_one_gives_kept_cells_their_own_and_dropped_ones_the_update(scan):
    before, chunks, plan, _ = make_case(scan, "packed", Budget())
    x = HNetDechunker(D)(chunks, plan, before).x.flatten(0, 1)
    assert torch.equal(x[plan.rows], chunks.x)
    update = chunks.x - before.x.flatten(0, 1)[plan.rows]
    expected = before.x.flatten(0, 1) + update[plan.sources]
    assert torch.allclose(x, expected, atol=1e-6)
    dropped = ~plan.keep_mask.flatten()
    assert (x - before.x.flatten(0, 1))[dropped].abs().max() > 0.1


def test_scans_smooth_along_other_orders():
    outs = []
    for scan in SCANS:
        torch.manual_seed(1)
        before, chunks, plan, _ = make_case(scan, "fixed", Budget(tokens=20))
        dechunker = HNetDechunker(D)
        torch.nn.init.ones_(dechunker.gate)
        outs.append(dechunker(chunks, plan, before).x)
    assert (outs[0] - outs[1]).abs().max() > 0.1
    assert (outs[1] - outs[2]).abs().max() > 0.1


@pytest.mark.parametrize("layout", ["packed", "fixed"])
def test_a_plan_of_another_chunker_is_walked_in_raster_order(layout):
    before = Tokens(torch.randn(2, 40, D), GRID)
    routing = Routing(torch.rand(2, 40))
    kept, plan = DCChunker(layout)(before, routing, Budget(tokens=9))
    _, own = HNetChunker("raster", layout)(before, routing, Budget(tokens=9))
    chunks = kept.with_x(torch.randn(kept.x.shape))
    dechunker = HNetDechunker(D)
    torch.nn.init.ones_(dechunker.gate)
    ours, theirs = (dechunker(chunks, p, before).x.flatten(0, 1) for p in (own, plan))
    assert torch.allclose(ours[own.rows], theirs[plan.rows], atol=1e-6)
    shuffled = torch.randperm(9)  # tokens may come in any order
    if layout == "fixed":
        token = shuffled.argsort()[plan.provenance.token]
        mixed = replace(plan, cells=plan.cells[:, shuffled], provenance=Provenance(token))
        again = dechunker(chunks.with_x(chunks.x[:, shuffled]), mixed, before).x
        assert torch.allclose(again, theirs.view_as(again), atol=1e-6)


def test_a_cell_without_a_token_keeps_what_it_had():
    before, chunks, plan, _ = make_case("snake", "fixed", Budget(tokens=9))
    token = torch.where(plan.keep_mask, plan.provenance.token, -1)
    dechunker = HNetDechunker(D)
    torch.nn.init.ones_(dechunker.gate)
    out = dechunker(chunks, replace(plan, provenance=Provenance(token)), before).x
    assert torch.equal(out[~plan.keep_mask], before.x[~plan.keep_mask])
    assert (out - before.x)[plan.keep_mask].abs().max() > 0.1


def test_it_stays_in_float32():
    dechunker = HNetDechunker(D).to(torch.bfloat16)
    assert dechunker.gate.dtype == torch.float32
    dechunker.gate = torch.nn.Parameter(torch.zeros(D, dtype=torch.float16))
    before, chunks, plan, _ = make_case("raster", "fixed", Budget(tokens=9))
    with pytest.raises(DtypeError, match="HNetDechunker runs in float32 only"):
        dechunker(chunks, plan, before)
