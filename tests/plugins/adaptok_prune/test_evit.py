"""EViT against loops, and inside hosts of several families."""

import math

import pytest
import torch
from adaptok_prune.evit import EViT
from prune_oracles import (
    BLOCKS,
    CELLS,
    DEPTH,
    IMAGES,
    attend,
    count_evit,
    enter,
    make_model,
    prune_evit,
    run_traced,
)
from torch._dynamo.testing import CompileCounter

import adaptok
from adaptok import BlockCall, Moment, Provenance, Site
from benchmarks.architectures import find_case


def wrap_evit(vit=None, budget=None, **options):
    options = {"name": "evit", "blocks": BLOCKS} | options
    return adaptok.wrap(vit or make_model(), stack=[options], budget=budget)


def natural_counts(rate, fuse):
    counts, m = {}, CELLS
    for block in BLOCKS:
        m = counts[block] = count_evit(rate, m, fuse=fuse)
    return counts


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("rate", [0.7, 0.35])
def test_natural_counts_equal_the_loop(rate, fuse):
    plain = make_model()
    vit = wrap_evit(keep_rate=rate, fuse=fuse)
    counts = natural_counts(rate, fuse)
    found, plan = run_traced(vit)
    assert [event.counts[0] for event in plan.events] == list(counts.values())
    for sample, image in enumerate(IMAGES):
        expected, events = prune_evit(plain, image, counts, fuse=fuse)
        assert [tuple(event.owner[sample].tolist()) for event in plan.events] == events
        assert torch.allclose(found[sample], plain.norm(expected), atol=2e-4)
    lost = plan.provenance.token < 0
    assert bool(lost.any()) is not fuse


@pytest.mark.parametrize("fuse", [True, False])
def test_budgets_of_each_sample_equal_the_loop(fuse):
    plain = make_model()
    keeps = [0.3, 0.9, 0.05]
    vit = wrap_evit(fuse=fuse, budget={"keep": keeps})
    found, plan = run_traced(vit)
    finals = [max(1, math.floor(keep * CELLS + 0.5)) for keep in keeps]
    assert plan.computed.tolist() == finals
    for sample, (image, final) in enumerate(zip(IMAGES, finals, strict=True)):
        steps = [math.floor(CELLS * (final / CELLS) ** (i / 3) + 0.5) for i in (1, 2)]
        counts = dict(zip(BLOCKS, [*steps, final], strict=True))
        expected, events = prune_evit(plain, image, counts, fuse=fuse)
        assert [tuple(event.owner[sample].tolist()) for event in plan.events] == events
        assert torch.allclose(found[sample], plain.norm(expected), atol=2e-4)


@pytest.mark.parametrize("budget", [{"keep": [0.3, 0.9, 0.5]}, {"tokens": 7}, {}, {"drop": 0.5}])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_sample_is_the_same_alone(budget, fuse):
    vit = wrap_evit(fuse=fuse)
    with adaptok.budget(vit, **budget):
        together, plan = run_traced(vit)
    for sample in range(3):
        own = {name: v[sample] if isinstance(v, list) else v for name, v in budget.items()}
        with adaptok.budget(vit, **own):
            alone, single = run_traced(vit, IMAGES[sample : sample + 1])
        assert single.computed.tolist() == plan.computed[sample : sample + 1].tolist()
        assert torch.equal(single.provenance.token[0], plan.provenance.token[sample])
        assert torch.allclose(alone[0], together[sample], atol=1e-4)


@pytest.mark.parametrize("fuse", [True, False])
def test_every_cell_kept_is_the_host_bit_for_bit(fuse):
    images = IMAGES
    expected = make_model()(images)
    vit = wrap_evit(fuse=fuse, budget=1.0)
    assert torch.equal(vit(images), expected)
    vit = wrap_evit(fuse=fuse, keep_rate=1.0)
    with adaptok.trace(vit) as seen:
        assert torch.equal(vit(images), expected)
    assert [event.counts[0] for event in seen.steps[0].plans[0].events] == [CELLS] * 3


