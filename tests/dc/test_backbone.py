"""Stages around the blocks of the reference model, in every layout and with unequal counts."""

import copy
import pickle

import pytest
import torch
from reducers import DropOdd, MergeEnd

import adaptok
from adaptok import Effects, Stage
from adaptok.errors import StackError, UnsupportedModelError
from adaptok.testing.models import fill_weights

LAYOUTS = ("packed", "bucketed", "fixed")
BUDGETS = ({}, {"keep": 0.5}, {"keep": [0.3, 0.9, 0.5]}, {"drop": 0.3})
CASES = [
    (layout, budget)
    for layout in LAYOUTS
    for budget in BUDGETS
    if layout != "fixed" or budget == {"keep": 0.5}  # which takes one exact count only
]


def make_model(layout="packed", **options):
    config = adaptok.DCDiTConfig(
        hidden_size=64, depth=3, num_heads=2, latent_size=8, layout=layout, **options
    )
    return fill_weights(adaptok.DCDiT(config)).eval()


def make_inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 8, 6, generator=generator)
    return x, torch.tensor([5.0, 500.0, 900.0])[:batch], torch.arange(batch)


@pytest.mark.parametrize(("layout", "budget"), CASES, ids=str)
def test_a_stage_that_takes_nothing_changes_nothing(layout, budget):
    model, inputs = make_model(layout), make_inputs()
    with torch.no_grad():
        expected, routing = model(*inputs, return_routing=True, **budget)
        adaptok.wrap(model, stack=[MergeEnd(r=0)])
        with adaptok.trace(model) as seen:
            found = model(*inputs, **budget)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        kept = seen.steps[0].kept
        assert (kept >= routing.kept).all()  # buckets round up
        assert layout == "bucketed" or kept.tolist() == routing.kept.tolist()
        assert torch.equal(adaptok.unwrap(model)(*inputs, **budget), expected)


def test_a_sample_does_not_see_its_batch_mates_and_stages_see_its_step():
    model, (x, t, y) = make_model(), make_inputs()
    seen_steps = []

    class Watching(MergeEnd):
        def reduce(self, moment):
            seen_steps.append((moment.call.timestep.tolist(), moment.x.shape[1]))
            return super().reduce(moment)

    adaptok.wrap(model, stack=[Watching(r=2), DropOdd(block=1)])
    seen_steps.clear()
    keeps = [0.3, 0.9, 0.5]
    with torch.no_grad(), adaptok.trace(model) as seen:
        together = model(x, t, y, keep=keeps)
    assert [steps for steps, _ in seen_steps[::3]] == [[5.0], [500.0], [900.0]]
    counts = [max(1, int(keep * 48 + 0.5)) for keep in keeps]
    assert [count for _, count in seen_steps[::3]] == counts
    for sample, keep in enumerate(keeps):
        rows = slice(sample, sample + 1)
        with torch.no_grad(), adaptok.trace(model) as alone:
            single = model(x[rows], t[rows], y[rows], keep=keep)
        torch.testing.assert_close(single[0], together[sample], rtol=1e-5, atol=1e-5)
        mine = alone.steps[0].provenance.token[0]
        assert torch.equal(mine, seen.steps[0].provenance.token[sample, : len(mine)])
        assert seen.steps[0].kept[sample] == alone.steps[0].kept[0]


