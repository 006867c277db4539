"""ToMe against loops: on plain ViTs as published, on other hosts with their own blocks."""

import copy

import pytest
import timm
import torch
from adaptok_merge.tome import ToMe
from backbones.split_checks import find_case, relative
from merge_oracles import MergeByHand, run_vit_by_hand

import adaptok
from adaptok.errors import BudgetError, ConfigError, HostOptionError, StackError, WrapError
from adaptok.testing import fill_weights, make_vit

IMAGES = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(3))
SCALED = IMAGES * torch.tensor([1.0, 0.3, 3.0])[:, None, None, None]
HOSTS = [
    "timm/deit3_small_patch16_224",
    "timm/vit_small_patch14_dinov2",
    "timm/vit_small_patch14_reg4_dinov2",
    "timm/eva02_tiny_patch14_224",
    "timm/vit_small_patch16_dinov3",
    "timm/vit_base_patch16_siglip_224",
    "timm/vit_base_patch16_clip_224",
    "timm/beit_base_patch16_224",
    "transformers/clip",
    "transformers/siglip",
    "transformers/dinov2_registers",
    "transformers/dinov3",
    "facebook/dit",
]


def make_plain_vit(depth=12):
    """A plain timm ViT with 196 cells whose images differ from cell to cell."""
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=112, patch_size=8, embed_dim=48, depth=depth, num_heads=3, num_classes=0
    )
    return fill_weights(vit).eval()


def run(model, inputs):
    with torch.no_grad():
        return model(inputs)


