"""Width inside other stages: order, per sample, and what is refused."""

import copy

import pytest
import torch
from reducers import DropOdd, Leave, MergeEnd
from width_oracles import (
    OracleBlock,
    fill_gates,
    make_dc,
    make_dcdit,
    make_inputs,
    make_research,
    wrap_width,
)

import adaptok
from adaptok.counting import count_operations
from adaptok.errors import StackError

STACKS = {
    "dc": lambda: ["dc"],
    "merge": lambda: [MergeEnd()],
    "drop": lambda: [DropOdd()],
    "leave": lambda: [Leave()],
    "dc and merge": lambda: ["dc", MergeEnd()],
    "leave, dc": lambda: [Leave(), "dc"],
}
BUDGETS = {"dc": {"keep": [0.9, 0.3, 0.5]}, "dc and merge": {"keep": [0.9, 0.3, 0.5]}}


def run(model, inputs):
    with torch.no_grad():
        return model(*inputs)


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def count(model, inputs):
    with torch.no_grad(), count_operations() as counter:
        model(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", STACKS)
def test_width_stands_inside_and_equals_loops_there(name):
    plain = make_research()
    inputs = make_inputs(plain, times=(420.0,))  # the loops do not know whose step it is
    options = {"stack": STACKS[name](), "budget": BUDGETS.get(name), "verify": False}
    model, stage = wrap_width(copy.deepcopy(plain), **options)
    assert list(model.blocks.adaptok)[-1] == "width"
    plain.blocks = torch.nn.ModuleList(
        AnyBatch(block, index, stage) for index, block in enumerate(plain.blocks)
    )
    adaptok.wrap(plain, **(options | {"stack": STACKS[name]()}))
    fill_others(model, plain)
    expected = run(plain, inputs)
    assert error(run(model, inputs), expected) < 1e-4
    with adaptok.trace(plain) as oracle, torch.no_grad():
        plain(*inputs)
    with adaptok.trace(model) as seen, torch.no_grad():
        model(*inputs)
    for found, needed in zip(seen.steps[0].plans, oracle.steps[0].plans, strict=True):
        assert torch.equal(found.provenance.token, needed.provenance.token)


class AnyBatch(OracleBlock):
    """The loops of a block for batches of any size at one step."""

    def __init__(self, block, index, stage):
        super().__init__(block, index, stage, torch.tensor([420.0]))

    def forward(self, x, c):
        self.times = torch.full((len(x),), 420.0)
        return super().forward(x, c)


def fill_others(model, plain):
    """Give the parts beside width the same random weights in both."""
    generator, twins = torch.Generator().manual_seed(4), dict(plain.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adaptok." in name and ".adaptok.width." not in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
                twins[name].copy_(p)


# the toy stage `Leave` decides by the place in the batch, so that it has nothing to promise here
@pytest.mark.parametrize("name", [name for name in STACKS if "leave" not in name])
def test_a_sample_is_the_same_alone(name):
    model, stage = wrap_width(make_dc(), stack=STACKS[name]())
    inputs = make_inputs(model)
    keeps = BUDGETS.get(name, {}).get("keep", [0.5] * 3)
    with adaptok.budget(model, keep=keeps):
        together = run(model, inputs)
    for sample, keep in enumerate(keeps):
        with adaptok.budget(model, keep=keep):
            alone = run(model, [value[sample : sample + 1] for value in inputs])
        assert error(alone[0], together[sample]) < 1e-4
    assert stage.limit.is_natural  # the budget of the stack is that of its tokens


@pytest.mark.parametrize("name", ["dc", "merge", "dc and merge"])
def test_budgets_multiply_what_is_saved(name):
    model, _ = wrap_width(make_dc(), stack=STACKS[name](), budget=0.5)
    inputs = make_inputs(model)
    both = count(model, inputs)
    alone = count(adaptok.wrap(make_dc(), stack=STACKS[name](), budget=0.5), inputs)
    width = count(wrap_width(make_dc())[0], inputs)
    assert both < 0.8 * min(alone, width)


def test_limits_of_each_sample_go_with_it_into_groups():
    model, stage = wrap_width(make_dc(), stack=["dc"])
    inputs = make_inputs(model)
    keeps, mlp = [0.9, 0.3, 0.5], [1.0, 0.2, 0.6]
    stage.limit_tokens(keep=mlp)
    with adaptok.budget(model, keep=keeps):
        together = run(model, inputs)
    for sample in range(3):
        stage.limit_tokens(keep=mlp[sample])
        with adaptok.budget(model, keep=keeps[sample]):
            alone = run(model, [value[sample : sample + 1] for value in inputs])
        assert error(alone[0], together[sample]) < 1e-4


@pytest.mark.parametrize("name", STACKS)
def test_a_fresh_width_changes_nothing_of_a_stack(name):
    plain = make_dc()
    inputs = make_inputs(plain)
    options = {"budget": None if name in ("leave", "merge", "drop") else 0.5, "verify": False}
    model = adaptok.wrap(copy.deepcopy(plain), stack=["width", *STACKS[name]()], **options)
    other = adaptok.wrap(copy.deepcopy(plain), stack=STACKS[name](), **options)
    fill_others(model, other)
    weights = {k: v for k, v in model.state_dict().items() if ".adaptok." not in k}
    assert error(run(model, inputs), run(other, inputs)) < 1e-4
    adaptok.unwrap(model)
    assert torch.equal(run(model, inputs), run(plain, inputs))
    assert all(torch.equal(v, weights[k]) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("cache", ["teacache", "firstblock"])
def test_caches_reuse_steps_of_a_narrow_model(cache):
    model, _ = wrap_width(make_dc(), stack=[{"name": cache, "threshold": 0.0}])
    alone, _ = wrap_width(make_dc())
    x, _, y = make_inputs(model)
    with adaptok.request(model, "one"):
        for t in (900.0, 420.0, 30.0):
            inputs = (x, torch.full((3,), t), y)
            assert error(run(model, inputs), run(alone, inputs)) < 1e-5


def test_losses_of_pieces_are_as_large_as_of_the_whole():
    whole, _ = wrap_width(make_dc(), gate_tokens=False, target=0.01)
    pieces, _ = wrap_width(make_dc(), gate_tokens=False, target=0.01, stack=[MergeEnd(r=0)])
    inputs = make_inputs(whole)
    found = []
    for model in (whole, pieces):
        with torch.no_grad(), adaptok.collect_losses(model) as losses:
            model(*inputs)
        found.append(float(losses["width"]))
    assert found[1] == pytest.approx(found[0], rel=0.2)


def test_refusals():
    with pytest.raises(StackError, match="both slice the weights of the same blocks"):
        adaptok.wrap(make_dc(), stack=["width", {"name": "width", "groups": 2}])
    with pytest.raises(StackError, match="'dc' with layout 'packed' runs its own form"):
        adaptok.wrap(make_research(), stack=[{"name": "dc", "layout": "packed"}, "width"])


def test_training_inside_dc():
    model, stage = wrap_width(make_dc(), stack=["dc"], budget=0.5)
    fill_gates(stage)
    model.train()
    torch.manual_seed(0)
    with adaptok.collect_losses(model) as losses:
        out = model(*make_inputs(model))
    assert {"ratio", "width"} <= set(losses)
    ((out**2).mean() + losses["width"] + losses["ratio"]).backward()
    assert all(p.grad is not None for p in stage.parameters())


class TestReferenceModel:
    """Width inside `adaptok.DCDiT`: its blocks run on tokens that its own chunker left."""

    @pytest.mark.parametrize("layout", ["packed", "bucketed", "fixed"])
    def test_a_fresh_width_is_the_model(self, layout):
        model = make_dcdit(layout)
        inputs = make_inputs(model)
        keep = 0.4 if layout == "fixed" else [0.9, 0.2, 0.5]
        with torch.no_grad():
            expected = model(*inputs, keep=keep)
            adaptok.wrap(model, stack=["width"])
            assert error(model(*inputs, keep=keep), expected) < 1e-5
            adaptok.unwrap(model)
            assert torch.equal(model(*inputs, keep=keep), expected)

    def test_samples_alone_and_fewer_operations(self):
        plain = make_dcdit()
        model, _ = wrap_width(copy.deepcopy(plain))
        inputs, keeps = make_inputs(model), [0.9, 0.2, 0.5]
        with torch.no_grad():
            together = model(*inputs, keep=keeps)
            for sample, keep in enumerate(keeps):
                alone = model(*(value[sample : sample + 1] for value in inputs), keep=keep)
                assert error(alone[0], together[sample]) < 1e-5
            assert error(plain(*inputs, keep=keeps), together) > 0.005
        counts = []
        for one in (plain, model):
            with torch.no_grad(), count_operations() as counter:
                one(*inputs, keep=keeps)
            counts.append(counter.get_total_flops())
        assert counts[1] < counts[0]