@pytest.mark.parametrize(("layout", "budget"), CASES, ids=str)
def test_provenance_is_of_the_cells_of_the_image(layout, budget):
    model, inputs = make_model(layout), make_inputs()
    with torch.no_grad():
        routing = model(*inputs, return_routing=True, **budget)[1]
        adaptok.wrap(model, stack=[MergeEnd(r=2)])
        with adaptok.trace(model) as seen:
            model(*inputs, **budget)
    (step,) = seen.steps
    assert step.grid == (8, 6)
    assert step.stages == ("dcdit", "merge-end")
    assert torch.equal(step.routings[0].keep_prob, routing.keep_prob)
    assert torch.equal(step.routings[0].natural_mask, routing.natural_mask)
    mask = step.plans[0].keep_mask
    assert layout == "bucketed" or torch.equal(mask, routing.keep_mask)
    assert torch.equal(mask & routing.keep_mask, routing.keep_mask)
    for sample in range(3):
        cells = mask[sample].nonzero().flatten().tolist()
        last = int(step.kept[sample]) - 1  # the last tokens went into this one
        assert 0 <= last < len(cells) - 1
        for cell in range(48):
            far = [(cell // 6 - k // 6) ** 2 + (cell % 6 - k % 6) ** 2 for k in cells]
            token = far.index(min(far))
            assert step.provenance.token[sample, cell] == min(token, last)


def test_two_traces_and_a_step_that_is_reused_have_the_cells_too():
    model, (x, t, y) = make_model(), make_inputs()
    adaptok.wrap(model, stack=[{"name": "taylorseer", "interval": 2}, MergeEnd(r=2)])
    with torch.no_grad(), adaptok.trace(model) as outer, adaptok.trace(model) as seen:
        for number in range(6):
            with adaptok.request(model, "one"):
                model(x + number, t - number, y, keep=[0.3, 0.9, 0.5])
    assert any(step.reused.all() for step in seen.steps)
    for step, same in zip(seen.steps, outer.steps, strict=True):
        assert step.grid == (8, 6)
        assert step.stages[0] == "dcdit"
        assert step.plans[0].computed.tolist() == [14, 43, 24]
        assert torch.equal(step.provenance.token, same.provenance.token)


def test_a_sample_that_no_stage_saw_keeps_its_tokens_beside_shorter_ones():
    class Skip(Stage):
        """Runs what is inside on the samples of late steps only, as a cache does."""

        effects = Effects("time")

        def forward(self, inner, call):
            late = (call.timestep > 100).nonzero().flatten()
            if len(late) == 0:
                return call
            return inner(call)

    model, (x, t, y) = make_model(), make_inputs()
    adaptok.wrap(model, stack=[Skip(), MergeEnd(r=2)], verify=False)
    with torch.no_grad(), adaptok.trace(model) as seen:
        model(x, t, y, keep=[0.9, 0.3, 0.5])  # the first sample, with the most tokens, is skipped
    (step,) = seen.steps
    token = step.provenance.token
    assert torch.equal(token[0], step.plans[0].provenance.token[0])
    assert int(token[0].max()) == 42
    assert [int(row.max()) + 1 for row in token[1:]] == step.kept[1:].tolist()
    assert (step.kept[1:] < torch.tensor([14, 24])).all()


def test_guidance_gradients_and_copies():
    model, (x, t, y) = make_model(), make_inputs(2)
    adaptok.wrap(model, stack=[MergeEnd(r=2)])
    with torch.no_grad():
        out = model.forward_with_cfg(x, t, y, 1.5, keep=0.5, uncond_keep=0.25)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            again = twin.forward_with_cfg(x, t, y, 1.5, keep=0.5, uncond_keep=0.25)
            assert torch.equal(again, out)
    model.train()
    model(x, t, y, keep=[0.5, 0.25]).square().sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = make_model(gradient_checkpointing=checkpointing).train()
        adaptok.wrap(model, stack=[MergeEnd(r=2)], verify=False)
        model(*make_inputs(), keep=[0.5, 0.25, 0.9]).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_a_compiled_model_is_refused():
    model = adaptok.compile(make_model())
    with pytest.raises(UnsupportedModelError, match="wrapped before it is compiled"):
        adaptok.wrap(model, stack=[MergeEnd()])


@pytest.mark.parametrize("chunker", ["dc", "hnet", "graph"])
def test_a_second_chunker_is_refused(chunker):
    model = make_model()
    with pytest.raises(StackError, match=r"has a chunker of its own.*'tome'|\"tome\""):
        adaptok.wrap(model, chunker=chunker, budget=0.5)
    assert not adaptok.is_wrapped(model)