class TestFusedToken:
    """What the fused token is, on made-up attention."""

    def decide(self, score, counts=None, m=None, **options):
        score = torch.tensor(score)
        b, m = score.shape
        x = torch.arange(1.0, m + 1)[None, :, None].expand(b, m, 1)
        call = BlockCall(x, (m,), has_class=True)
        heads = torch.stack([2 * score, 0 * score], dim=1)  # their mean is the score
        moment = Moment(
            Site(0, "between"), 0, 1, call, torch.ones(b, m), torch.arange(m).expand(b, m),
            counts, class_attention=heads,
        )  # fmt: skip
        return EViT(**options).reduce(moment)

    def test_weights_are_the_attention_itself(self):
        made = self.decide([[0.1, 0.4, 0.2, 0.25]], (3,))
        assert made.places.tolist() == [[1, 3, 2]]  # the best of the rest gives its place
        assert made.owner.tolist() == [[2, 0, 2, 1]]
        assert torch.allclose(made.x.flatten(), torch.tensor([2.0, 4.0, 0.1 * 1 + 0.2 * 3]))

    def test_one_token_is_the_sum_of_all(self):
        made = self.decide([[0.5, 0.25, 0.25]], (1,))
        assert made.places.tolist() == [[0]]
        assert made.owner.tolist() == [[0, 0, 0]]
        assert made.x.item() == pytest.approx(0.5 + 0.5 + 0.75)

    def test_where_nothing_goes_nothing_is_fused(self):
        made = self.decide([[0.1, 0.4, 0.2], [0.3, 0.2, 0.1]], (3, 2))
        assert made.lengths == (3, 2)
        assert made.owner.tolist() == [[0, 1, 2], [0, 1, 1]]
        assert made.x[0].flatten().tolist() == [1.0, 2.0, 3.0]
        assert torch.allclose(made.x[1, :2, 0], torch.tensor([1.0, 0.2 * 2 + 0.1 * 3]))

    def test_no_token_is_fused_with_itself_alone(self):
        made = self.decide([[0.1, 0.4, 0.2]], keep_rate=0.6)  # two stay: one would be left over
        assert made.owner.tolist() == [[0, 1, 2]]
        assert made.x.flatten().tolist() == [1.0, 2.0, 3.0]

    def test_equal_scores_keep_the_first(self):
        made = self.decide([[0.25] * 4], (2,), fuse=False)
        assert made.owner.tolist() == [[0, 1, -1, -1]]
        assert made.x is None

    def test_shares_that_round_up_by_rounding_errors_only(self):
        assert 0.55 * 100 > 55
        assert EViT(keep_rate=0.55, fuse=False).leave(100) == 55
        assert EViT().count_naturally(196, 3) == 71  # 138 + 1, 98 + 1, 70 + 1


def test_class_attention_is_that_of_explicit_softmax():
    vit = make_model()
    seen = []

    class Watching(EViT):
        def reduce(self, moment):
            seen.append(moment.class_attention)
            return super().reduce(moment)

    plain = make_model()
    adaptok.wrap(vit, stack=[Watching(blocks=(0,))], verify=False)
    with torch.no_grad():
        vit(IMAGES)
        for sample, image in enumerate(IMAGES):
            _, weights = attend(plain.blocks[0], enter(plain, image[None])[0])
            assert torch.allclose(seen[0][sample], weights[:, 1:], atol=1e-6)
    assert torch.all(seen[0].sum(-1) < 1)  # the class token's own share is left out


def test_fused_attention_stays():
    """The weights of one row are all that is computed beside."""
    from torch.nn.functional import scaled_dot_product_attention

    vit = wrap_evit()
    calls = []
    assert vit.blocks[0].attn.fused_attn

    class Listen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is scaled_dot_product_attention:
                calls.append(function)
            return function(*args, **(kwargs or {}))

    with Listen(), torch.no_grad():
        vit(IMAGES)
    assert len(calls) == DEPTH


def test_fill_and_last_features_of_dropped_cells():
    plain = make_model()
    counts = {1: 12}
    kept = {"fuse": False, "blocks": (1,), "budget": {"tokens": 12}}
    last, plan = run_traced(wrap_evit(**kept))
    zeros, _ = run_traced(wrap_evit(**kept, fill=0.0))
    gone = plan.provenance.token < 0
    assert gone.sum(1).tolist() == [12] * 3
    empty = plain.norm(torch.zeros(96)).detach()
    assert torch.allclose(zeros[:, 1:][gone], empty.expand(36, -1), atol=1e-5)
    assert torch.equal(zeros[:, 1:][~gone], last[:, 1:][~gone])
    expected, _ = prune_evit(plain, IMAGES[0], counts, fuse=False)
    assert torch.allclose(last[0], plain.norm(expected), atol=2e-4)


HOSTS = [
    "timm/vit_small_patch14_reg4_dinov2",
    "timm/eva02_base_patch16_clip_224",
    "timm/deit_tiny_distilled_patch16_224",
    "transformers/clip",
    "transformers/dinov2_registers",
]


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_with_a_class_token(name):
    """Registers stay, counts of each sample hold, and a sample is the same alone."""
    case = find_case(name)
    model = case.build()
    with torch.no_grad():
        before = case.run(model, case.inputs(model))
    stage = Counting(blocks=(1, 2))
    adaptok.wrap(model, stack=[stage], budget={"keep": [0.3, 0.9, 0.6]})
    stage.prefixes.clear()
    inputs = case.inputs(model)
    with adaptok.trace(model) as seen, torch.no_grad():
        out = case.run(model, inputs)
    n = math.prod(case.cells)
    assert seen.steps[0].kept.tolist() == [math.floor(k * n + 0.5) for k in (0.3, 0.9, 0.6)]
    assert set(stage.prefixes) == {case.prefix}
    assert (out - before).abs().max() > 1e-3 * before.abs().max()
    with adaptok.budget(model, keep=0.3), torch.no_grad():
        alone = case.run(model, case.one(inputs, 0))
    assert (alone[0] - out[0]).abs().max() < 1e-4 * out.abs().max()
    with adaptok.budget(model, keep=1.0), torch.no_grad():
        full = case.run(model, inputs)
    assert (full - before).abs().max() <= 1e-5 * before.abs().max()