def trace(model, *args, **kwargs):
    with adaptok.trace(model) as seen, torch.no_grad():
        model(*args, **kwargs)
    return seen.steps[0]


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("r", [8, 13])
def test_a_plain_vit_is_what_the_paper_says(r, proportional):
    vit = make_plain_vit()
    images = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, groups = run_vit_by_hand(vit, images, [r] * 12, proportional)
    whole = run(vit, images)
    adaptok.wrap(vit, stack=[{"name": "tome", "r": r, "proportional": proportional}])
    found = run(vit, images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert relative(found, whole) > 0.01  # merging matters, or else nothing was tried
    step = trace(vit, images)
    assert step.kept.tolist() == [196 - 12 * r] * 2
    for sample, owner in enumerate(step.provenance.token.tolist()):
        of_cell = {c: number for number, group in enumerate(groups[sample]) for c in group}
        assert owner == [of_cell[cell] for cell in range(196)]


def test_proportional_attention_matters():
    vit = make_plain_vit(4)
    images = torch.randn(2, 3, 112, 112)
    other = adaptok.wrap(copy.deepcopy(vit), stack=[ToMe(30, proportional=False)])
    assert relative(run(other, images), run(adaptok.wrap(vit, stack=[ToMe(30)]), images)) > 1e-3


@pytest.mark.parametrize("name", HOSTS)
def test_none_merged_is_the_host_and_one_merged_the_loop(name):
    case = find_case(name)
    model = case.build()
    inputs = case.inputs(model)
    with torch.no_grad():
        expected = case.run(model, inputs)
        adaptok.wrap(model, stack=["tome"], budget=0.5, verify=False)
        stage = model.get_submodule(case.containers[0]).adaptok["tome"]
        adaptok.set_budget(model)
        stage.r = 0
        assert torch.equal(case.run(model, inputs), expected)
        for r in (1, 4):
            stage.r = r
            found = case.run(model, inputs)
            adaptok.unwrap(model)
            adaptok.wrap(model, stack=[MergeByHand(r)], verify=False)
            by_hand = case.run(model, inputs)
            assert relative(found, by_hand) < 1e-4
            assert relative(found, expected) > 1e-4
            adaptok.unwrap(model)
            adaptok.wrap(model, stack=[stage], verify=False)
    events = trace(model, *inputs.args, **inputs.kwargs).plans[0].events
    n = case.cells[0] * case.cells[1]
    assert [event.counts[0] for event in events] == [n - 4, n - 8, n - 12, n - 16][: len(events)]
    assert all(event.site.where == "between" for event in events)


def test_prefix_tokens_never_merge():
    model = find_case("timm/vit_small_patch14_reg4_dinov2").build()
    adaptok.wrap(model, stack=["tome"], budget=1.0)
    seen = []
    adaptok.set_budget(model, tokens=1)
    block = model.blocks[3]
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    run(model, torch.randn(2, 3, 80, 112))
    assert seen == [5 + 1, 5 + 35]


@pytest.mark.parametrize(
    ("r", "counts"),
    [
        (4, [20, 16, 12]),
        (9, [15, 8, 4]),  # half of what is left, where 9 are more
        ([3, 0, 5], [21, 21, 16]),
        ((4, -1.0), [16, 12, 12]),
        ((4, 1.0), [24, 20, 12]),
        (0, [24, 24, 24]),
        (24, [12, 6, 3]),
    ],
)
def test_how_many_merge_at_each_block(r, counts):
    vit = adaptok.wrap(make_vit(), stack=[{"name": "tome", "r": r}])
    events = trace(vit, IMAGES).plans[0].events
    assert [event.counts for event in events] == [(count,) * 3 for count in counts]
    assert trace(vit, IMAGES).kept.tolist() == [counts[-1]] * 3


@pytest.mark.parametrize(
    "budget",
    [
        {"keep": 0.5},
        {"tokens": 1},
        {"tokens": 24},
        {"keep": [0.1, 0.5, 1.0]},
        {"tokens": [23, 1, 12]},
        {"drop": 0.5},
    ],
)
def test_budgets_are_exact(budget):
    vit = adaptok.wrap(make_vit(), stack=[{"name": "tome", "r": 2}])
    adaptok.set_budget(vit, **budget)
    step = trace(vit, IMAGES)
    kept = step.kept.tolist()
    if "drop" in budget:
        assert kept == [9] * 3  # of 24 - 3 * 2
    else:
        assert kept == adaptok.budgets.apply_budget(step.routings[0], vit_budget(vit)).kept.tolist()
    sums = torch.zeros(3, 24).scatter_add(1, step.provenance.token, torch.ones(3, 24))
    assert [(row > 0).sum().item() for row in sums] == kept


def vit_budget(vit):
    return vit.blocks.adaptok["tome"].budget_setting


def test_samples_of_unlike_budgets_run_as_they_would_alone():
    vit = adaptok.wrap(make_vit(), stack=["tome"], budget=0.5)
    for budgets in ([24, 12, 20], [24, 1, 3]):
        adaptok.set_budget(vit, tokens=budgets)
        together = run(vit, SCALED)
        for sample, tokens in enumerate(budgets):
            adaptok.set_budget(vit, tokens=tokens)
            torch.testing.assert_close(
                run(vit, SCALED[sample : sample + 1])[0], together[sample], rtol=1e-5, atol=1e-5
            )


def test_a_schedule_shapes_a_budget():
    vit = adaptok.wrap(make_vit(), stack=[{"name": "tome", "r": [3, 0, 1]}], budget=0.5)
    events = trace(vit, IMAGES).plans[0].events
    assert [event.counts[0] for event in events] == [15, 15, 12]


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_threshold_counts_for_each_sample(multiple):
    vit = adaptok.wrap(
        make_vit(), stack=[{"name": "tome", "threshold": 0.75, "multiple": multiple}]
    )
    step = trace(vit, SCALED)
    kept = step.kept.tolist()
    assert len(set(kept)) > 1
    if multiple > 1:
        assert all(
            count % multiple == 0 for event in step.plans[0].events for count in event.counts
        )
    together = run(vit, SCALED)
    for sample in range(3):
        alone = SCALED[sample : sample + 1]
        assert trace(vit, alone).kept.tolist() == kept[sample : sample + 1]
        torch.testing.assert_close(run(vit, alone)[0], together[sample], rtol=1e-5, atol=1e-5)


def test_thresholds_at_the_ends():
    vit = adaptok.wrap(make_vit(), stack=[ToMe(threshold=1.0)])
    assert trace(vit, IMAGES).kept.tolist() == [24] * 3
    vit = adaptok.wrap(make_vit(), stack=[ToMe(threshold=-1.0)])
    assert trace(vit, IMAGES).kept.tolist() == [3] * 3  # half of them, three times


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision(half):
    vit = adaptok.wrap(make_vit(), stack=[{"name": "tome", "r": 4}])
    expected = run(vit, IMAGES)
    found = run(vit.to(half), IMAGES.to(half))
    assert found.dtype == half
    assert relative(found.float(), expected) < 0.2  # other tokens may merge


def test_boundary_merges_by_features_where_blocks_stay_whole():
    vit = make_vit()
    whole = run(vit, IMAGES)
    blocks = copy.deepcopy(vit)
    adaptok.wrap(vit, stack=[ToMe(4, site="boundary", proportional=False)])
    events = trace(vit, IMAGES).plans[0].events
    assert [(e.site.block, e.site.where) for e in events] == [(i, "before") for i in range(3)]
    x = blocks.norm_pre(blocks._pos_embed(blocks.patch_embed(IMAGES)))
    outs = []
    from merge_oracles import merge_by_hand

    with torch.no_grad():
        for sample in x:
            rows, sizes = sample, [1.0] * 24
            for block in blocks.blocks:
                _, tokens, sizes = merge_by_hand(rows[1:], rows[1:], sizes, 1, 4)
                rows = block(torch.cat([rows[:1], tokens])[None])[0]
            outs.append(blocks.head(blocks.norm(rows[:1])[0]))
    found = run(vit, IMAGES)
    torch.testing.assert_close(found, torch.stack(outs), rtol=1e-4, atol=1e-5)
    assert relative(found, whole) > 1e-3


def test_gradients_reach_the_image_and_all_weights():
    vit = adaptok.wrap(make_vit(), stack=[ToMe(5)], span=(0, 2)).train()
    images = IMAGES.clone().requires_grad_()
    vit(images).square().sum().backward()
    assert (images.grad.abs().amax((1, 2, 3)) > 0).all()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vit.parameters())


