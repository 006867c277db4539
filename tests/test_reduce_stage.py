"""The loop of token reduction: counts, groups, provenance, restoring, stacks."""

import pytest
import torch
from reducers import DropOdd, Leave, MergeEnd

import adaptok
from adaptok.chunking import ChunkPlan, Provenance
from adaptok.errors import BudgetError, ConfigError, ReductionError, StackError
from adaptok.plan_notes import PlanNote, join_notes, trace_cells
from adaptok.reductions import Reduction, restore_cells, schedule_by_share, schedule_evenly
from adaptok.routing import Routing
from adaptok.testing import check_stage, make_vit
from adaptok.testing.models import fill_weights

IMAGES = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def make_host():
    return fill_weights(make_vit()).eval()


def run(model, images=IMAGES):
    with torch.no_grad(), adaptok.trace(model) as seen:
        out = model(images)
    return out, seen.steps[0]


@pytest.mark.parametrize("stage", [MergeEnd, DropOdd])
def test_the_kit_passes_and_one_graph_compiles(stage):
    check_stage(stage).raise_failed()


@pytest.mark.parametrize("restore", ["copy", "update"])
def test_nothing_taken_is_bit_exact_and_the_loop_ran(restore):
    host = make_host()
    expected = host(IMAGES)
    model = adaptok.wrap(host, stack=[MergeEnd(r=0, restore=restore)], verify=False)
    out, step = run(model)
    assert torch.equal(out, expected)
    assert len(step.plans[0].events) == 3  # a site at each block


def test_merging_follows_a_loop_over_samples_and_tokens():
    host = make_host()
    model = adaptok.wrap(host, stack=[MergeEnd(r=2, bias=False)], verify=False)
    out, step = run(model)
    adaptok.unwrap(model)
    with torch.no_grad():
        outs = []
        for image in IMAGES:
            x = host._pos_embed(host.patch_embed(image[None]))
            sizes = [1] * 24
            for block in host.blocks:
                x = x + block.ls1(block.attn(block.norm1(x)))
                cells = x[0, 1:]
                group, count = cells[len(sizes) - 3 :], sizes[-3:]
                mean = sum(s * t for s, t in zip(count, group, strict=True)) / sum(count)
                sizes = [*sizes[:-3], sum(count)]
                x = torch.cat([x[:, :1], cells[None, : len(sizes) - 1], mean[None, None]], dim=1)
                x = x + block.ls2(block.mlp(block.norm2(x)))
            outs.append(host.forward_head(host.norm(x)))
    torch.testing.assert_close(out, torch.cat(outs), rtol=1e-5, atol=1e-5)
    assert step.kept.tolist() == [18, 18, 18]
    token = step.provenance.token[0]
    assert token.bincount().tolist() == [1] * 17 + [7]


def test_counts_per_sample_do_not_depend_on_batch_mates():
    model = adaptok.wrap(make_host(), stack=[MergeEnd()], budget=1.0)
    keeps = [0.3, 0.9, 0.5]
    with adaptok.budget(model, keep=keeps):
        together, step = run(model)
    assert step.kept.tolist() == [7, 22, 12]
    assert step.plans[0].events[0].counts == (19, 24, 20)
    for sample, keep in enumerate(keeps):
        with adaptok.budget(model, keep=keep):
            alone, single = run(model, IMAGES[sample : sample + 1])
        torch.testing.assert_close(alone[0], together[sample], rtol=1e-5, atol=1e-6)
        assert torch.equal(single.provenance.token[0], step.provenance.token[sample])