class Counting(EViT):
    """Notes the tokens in front of the grid."""

    def __init__(self, **options):
        super().__init__(**options)
        self.prefixes = []

    def reduce(self, moment):
        self.prefixes.append(moment.call.x.shape[1] - moment.x.shape[1])
        return super().reduce(moment)


class KeepEven(adaptok.ReduceStage):
    """Merges each odd cell into the even one in front of it, before a block."""

    def __init__(self, block):
        super().__init__("even")
        self.block = block

    def find_sites(self, inner):
        return [Site(self.block)] if inner.first <= self.block < inner.last else []

    def reduce(self, moment):
        b, m = moment.sizes.shape
        places = torch.arange(0, m, 2).expand(b, -1)
        return adaptok.Reduction(places, (torch.arange(m) // 2).expand(b, -1))


@pytest.mark.parametrize("fuse", [True, False])
def test_a_stack_with_merging_is_one_loop(fuse):
    """Cells, pairs of them, and what EViT leaves of the pairs."""
    vit = adaptok.wrap(
        make_model(),
        stack=[KeepEven(1), {"name": "evit", "blocks": (2, 3), "fuse": fuse, "keep_rate": 0.5}],
        verify=False,
    )
    found, plan = run_traced(vit)
    assert [event.stage for event in plan.events] == ["even", "evit", "evit"]
    counts = [event.counts[0] for event in plan.events]
    assert counts == [12, 6 + fuse, (4 + 1) if fuse else 3]
    pairs = torch.arange(CELLS) // 2
    for earlier, later in zip(plan.events, plan.events[1:], strict=False):
        for sample in range(3):
            old, new = earlier.owner[sample], later.owner[sample]
            for token in range(earlier.counts[sample]):
                assert len(set(new[old == token].tolist())) == 1  # tokens go as one
            assert torch.all(new[old < 0] == -1)
    assert torch.equal(plan.events[0].owner[0], pairs)
    assert isinstance(plan.provenance, Provenance)
    assert torch.equal(plan.provenance.token, plan.events[-1].owner)
    # a pair has the same features in the end
    cells = found[:, 1:].unflatten(1, (12, 2))
    alive = (plan.provenance.token >= 0).unflatten(1, (12, 2))
    assert torch.equal(alive[..., 0], alive[..., 1])
    assert torch.equal(cells[:, :, 0][alive[..., 0]], cells[:, :, 1][alive[..., 0]])


def test_one_graph_for_a_budget():
    vit = wrap_evit(budget={"tokens": 9})
    counter = CompileCounter()
    graph = torch.compile(vit, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = vit(IMAGES)
        assert torch.allclose(graph(IMAGES), expected, atol=1e-4)
        assert torch.allclose(graph(IMAGES * 0.5), vit(IMAGES * 0.5), atol=1e-4)
    assert counter.frame_count == 1


def test_natural_counts_compile():
    vit = wrap_evit()
    with torch.no_grad():
        expected = vit(IMAGES)
        graph = torch.compile(vit, fullgraph=True, backend="eager")
        assert torch.allclose(graph(IMAGES), expected, atol=1e-4)


def test_keep_rate_may_change_between_calls():
    vit = wrap_evit(keep_rate=0.9)
    stage = vit.blocks.adaptok["evit"]
    stage.keep_rate = 0.5
    _, plan = run_traced(vit)
    assert plan.events[0].counts == (13, 13, 13)
    with pytest.raises(adaptok.AdaptokError, match=r"keep_rate is a share in \(0, 1\], got 1.2"):
        stage.keep_rate = 1.2
    assert stage.keep_rate == 0.5


def test_training_reaches_the_fused_tokens():
    vit = wrap_evit(keep_rate=0.3).train()
    images = IMAGES.clone().requires_grad_()
    vit(images).square().sum().backward()
    patches = images.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax((1, 4, 5)).flatten(1)
    assert torch.all(patches > 0)  # cells that are fused, too


def test_half_precision_ranks_in_float32():
    vit = wrap_evit(budget=0.4).to(torch.bfloat16)
    with adaptok.trace(vit) as seen, torch.no_grad():
        out = vit(IMAGES.bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert seen.steps[0].kept.tolist() == [10] * 3


def test_save_and_load(tmp_path):
    vit = wrap_evit(keep_rate=0.4, fuse=False, fill=0.0)
    adaptok.save(vit, tmp_path / "adapter")
    other = adaptok.load(make_model(), tmp_path / "adapter")
    stage = other.blocks.adaptok["evit"]
    assert (stage.blocks, stage.keep_rate, stage.fuse, stage.fill) == (BLOCKS, 0.4, False, 0.0)
    with torch.no_grad():
        assert torch.equal(other(IMAGES), vit(IMAGES))
