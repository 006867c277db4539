"""Caches around the blocks of the reference model, which chooses other tokens in each step."""

import copy

import pytest
import torch
from adaptok_cache import FirstBlockCache, TaylorSeer, TeaCache
from adaptok_cache.stage import IdleCacheWarning

import adaptok
from adaptok.standing import Standing
from adaptok.testing.models import fill_weights

TIMES = (900.0, 800.0, 650.0, 500.0, 300.0, 100.0)
GRID = (8, 6)
BUDGETS = ({}, {"keep": 0.5}, {"keep": [0.2, 0.9, 0.5]})


def make_model(layout="packed"):
    config = adaptok.DCDiTConfig(hidden_size=64, depth=3, num_heads=2, latent_size=8, layout=layout)
    return fill_weights(adaptok.DCDiT(config)).eval()


def make_walk(b=3):
    """Steps whose images move, so that other cells are kept in each."""
    generator = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(b, 4, *GRID, generator=generator) for _ in range(2))
    return [
        (noise * t / 1000 + clean * (1 - t / 1000), torch.full((b,), t), torch.arange(b))
        for t in TIMES
    ]


def run_walk(model, steps, **budget):
    with torch.no_grad(), adaptok.request(model, "one"):
        return [model(*step, **budget) for step in steps]


def pick(steps, sample):
    rows = slice(sample, sample + 1)
    return [tuple(part[rows] for part in step) for step in steps]