def test_dropped_cells_keep_their_last_features_or_are_filled():
    host = make_host()
    with torch.no_grad():
        expected = host.blocks[0](host._pos_embed(host.patch_embed(IMAGES)))
    for fill in (None, 7.0):
        stage = DropOdd(block=1, fill=fill)
        model = adaptok.wrap(make_host(), stack=[stage])
        tokens = []
        model.norm.register_forward_pre_hook(lambda _, args, tokens=tokens: tokens.append(args[0]))
        _, step = run(model)
        assert step.provenance.token[0, :4].tolist() == [0, -1, 1, -1]
        cells, before = tokens[0][:, 1:], expected[:, 1:]
        wanted = before[:, 1::2] if fill is None else torch.full_like(before[:, 1::2], fill)
        torch.testing.assert_close(cells[:, 1::2], wanted)
        assert not torch.allclose(cells[:, ::2], before[:, ::2])


def test_neighbours_share_one_loop():
    model = adaptok.wrap(make_host(), stack=[MergeEnd(r=2), DropOdd(block=1)], verify=False)
    _, step = run(model)
    assert step.stages == ("merge-end+drop-odd",)
    events = [(event.stage, event.site.block, event.counts[0]) for event in step.plans[0].events]
    assert events == [
        ("merge-end", 0, 22),
        ("drop-odd", 1, 11),
        ("merge-end", 1, 9),
        ("merge-end", 2, 7),
    ]
    token = step.provenance.token[0]
    assert token.max() == 6
    assert token[:4].tolist() == [0, -1, 1, -1]
    fresh = make_host()
    adaptok.wrap(fresh, stack=[MergeEnd(r=2), DropOdd(block=1, fill=0.0)], verify=False)
    with pytest.raises(StackError, match=r"'merge-end' and 'drop-odd' share one loop and restore"):
        fresh(IMAGES)


@pytest.mark.parametrize("grouped", [False, True])
def test_provenance_goes_through_a_chunker_and_what_runs_inside_it(grouped):
    model = adaptok.wrap(
        make_host(), chunker="dc", router="norm", stack=[MergeEnd(r=2)], budget=0.5
    )
    with adaptok.budget(model, keep=[0.3, 0.9, 0.5] if grouped else 0.5):
        out, step = run(model)
    assert step.stages == ("dc", "merge-end")
    outer, inner = step.plans
    for sample in range(3):
        for cell in range(24):
            first = int(outer.provenance.token[sample, cell])
            assert step.provenance.token[sample, cell] == inner.provenance.token[sample, first]
    if grouped:
        assert outer.computed.tolist() == [7, 22, 12]
        assert step.kept.tolist() == [2, 20, 6]  # the same share again of what came
        with adaptok.budget(model, keep=0.9):
            alone, _ = run(model, IMAGES[1:2])
        torch.testing.assert_close(alone[0], out[1], rtol=1e-5, atol=1e-5)


def test_a_stage_that_runs_its_blocks_in_pieces_ends_with_the_last_plan_of_each_sample():
    model = adaptok.wrap(make_host(), stack=[Leave(), MergeEnd(r=2)], verify=False)
    _, step = run(model)
    assert step.stages == ("merge-end", "merge-end")
    full, part = step.plans
    assert full.computed.tolist() == [22, 22, 22]  # one block
    assert part.computed.tolist() == [20, 0, 20]  # the other two, for the samples that stayed
    assert step.provenance.token.amax(1).tolist() == [19, 21, 19]


def test_schedules_end_where_they_should():
    assert schedule_evenly(24, 24, 3) == (24, 24, 24)
    assert schedule_evenly(7, 1, 4)[-1] == 1
    assert schedule_by_share(10, 1, 2) == (3, 1)


def test_update_moves_cells_as_far_as_their_token_moved():
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(2, 5, 3, generator=generator)
    owner = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 0, -1, 1]])
    x = torch.randn(2, 2, 3, generator=generator)
    lost = torch.randn(2, 5, 3, generator=generator)
    found = restore_cells(x, owner, before, lost, "update")
    for sample in range(2):
        for cell in range(5):
            mine = int(owner[sample, cell])
            if mine < 0:
                assert torch.equal(found[sample, cell], lost[sample, cell])
                continue
            members = [other for other in range(5) if owner[sample, other] == mine]
            mean = before[sample, members].mean(0)
            wanted = before[sample, cell] + x[sample, mine] - mean
            torch.testing.assert_close(found[sample, cell], wanted)