def test_ways_into_the_host():
    vit = adaptok.wrap(make_vit(), stack=["tome"], budget=0.5)
    features = vit.forward_features(IMAGES)
    assert features.shape == (3, 25, 96)
    torch.testing.assert_close(vit.forward_head(features), vit(IMAGES), rtol=0, atol=0)
    with pytest.raises(HostOptionError, match="forward_intermediates"):
        vit.forward_intermediates(IMAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": -1}, "r is a whole number of at least 0"),
        ({"r": 1.5}, "r is a whole number"),
        ({"r": []}, "r is a whole number"),
        ({"r": (8, 2.0)}, "inflect a float from -1.0 to 1.0"),
        ({"r": 8, "threshold": 0.5}, "exclude each other"),
        ({"threshold": 1.5}, "cosine from -1 to 1"),
        ({"site": "after"}, "site is one of auto, between, boundary"),
        ({"multiple": 0}, "multiple is at least 1"),
        ({"multiple": 4}, "is for threshold="),
        ({"restore": "never"}, "restore is one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ToMe(**options)


def test_r_of_more_than_there_are_tokens():
    vit = adaptok.wrap(make_vit(), stack=[{"name": "tome", "r": 25}])
    with pytest.raises(BudgetError, match=r"r=25 is more than the 24 tokens.*at most 12"):
        vit(IMAGES)


def test_a_list_of_another_length():
    vit = adaptok.wrap(make_vit(), stack=[{"name": "tome", "r": [4, 4]}])
    with pytest.raises(ConfigError, match="3 are needed, got 2"):
        vit(IMAGES)


def test_a_budget_above_the_tokens():
    vit = adaptok.wrap(make_vit(), stack=["tome"])
    adaptok.set_budget(vit, tokens=25)
    with pytest.raises(BudgetError, match="more than the 24 cells"):
        vit(IMAGES)
    vit = adaptok.wrap(make_vit(), stack=[ToMe(threshold=0.5)])
    adaptok.set_budget(vit, drop=0.5)
    with pytest.raises(BudgetError, match="give keep= or tokens="):
        vit(IMAGES)


def test_blocks_that_stay_whole():
    model = find_case("timm/vit_base_patch16_xp_224").build()
    with pytest.raises((StackError, WrapError), match='Take site="boundary"'):
        adaptok.wrap(model, stack=[ToMe(site="between")], budget=0.5)
    adaptok.wrap(model, stack=["tome"], budget=0.5)
    inputs = find_case("timm/vit_base_patch16_xp_224").inputs(model)
    events = trace(model, *inputs.args).plans[0].events
    assert {event.site.where for event in events} == {"before"}


def test_settings_show():
    vit = adaptok.wrap(make_vit(), stack=[ToMe((6, -0.5))])
    assert "r=[6, -0.5], site='auto'" in repr(vit.blocks)
    assert "threshold=0.5" in repr(adaptok.wrap(make_vit(), stack=[ToMe(threshold=0.5)]).blocks)


def test_beside_a_stage_that_prunes():
    vit = adaptok.wrap(make_vit(), stack=[{"name": "evit", "keep_rate": 0.8}, ToMe(3)])
    step = trace(vit, IMAGES)
    (plan,) = step.plans
    counts = [(event.stage, event.counts[0]) for event in plan.events if event.stage == "tome"]
    before = [event.counts[0] for event in plan.events if event.stage == "evit"]
    assert [count for _, count in counts] == [m - min(3, m // 2) for m in before]
    assert step.kept.tolist() == [counts[-1][1]] * 3
    assert step.provenance.token.min() == 0  # EViT fuses: no cell is lost
    for row in step.provenance.token:
        assert sorted(set(row.tolist())) == list(range(counts[-1][1]))