def find_owner(kept, cell):
    """The token of the nearest kept cell, by comparing all; a tie goes to the lower cell."""
    y, x = divmod(cell, GRID[1])
    far = [(y - k // GRID[1]) ** 2 + (x - k % GRID[1]) ** 2 for k in kept]
    return far.index(min(far))


def run_oracle(model, steps, interval, **budget):
    """One sample, reused in all but every third step, from parts of a model that is not wrapped."""
    outs, kept_cells = [], []
    added, owners = None, None
    for number, (x, t, y) in enumerate(steps):
        condition, before, routing = model.route(x, t, y)
        kept, plan = model.chunker(before, routing, adaptok.Budget(**budget))
        cells = plan.cells.tolist()
        kept_cells.append(cells)
        rows = kept.x + model.place(plan.cells, plan.grid)
        if number < 2 or (number - 2) % interval == interval - 1:
            out = rows
            for block in model.backbone.blocks:
                out = block(out, condition, plan.ragged(None))
            change = out - rows
            owners = [find_owner(cells, cell) for cell in range(GRID[0] * GRID[1])]
            added = change
        else:
            out = rows + torch.stack([added[owners[cell]] for cell in cells])
        after = model.backbone.norm(out)
        outs.append(model.restore(kept.with_x(after), plan, before, condition))
    return outs, kept_cells


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_each_sample_gets_what_the_tokens_nearest_to_its_cells_got(budget):
    model, steps = make_model(), make_walk()
    wrapped = adaptok.wrap(copy.deepcopy(model), stack=[TaylorSeer(interval=3, order=0)])
    found = run_walk(wrapped, steps, **budget)
    plain = run_walk_plain(model, steps, **budget)
    stage = wrapped.backbone.blocks.stages[0]
    assert (stage.computed, stage.reused) == (3 * 3, 3 * 3)
    moved = 0
    for sample in range(3):
        keep = budget.get("keep", None)
        mine = {} if keep is None else {"keep": keep[sample] if isinstance(keep, list) else keep}
        with torch.no_grad():
            outs, cells = run_oracle(model, pick(steps, sample), 3, **mine)
        moved += len({tuple(kept) for kept in cells})
        for number, (mine_out, out) in enumerate(zip(outs, found, strict=True)):
            torch.testing.assert_close(out[sample], mine_out[0], rtol=1e-4, atol=1e-4)
            same = torch.allclose(out[sample], plain[number][sample], atol=1e-5)
            assert same == (number in (0, 1, 4)), "computed steps are exact, reused ones are not"
    assert moved > 6, "the kept cells should change from step to step"


def run_walk_plain(model, steps, **budget):
    with torch.no_grad():
        return [model(*step, **budget) for step in steps]


@pytest.mark.parametrize(
    "stage", [TeaCache(0.0), FirstBlockCache(0.0), TaylorSeer(interval=1)], ids=lambda s: s.name
)
@pytest.mark.parametrize("layout", ["packed", "fixed"])
def test_nothing_reused_changes_nothing(stage, layout):
    model, steps = make_model(layout), make_walk()
    budget = {"keep": 0.5} if layout == "fixed" else {"keep": [0.2, 0.9, 0.5]}
    empty = adaptok.wrap(copy.deepcopy(model), stack=[TeaCache(9.0)])
    # no request: the same way through the groups, and no cache
    with torch.no_grad(), pytest.warns(IdleCacheWarning, match="does not know whose"):
        expected = [empty(*step, **budget) for step in steps]
    wrapped = adaptok.wrap(model, stack=[copy.deepcopy(stage)])
    for out, other in zip(run_walk(wrapped, steps, **budget), expected, strict=True):
        assert torch.equal(out, other)
    assert wrapped.backbone.blocks.stages[0].reused == 0


@pytest.mark.parametrize(
    "make", [lambda: TeaCache(0.5), lambda: FirstBlockCache(0.6)], ids=["teacache", "firstblock"]
)
def test_a_sample_does_not_see_its_batch_mates(make):
    model, steps = make_model(), make_walk()
    keeps = [0.2, 0.9, 0.5]
    together_model = adaptok.wrap(copy.deepcopy(model), stack=[make()])
    together = run_walk(together_model, steps, keep=keeps)
    assert together_model.backbone.blocks.stages[0].reused > 0
    for sample, keep in enumerate(keeps):
        alone_model = adaptok.wrap(copy.deepcopy(model), stack=[make()])
        alone = run_walk(alone_model, pick(steps, sample), keep=keep)
        for one, all_of_them in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[sample], rtol=1e-4, atol=1e-4)


def test_groups_that_join_and_part_keep_their_histories():
    """Samples run together where they keep as many tokens, which changes from step to step."""
    model, steps = make_model(), make_walk()
    keeps = [[0.5, 0.5, 0.5], [0.5, 0.2, 0.5], [0.3, 0.3, 0.9], [0.4, 0.4, 0.4]]
    together_model = adaptok.wrap(copy.deepcopy(model), stack=[TaylorSeer(interval=4)])
    request = adaptok.request(together_model, "one")
    with torch.no_grad(), request, adaptok.trace(together_model) as seen:
        together = [together_model(*s, keep=k) for s, k in zip(steps, keeps, strict=False)]
    stage = together_model.backbone.blocks.stages[0]
    assert (stage.computed, stage.reused) == (6, 6)
    assert stage.last_computed == (False,) * 3
    assert [step.reused.tolist() for step in seen.steps] == [[False] * 3] * 2 + [[True] * 3] * 2
    for sample in range(3):
        alone_model = adaptok.wrap(copy.deepcopy(model), stack=[TaylorSeer(interval=4)])
        with torch.no_grad(), adaptok.request(alone_model, "one"):
            for step, keep, expected in zip(pick(steps, sample), keeps, together, strict=False):
                out = alone_model(*step, keep=keep[sample])
                torch.testing.assert_close(out[0], expected[sample], rtol=1e-4, atol=1e-4)


def test_calibration_compares_cells_and_not_tokens():
    model, steps = make_model(), make_walk()
    wrapped = adaptok.wrap(model, stack=["teacache"])

    def walk(some):
        run_walk_plain(some, steps, keep=[0.2, 0.9, 0.5])

    profile = adaptok.calibrate(wrapped, [walk, walk], wanted={"teacache": {"degree": 2}})
    figures = profile.stages["teacache"].figures
    assert figures["pairs"] + figures["pairs_held_out"] == 2 * 3 * (len(TIMES) - 1)
    assert figures["r2"] > 0


def test_places_of_tokens():
    from adaptok.dc.nearest import find_nearest

    cells = torch.tensor([[1, 4], [0, 5]])
    standing = Standing(cells, (2, 3), find_nearest)
    x = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    assert standing.spread(x)[..., 0].tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 4, 3, 4, 4]]
    assert torch.equal(standing.gather(standing.spread(x)), x)
    assert standing.select(torch.tensor([1])).spread(x[1:])[0, :, 0].tolist() == [3, 3, 4, 3, 4, 4]


def test_a_wrong_batch_size_between_steps_begins_anew():
    model, steps = make_model(), make_walk()
    wrapped = adaptok.wrap(model, stack=[TaylorSeer(interval=3)])
    with torch.no_grad(), adaptok.request(wrapped, "one"):
        for step in steps[:2]:
            wrapped(*step, keep=0.5)
        expected = wrapped(*(part[:2] for part in steps[2]), keep=0.5)
    assert wrapped.backbone.blocks.stages[0].reused == 0
    plain = adaptok.unwrap(wrapped)(*(part[:2] for part in steps[2]), keep=0.5)
    torch.testing.assert_close(expected, plain, rtol=1e-5, atol=1e-5)