class Broken(MergeEnd):
    def __init__(self, answer):
        super().__init__("broken")
        self.answer = answer

    def reduce(self, moment):
        return self.answer


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        (
            Reduction(torch.zeros(3, 2, dtype=torch.long), torch.full((3, 24), 2)),
            "'broken' points at tokens that are not there: .* owners from 2 to 2 of 2",
        ),
        (
            Reduction(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 23, dtype=torch.long)),
            r"owners of the shape \(3, 23\) for \(3, 24\) tokens",
        ),
        (
            Reduction(torch.zeros(3, 25, dtype=torch.long), torch.zeros(3, 24, dtype=torch.long)),
            "made 25 tokens of 24",
        ),
    ],
)
def test_wrong_decisions_are_refused(reduction, message):
    model = adaptok.wrap(make_host(), stack=[Broken(reduction)], verify=False)
    with pytest.raises(ReductionError, match=message):
        model(IMAGES)


def test_cells_without_a_token_must_be_declared():
    owner = torch.full((3, 24), -1)
    model = adaptok.wrap(
        make_host(), stack=[Broken(Reduction(torch.zeros(3, 1, dtype=torch.long), owner))],
        verify=False,
    )  # fmt: skip
    with pytest.raises(ReductionError, match="does not say so: put `drops = True`"):
        model(IMAGES)


def test_weights_of_cells_stay_where_a_later_plan_does_not_know_a_sample():
    def note(tokens, weight, samples):
        plan = ChunkPlan(
            (1, 2), "fixed", Routing(torch.ones(len(tokens), 2)),
            torch.ones(len(tokens), 2, dtype=torch.bool), torch.tensor(tokens),
            Provenance(torch.tensor(tokens), weight),
        )  # fmt: skip
        return PlanNote("one", plan.routing, plan, samples)

    first = note([[0, 1], [0, 0]], torch.tensor([[0.5, 1.0], [0.25, 1.0]]), None)
    later = note([[1, 0]], None, (0,))
    found = trace_cells(join_notes([first, later], 2), ["one"], 2, 2, torch.device("cpu"))
    assert found.token.tolist() == [[1, 0], [0, 0]]
    assert found.weight.tolist() == [[1.0, 1.0], [0.25, 1.0]]


def test_bad_options_are_refused():
    with pytest.raises(ConfigError, match="restore is one of copy, update, got 'paste'"):
        MergeEnd(restore="paste")
    model = adaptok.wrap(make_host(), stack=[NoCount()], budget=0.5)
    with adaptok.budget(model, drop=0.5), pytest.raises(BudgetError, match="'no-count' has none"):
        model(IMAGES)


class NoCount(MergeEnd):
    def __init__(self):
        super().__init__("no-count")

    def count_naturally(self, n, steps):
        return None


def test_a_stage_that_does_not_follow_its_budget_is_refused():
    class KeepAll(adaptok.ReduceStage):
        """Follows one count for all, and forgets that samples may have their own."""

        def __init__(self):
            super().__init__("keep-all")

        def find_sites(self, inner):
            return [adaptok.Site(inner.first)]

        def reduce(self, moment):
            count = moment.count or moment.x.shape[1]
            places = torch.arange(count).expand(len(moment.x), -1)
            owner = torch.arange(moment.x.shape[1]).clamp(max=count - 1)
            return adaptok.Reduction(places, owner.expand(len(moment.x), -1))

    model = adaptok.wrap(make_host(), stack=[KeepAll()], budget=0.5)
    assert run(model)[1].kept.tolist() == [12] * len(IMAGES)
    counts = [24, 5, 12]
    with (
        adaptok.budget(model, tokens=counts),
        pytest.raises(ReductionError, match=r"left \[24, 24, 24\] tokens .* leaves \[24, 5, 12\]"),
    ):
        run(model)
