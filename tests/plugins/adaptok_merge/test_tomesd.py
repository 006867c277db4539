"""ToMe-SD against loops, on hosts of every kind; seeds, budgets, text."""

import pytest
import torch
from adaptok_merge.cells import choose_destinations, count_cells, fit_cells
from adaptok_merge.tomesd import BLOCKS, ToMeSD
from backbones.split_checks import find_case, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_oracles import MergeBlocksByHand

import adaptok
from adaptok.errors import BudgetError, ConfigError, StackError
from adaptok.testing import make_vit

IMAGES = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(3))
HOSTS = [
    "facebook/dit",
    "facebook/sit",
    "diffusers/dit",
    "diffusers/pixart",
    "diffusers/sd3",
    "diffusers/sd3.5",
    "diffusers/flux",
    "diffusers/z_image",
    "diffusers/wan",
    "timm/vit_tiny_patch16_224",
    "timm/eva02_tiny_patch14_224",
    "transformers/dinov3",
]


def run(case, model, inputs):
    with torch.no_grad():
        return case.run(model, inputs)


def find_first_tokens(grid, block):
    """The top left token of each cell of 2 x 2, by loops."""
    *frames, h, w = grid
    number = frames[0] if frames else 1
    return [
        (f * h + y) * w + x for f in range(number) for y in range(0, h, 2) for x in range(0, w, 2)
    ]


def find_drawn_tokens(grid, block):
    sizes = (*(1,) * (len(grid) - 2), 2, 2)
    return choose_destinations(grid, sizes, 3 * BLOCKS + block, torch.device("cpu")).tolist()


