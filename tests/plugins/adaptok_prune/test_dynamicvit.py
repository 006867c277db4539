"""DynamicViT: inference against loops, and training that learns."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from adaptok_prune import dynamicvit
from adaptok_prune.distilling import distillation_loss
from adaptok_prune.dynamicvit import DynamicViT
from prune_oracles import (
    BLOCKS,
    CELLS,
    DEPTH,
    IMAGES,
    attend,
    enter,
    finish,
    make_model,
    prune_dynamic,
    run_traced,
)
from torch._dynamo.testing import CompileCounter

import adaptok
from adaptok import Site
from adaptok.testing import fill_weights
from benchmarks.architectures import find_case

NATURAL = dict(zip(BLOCKS, (16, 11, 8), strict=True))  # 24 times .7, .49 and .343


def wrap_dynamic(budget=None, **options):
    options = {"name": "dynamicvit", "blocks": BLOCKS} | options
    vit = adaptok.wrap(make_model(), stack=[options], budget=budget)
    stage = fill_weights(stage_of(vit), seed=3)
    for predictor in stage.predictors:
        torch.nn.init.zeros_(predictor.decide.bias)  # or all tokens would be of one mind
    return vit


def stage_of(model):
    (stage,) = (m for m in model.modules() if isinstance(m, DynamicViT))
    return stage


def train_mode(vit):
    """Only the stage is in training: the host draws nothing."""
    stage_of(vit).train()
    return vit


def test_natural_counts_equal_the_loop():
    plain = make_model()
    vit = wrap_dynamic()
    found, plan = run_traced(vit)
    assert [event.site for event in plan.events] == [Site(block) for block in BLOCKS]
    for sample, image in enumerate(IMAGES):
        expected, events = prune_dynamic(plain, stage_of(vit).predictors, image, NATURAL)
        assert [tuple(event.owner[sample].tolist()) for event in plan.events] == events
        assert torch.allclose(found[sample], plain.norm(expected), atol=2e-4)
    assert (plan.provenance.token < 0).sum(1).tolist() == [CELLS - 8] * 3
    kept = plan.keep_mask
    assert not torch.equal(kept[0], kept[1])  # what goes depends on the image


def test_budgets_of_each_sample_equal_the_loop():
    plain = make_model()
    vit = wrap_dynamic(budget={"keep": [0.3, 0.9, 0.05]})
    found, plan = run_traced(vit)
    finals = [7, 22, 1]
    assert plan.computed.tolist() == finals
    for sample, (image, final) in enumerate(zip(IMAGES, finals, strict=True)):
        steps = [math.floor(CELLS * (final / CELLS) ** (i / 3) + 0.5) for i in (1, 2)]
        counts = dict(zip(BLOCKS, [*steps, final], strict=True))
        expected, events = prune_dynamic(plain, stage_of(vit).predictors, image, counts)
        assert [tuple(event.owner[sample].tolist()) for event in plan.events] == events
        assert torch.allclose(found[sample], plain.norm(expected), atol=2e-4)


def test_every_cell_kept_is_the_host_bit_for_bit():
    expected = make_model()(IMAGES)
    assert torch.equal(wrap_dynamic(budget=1.0)(IMAGES), expected)
    assert torch.equal(wrap_dynamic(base_rate=1.0)(IMAGES), expected)


def test_natural_counts_of_the_paper():
    stage = DynamicViT(16)
    assert [stage.count_naturally(196, step) for step in (1, 2, 3)] == [137, 96, 67]
    assert stage.count_naturally(1, 3) == 1
    assert DynamicViT(16, base_rate=0.1).count_naturally(10, 1) == 1
    assert stage.schedule(196, 67, 3) == (137, 96, 67)


def test_drop_is_a_share_of_the_natural_count():
    vit = wrap_dynamic(budget={"drop": 0.5})
    _, plan = run_traced(vit)
    assert plan.computed.tolist() == [4, 4, 4]


def test_fill_and_last_features_of_dropped_cells():
    plain = make_model()
    vit = wrap_dynamic(blocks=(2,), fill=0.0, budget={"tokens": 10})
    zeros, plan = run_traced(vit)
    gone = plan.provenance.token < 0
    assert gone.sum(1).tolist() == [14] * 3
    empty = plain.norm(torch.zeros(96)).detach()
    assert torch.allclose(zeros[:, 1:][gone], empty.expand(42, -1), atol=1e-5)


@pytest.mark.parametrize("budget", [{"keep": [0.3, 0.9, 0.5]}, {}])
def test_a_sample_is_the_same_alone(budget):
    vit = wrap_dynamic()
    with adaptok.budget(vit, **budget):
        together, plan = run_traced(vit)
    for sample in range(3):
        own = {name: v[sample] for name, v in budget.items()}
        with adaptok.budget(vit, **own):
            alone, single = run_traced(vit, IMAGES[sample : sample + 1])
        assert torch.equal(single.provenance.token[0], plan.provenance.token[sample])
        assert torch.allclose(alone[0], together[sample], atol=1e-4)


@pytest.mark.parametrize(
    "name", ["timm/vit_base_patch16_siglip_224", "timm/vit_base_patch16_xp_224", "facebook/dit"]
)
def test_hosts_without_class_token_or_split_form(name):
    case = find_case(name)
    model = case.build()
    with torch.no_grad():
        before = case.run(model, case.inputs(model))
    adaptok.wrap(model, stack=["dynamicvit"], budget={"keep": [0.3, 0.9, 0.6]})
    with adaptok.trace(model) as seen, torch.no_grad():
        out = case.run(model, case.inputs(model))
    n = math.prod(case.cells)
    assert seen.steps[0].kept.tolist() == [math.floor(k * n + 0.5) for k in (0.3, 0.9, 0.6)]
    assert (out - before).abs().max() > 1e-4 * before.abs().max()
    adaptok.unwrap(model)
    with torch.no_grad():
        assert torch.equal(case.run(model, case.inputs(model)), before)


class TestTraining:
    def test_nothing_is_removed_and_no_budget_counts(self):
        vit = train_mode(wrap_dynamic(budget={"tokens": 3}))
        with stage_of(vit).collect_masks() as masks:
            _, plan = run_traced(vit)
        assert plan.computed.tolist() == [CELLS] * 3
        assert len(masks) == 3
        for mask in masks:
            assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert torch.all(masks[1] <= masks[0])  # who is gone stays gone
        assert torch.all(masks[2] <= masks[1])
        assert 0 < masks[2].sum() < masks[0].sum() < 3 * CELLS
        assert stage_of(vit).masks is None

    def test_hidden_tokens_are_as_good_as_removed(self, monkeypatch):
        """The class token of a training pass sees what inference would leave it."""
        plain = make_model()
        vit = wrap_dynamic()
        expected = vit(IMAGES)
        counts = iter([16, 11, 8])

        def choose_best(log_prob):
            score = log_prob[..., 0]
            mask = masks[-1] if masks else torch.ones_like(score)
            order = score.masked_fill(mask == 0, -math.inf).argsort(1, descending=True)
            return torch.zeros_like(score).scatter(1, order[:, : next(counts)], 1.0)

        monkeypatch.setattr(dynamicvit, "draw_kept", choose_best)
        with stage_of(train_mode(vit)).collect_masks() as masks:
            found = vit(IMAGES)
        assert torch.allclose(found, expected, atol=1e-3)
        assert not torch.allclose(found, plain(IMAGES), atol=0.05)

    def test_hidden_tokens_equal_the_loop(self, monkeypatch):
        """Attention with the logarithm of the mask, written out."""
        plain, vit = make_model(), wrap_dynamic(blocks=(1,))
        kept = torch.arange(CELLS) % 3 != 0
        monkeypatch.setattr(dynamicvit, "draw_kept", lambda p: kept.float().expand(len(p), -1))
        found, _ = run_traced(train_mode(vit))
        with torch.no_grad():
            x = enter(plain, IMAGES[:1])[0]
            for number, block in enumerate(plain.blocks):
                if number == 0:
                    x = finish(block, attend(block, x)[0])
                    continue
                rows = torch.cat([torch.tensor([True]), kept])
                y = block.norm1(x)
                q, k, v = block.attn.qkv(y).view(len(y), 3, 3, -1).permute(1, 2, 0, 3)
                weights = (q @ k.mT * q.shape[-1] ** -0.5)[..., rows].softmax(-1)
                mixed = (weights @ v[:, rows]).transpose(0, 1).flatten(1)
                x = finish(block, x + block.ls1(block.attn.proj(mixed)))
        assert torch.allclose(found[0], plain.norm(x), atol=1e-3)

    def test_draws_come_from_the_default_generator(self):
        vit = train_mode(wrap_dynamic())
        out = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            out.append(vit(IMAGES))
        assert torch.equal(out[0], out[1])
        assert not torch.equal(out[0], out[2])

    def test_the_ratio_loss_is_that_of_the_paper(self):
        vit = train_mode(wrap_dynamic(base_rate=0.6))
        with stage_of(vit).collect_masks() as masks, adaptok.collect_losses(vit) as losses:
            vit(IMAGES)
        expected = 0.0
        for step, mask in enumerate(masks):
            for row in mask:
                expected += 2 * (row.mean().item() - 0.6 ** (step + 1)) ** 2 / 9
        assert losses["ratio"].item() == pytest.approx(expected, rel=1e-5)
        with adaptok.collect_losses(vit.eval()) as losses:
            vit(IMAGES)
        assert not losses

    def test_gradients_reach_every_predictor(self):
        """Through attention alone, without the ratio loss."""
        vit = train_mode(wrap_dynamic())
        vit(IMAGES).square().sum().backward()
        for name, parameter in stage_of(vit).named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name

    def test_checkpointing_changes_nothing(self):
        answers = []
        for checkpointed in (False, True):
            vit = train_mode(wrap_dynamic())
            vit.set_grad_checkpointing(checkpointed)
            vit.train()
            torch.manual_seed(4)
            with stage_of(vit).collect_masks() as masks, adaptok.collect_losses(vit) as losses:
                (vit(IMAGES).square().sum() + losses["ratio"]).backward()
            grads = [p.grad for p in stage_of(vit).parameters()]
            answers.append((losses["ratio"].item(), len(masks), grads))
        assert answers[0][:2] == answers[1][:2]
        assert answers[0][1] == 3
        for first, second in zip(answers[0][2], answers[1][2], strict=True):
            assert torch.allclose(first, second, rtol=1e-4, atol=1e-6)

    def test_a_few_steps_reach_the_ratio_and_lower_the_loss(self):
        """Distillation from the whole model, the predictors alone."""
        teacher = make_model()
        vit = train_mode(wrap_dynamic(base_rate=0.8))
        stage = stage_of(vit)
        vit.requires_grad_(False)
        stage.requires_grad_(True)
        optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3)
        history = []
        with torch.no_grad():
            wanted = teacher.forward_features(IMAGES)
            classes = teacher.forward_head(wanted)
        for _ in range(30):
            with stage.collect_masks() as masks, adaptok.collect_losses(vit) as losses:
                found = vit.forward_features(IMAGES)
            loss = losses["ratio"] + distillation_loss(
                vit.forward_head(found), classes, found[:, 1:], wanted[:, 1:], masks[-1]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append((loss.item(), [mask.mean().item() for mask in masks]))
        early, late = history[:5], history[-5:]

        def distance(part):
            targets = (0.8, 0.64, 0.512)
            misses = [abs(k - t) for _, kept in part for k, t in zip(kept, targets, strict=True)]
            return sum(misses) / len(misses)

        assert sum(loss for loss, _ in late) < 0.7 * sum(loss for loss, _ in early)
        assert distance(late) < 0.6 * distance(early)

    def test_blocks_without_halves_train_not_and_infer(self):
        case = find_case("timm/vit_base_patch16_xp_224")
        model = adaptok.wrap(case.build(), stack=["dynamicvit"], budget=0.5)
        inputs = case.inputs(model)
        case.run(model, inputs)
        message = r"two halves: .*ParallelScalingBlock.*Inference works here \(model.eval\(\)\)"
        with pytest.raises(adaptok.errors.StackError, match=message):
            case.run(model.train(), inputs)

    def test_a_whole_model_in_training_can_be_wrapped(self):
        """The proof of a wrap runs in eval mode."""
        vit = adaptok.wrap(make_model().train(), stack=["dynamicvit"])
        assert vit.training
        assert stage_of(vit).training
        assert vit(IMAGES).isfinite().all()


def test_one_graph_for_a_budget():
    vit = wrap_dynamic(budget={"tokens": 9})
    counter = CompileCounter()
    graph = torch.compile(vit, fullgraph=True, backend=counter)
    with torch.no_grad():
        expected = vit(IMAGES)
        assert torch.allclose(graph(IMAGES), expected, atol=1e-4)
        assert torch.allclose(graph(IMAGES * 0.5), vit(IMAGES * 0.5), atol=1e-4)
    assert counter.frame_count == 1


def test_predictors_stay_float32_in_a_bfloat16_host():
    vit = wrap_dynamic(budget=0.4).to(torch.bfloat16)
    assert {p.dtype for p in stage_of(vit).parameters()} == {torch.float32}
    with adaptok.trace(vit) as seen, torch.no_grad():
        assert vit(IMAGES.bfloat16()).dtype == torch.bfloat16
    assert seen.steps[0].kept.tolist() == [10] * 3


def test_save_and_load(tmp_path):
    vit = wrap_dynamic(base_rate=0.5, fill=0.0)
    adaptok.save(vit, tmp_path / "adapter")
    other = adaptok.load(make_model(), tmp_path / "adapter")
    stage = stage_of(other)
    assert (stage.blocks, stage.base_rate, stage.fill) == (BLOCKS, 0.5, 0.0)
    with torch.no_grad():
        assert torch.equal(other(IMAGES), vit(IMAGES))


def test_a_copy_learns_for_itself():
    vit = wrap_dynamic()
    twin = copy.deepcopy(vit)
    fill_weights(stage_of(twin), seed=9)
    with torch.no_grad():
        assert not torch.equal(twin(IMAGES), vit(IMAGES))


def test_evit_behind_dynamicvit():
    """Two prunings share a loop: cells that one dropped stay dropped."""
    stack = [
        {"name": "dynamicvit", "blocks": (1,), "base_rate": 0.5},
        {"name": "evit", "blocks": (1, 3), "keep_rate": 0.5},
    ]
    vit = adaptok.wrap(make_model(DEPTH), stack=stack, verify=False)
    _, plan = run_traced(vit)
    assert [event.counts[0] for event in plan.events] == [12, 7, 5]
    gone = plan.events[0].owner < 0
    assert gone.sum(1).tolist() == [12] * 3
    assert torch.equal(plan.provenance.token < 0, gone)
    adaptok.set_budget(vit, tokens=6)
    _, plan = run_traced(vit)
    assert plan.computed[0] <= 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_rate": 0.0}, r"base_rate is a share in \(0, 1\], got 0"),
        ({"base_rate": 1.5}, r"base_rate is a share in \(0, 1\], got 1.5"),
        ({"blocks": (2, 2)}, "rise"),
        ({"fuse": True}, "this option does not exist"),
        ({"width": 4}, "at least 8 features"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(adaptok.errors.ConfigError, match=message):
        adaptok.wrap(make_model(), stack=[{"name": "dynamicvit", **options}])


def test_blocks_out_of_range_are_refused():
    with pytest.raises(adaptok.errors.StackError, match="block 7, and the blocks here are 0 to 4"):
        adaptok.wrap(make_model(), stack=[{"name": "dynamicvit", "blocks": (1, 7)}])


def test_loss_of_a_cross_entropy_beside():
    """All losses of the paper in one backward pass."""
    vit = train_mode(wrap_dynamic())
    with adaptok.collect_losses(vit) as losses:
        out = vit(IMAGES)
    (F.cross_entropy(out, torch.tensor([1, 2, 3])) + losses["ratio"]).backward()
    assert vit.blocks[0].attn.qkv.weight.grad.abs().max() > 0