@pytest.mark.parametrize("use_rand", [False, True])
@pytest.mark.parametrize("name", HOSTS)
def test_hosts_compute_what_the_loop_computes(name, use_rand):
    case = find_case(name)
    model = case.build()
    inputs = case.inputs(model)
    expected = run(case, model, inputs)
    adaptok.wrap(model, stack=[ToMeSD(use_rand=use_rand, seed=3)], verify=False)
    adaptok.set_budget(model, keep=1.0)
    assert torch.equal(run(case, model, inputs), expected)
    adaptok.set_budget(model)
    found = run(case, model, inputs)
    with adaptok.trace(model) as seen:
        run(case, model, inputs)
    (step,) = seen.steps
    n = step.provenance.token.shape[1]
    assert step.kept.tolist() == [n - n // 2] * len(step.kept)
    adaptok.unwrap(model)
    find = find_drawn_tokens if use_rand else find_first_tokens
    adaptok.wrap(model, stack=[MergeBlocksByHand(find, n - n // 2)], verify=False)
    by_hand = run(case, model, inputs)
    assert relative(found, by_hand) < 1e-4
    assert relative(found, expected) > 1e-3


@pytest.mark.parametrize("name", ["facebook/dit", "timm/vit_small_patch14_dinov2"])
def test_attention_alone(name):
    case = find_case(name)
    model = case.build()
    inputs = case.inputs(model)
    adaptok.wrap(model, stack=[ToMeSD(use_rand=False, mlp=False)])
    found = run(case, model, inputs)
    n = case.cells[0] * case.cells[1]
    adaptok.unwrap(model)
    by_hand = MergeBlocksByHand(find_first_tokens, n - n // 2, mlp=False)
    adaptok.wrap(model, stack=[by_hand], verify=False)
    assert relative(found, run(case, model, inputs)) < 1e-4
    adaptok.unwrap(model)
    adaptok.wrap(model, stack=[ToMeSD(use_rand=False)])
    assert relative(found, run(case, model, inputs)) > 1e-3


def test_attention_alone_needs_halves():
    model = find_case("timm/vit_base_patch16_xp_224").build()
    with pytest.raises(StackError, match="Take mlp=True"):
        adaptok.wrap(model, stack=[ToMeSD(mlp=False)], budget=0.5)


@settings(max_examples=60, deadline=None)
@given(
    grid=st.lists(st.integers(1, 9), min_size=2, max_size=3),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    key=st.integers(0, 2**40),
)
def test_one_destination_in_each_cell(grid, sizes, key):
    *frames, h, w = grid
    lengths = (*(1,) * len(frames), *sizes)
    places = choose_destinations(tuple(grid), lengths, key, torch.device("cpu")).tolist()
    assert len(places) == count_cells(tuple(grid), lengths)
    cells = set()
    for place in places:
        f, y, x = place // (h * w), place // w % h, place % w
        cells.add((f, y // sizes[0], x // sizes[1]))
        assert f < (frames[0] if frames else 1)
    assert len(cells) == len(places)


def test_destinations_are_spread_evenly_and_differ_by_key():
    drawn = [
        choose_destinations((2, 2), (2, 2), key, torch.device("cpu")).item() for key in range(2000)
    ]
    share = torch.tensor(drawn).bincount(minlength=4) / 2000
    assert (share - 0.25).abs().max() < 0.05
    pair = [choose_destinations((8, 8), (2, 2), key, torch.device("cpu")) for key in (5, 6)]
    assert not torch.equal(*pair)


@settings(max_examples=60, deadline=None)
@given(grid=st.lists(st.integers(1, 9), min_size=2, max_size=3), share=st.floats(0.01, 1.0))
def test_cells_grow_until_they_fit(grid, share):
    sizes = (*(1,) * (len(grid) - 2), 2, 2)
    n = torch.Size(grid).numel()
    count = max(1, int(share * n))
    grown = fit_cells(tuple(grid), sizes, count)
    assert count_cells(tuple(grid), grown) <= count
    if count_cells(tuple(grid), sizes) <= count:
        assert grown == sizes


def test_both_halves_and_all_calls_take_the_same_destinations():
    vit = adaptok.wrap(make_vit(), stack=["tomesd"])
    state = torch.get_rng_state()
    twice = torch.cat([IMAGES[:1], IMAGES[:1]])
    with torch.no_grad():
        first, again = vit(twice), vit(twice)
    assert torch.equal(first[0], first[1])
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_and_the_block_choose():
    outs = []
    for options in ({"seed": 0}, {"seed": 1}, {"use_rand": False}):
        vit = adaptok.wrap(make_vit(), stack=[{"name": "tomesd", "ratio": 0.75, **options}])
        with torch.no_grad(), adaptok.trace(vit) as seen:
            outs.append(vit(IMAGES))
        events = seen.steps[0].plans[0].events
        assert [event.site.block for event in events] == [0, 1, 2]
        assert torch.equal(events[2].owner, seen.steps[0].provenance.token)
    assert relative(outs[0], outs[1]) > 1e-3
    assert relative(outs[0], outs[2]) > 1e-3


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "diffusers/flux", "diffusers/sd3"])
def test_samples_of_unlike_budgets_run_as_they_would_alone(name):
    case = find_case(name)
    model = adaptok.wrap(case.build(), stack=["tomesd"], budget=0.5)
    inputs = case.inputs(model)
    n = 1
    for length in case.cells:
        n *= length
    counts = [n, n // 2, n // 7]
    adaptok.set_budget(model, tokens=counts)
    together = run(case, model, inputs)
    with adaptok.trace(model) as seen:
        run(case, model, inputs)
    assert seen.steps[0].kept.tolist() == counts
    for sample, count in enumerate(counts):
        adaptok.set_budget(model, tokens=count)
        alone = run(case, model, case.one(inputs, sample))
        assert relative(together[sample : sample + 1], alone) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.8}, "ratio is from 0 to 0.75.*give larger cells"),
        ({"ratio": -0.1}, "ratio is from 0 to 0.75"),
        ({"ratio": 0.6, "sy": 1}, "ratio is from 0 to 0.5"),
        ({"sx": 0}, "at least one row and one column, got 2 x 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        ToMeSD(**options)


def test_a_grid_that_does_not_divide():
    case = find_case("timm/vit_tiny_patch16_224")  # 5 x 7
    model = adaptok.wrap(case.build(), stack=[ToMeSD(ratio=0.75)])
    with pytest.raises(BudgetError, match=r"leaves 9 of 35 tokens.*12 cells.*ratio=0.657 or less"):
        run(case, model, case.inputs(model))
    model = adaptok.wrap(case.build(), stack=[ToMeSD(ratio=0.657)])
    run(case, model, case.inputs(model))


def test_it_needs_all_cells():
    with pytest.raises(StackError, match="every grid cell"):
        adaptok.wrap(make_vit(), stack=["dc", "tomesd"], verify=False, budget=0.5)
    call = adaptok.BlockCall(torch.randn(1, 24, 8), grid=(4, 6)).take(torch.arange(12)[None])
    with pytest.raises(StackError, match="tomesd needs every grid cell"):
        ToMeSD()(adaptok.BlockRange(lambda call, first, last: call, 0, 2), call)


def test_settings_show():
    assert "ratio=0.5, cells=2x2" in repr(adaptok.wrap(make_vit(), stack=["tomesd"]).blocks)
