"""Compiled models: the values of eager ones, and few graphs for many budgets and batches."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

import adaptok
from adaptok.errors import NotWrappedError
from adaptok.testing import make_vit

GRID = 16
# The compiler looks at the gradient of what comes into a graph, and hides the warning of it only
# from people who do not make it an error.
training = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0
        self.inner = lookup_backend("aot_eager")

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.inner(graph, inputs)


def make_model(layout, **options):
    torch.manual_seed(0)
    config = adaptok.DCDiTConfig(
        hidden_size=64, depth=2, num_heads=4, latent_size=GRID, layout=layout, **options
    )
    model = adaptok.DCDiT(config).eval()
    fill(model)
    torch.nn.init.normal_(model.router.score[3].weight, std=3.0)  # counts differ by the image
    return model


def fill(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)


def make_inputs(b, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, 4, GRID, GRID, generator=generator)
    t = torch.randint(0, 1000, (b,), generator=generator)
    return x, t, torch.randint(0, 1000, (b,), generator=generator)


def make_wrapped(layout="bucketed", **budget):
    vit = make_vit().eval()
    fill(vit)
    adaptok.wrap(vit, chunker={"name": "dc", "layout": layout}, budget=0.5)
    adaptok.set_budget(vit, **budget)
    router = vit.blocks.adaptok["dc"].router
    torch.nn.init.normal_(router.logit.weight, std=3.0)  # natural counts that differ by the image
    torch.nn.init.zeros_(router.logit.bias)
    return vit


RAGGED = [
    (4, {}),
    (4, {"drop": [0.1, 0.5, 0.2, 0.8]}),
    (3, {"drop": 0.5}),
    (3, {"keep": [0.2, 0.4, 0.5]}),
    (4, {"tokens": 11}),
]
FIXED = [(4, {"tokens": 20}), (4, {"keep": 0.3}), (3, {"tokens": 7})]


@pytest.mark.parametrize("layout", ["packed", "bucketed", "fixed"])
def test_the_reference_model_computes_the_same_with_few_graphs(layout):
    eager, counter = make_model(layout), Counter()
    model = adaptok.compile(copy.deepcopy(eager), backend=counter)
    cases = FIXED if layout == "fixed" else RAGGED
    with torch.inference_mode():
        for seed, (b, budget) in enumerate(cases):
            inputs = make_inputs(b, seed)
            out, routing = model(*inputs, **budget, return_routing=True)
            expected, known = eager(*inputs, **budget, return_routing=True)
            assert torch.equal(routing.keep_mask, known.keep_mask)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert len(set(known.kept.tolist())) >= 1
        before = counter.graphs
        # three regions and the decision, for a first batch and for batches that change
        assert before <= (3 if layout == "fixed" else 4 * 2 + 4)
        for count in range(20, 40, 3):
            model(*make_inputs(4), tokens=count)
            if layout != "fixed":
                model(*make_inputs(4), drop=count / 100)
        assert counter.graphs == before


def test_counts_of_the_reference_cases_differ():
    """The cases above are ragged indeed."""
    _, routing = make_model("packed")(*make_inputs(4), return_routing=True)
    assert len(set(routing.kept.tolist())) > 1


@training
@pytest.mark.parametrize("layout", ["packed", "bucketed", "fixed"])
def test_training_gives_the_gradients_of_the_eager_model(layout):
    eager = make_model(layout).train()
    model = adaptok.compile(copy.deepcopy(eager), backend="aot_eager")
    budget = {"tokens": 30} if layout == "fixed" else {"drop": 0.4}
    for seed, b in enumerate((3, 4)):
        inputs = make_inputs(b, seed)
        for part in (eager, model):
            part.zero_grad()
            part(*inputs, **budget).square().mean().backward()
        known = dict(eager.named_parameters())
        largest = max(p.grad.abs().max() for p in known.values() if p.grad is not None)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                error = (parameter.grad - known[name].grad).abs().max()
                assert error <= 1e-4 * known[name].grad.abs().max() + 1e-5 * largest, name


@pytest.mark.parametrize("layout", ["packed", "bucketed", "fixed"])
def test_autocast(layout):
    eager = make_model(layout)
    model = adaptok.compile(copy.deepcopy(eager), backend="aot_eager")
    budget = {"tokens": 30} if layout == "fixed" else {"drop": 0.4}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, expected = (part(*make_inputs(3), **budget) for part in (model, eager))
    torch.testing.assert_close(out.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layout", ["packed", "bucketed", "fixed"])
def test_a_wrapped_model_computes_the_same_with_few_graphs(layout):
    eager, counter = make_wrapped(layout, keep=0.5), Counter()
    model = adaptok.compile(copy.deepcopy(eager), backend=counter)
    cases = [(3, {"keep": 0.6}), (4, {"tokens": 5})]
    if layout != "fixed":
        cases += [(4, {"keep": [0.2, 0.8, 0.8, 0.4]}), (3, {"drop": 0.5}), (3, {})]

    def compare(b, budget, seed):
        torch.manual_seed(seed)
        images = torch.randn(b, 3, 32, 48)
        for part in (model, eager):
            adaptok.set_budget(part, **budget)
        torch.testing.assert_close(model(images), eager(images), rtol=1e-4, atol=1e-5)

    with torch.inference_mode():
        for seed, (b, budget) in enumerate(cases):
            compare(b, budget, seed)
        before = counter.graphs
        for count in range(3, 20, 3):
            compare(3, {"tokens": count}, count)
            if layout != "fixed":
                compare(3, {"drop": count / 30}, count)
        assert counter.graphs <= before + 2  # a length that turns out to change


def test_natural_counts_of_the_wrapped_case_differ():
    vit = make_wrapped()
    with adaptok.trace(vit) as seen:
        vit(torch.randn(4, 3, 32, 48))
    assert len(set(seen.steps[0].plans[0].requested.tolist())) > 1


@training
def test_training_a_wrapped_model():
    eager = make_wrapped(drop=0.3).train()
    model = adaptok.compile(copy.deepcopy(eager), backend="aot_eager")
    images = torch.randn(3, 3, 32, 48)
    for part in (eager, model):
        with adaptok.collect_losses(part) as losses:
            loss = part(images).square().mean()
        (loss + losses["ratio"]).backward()
    known = dict(eager.named_parameters())
    seen = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert any("router" in name for name in seen)
    for name, parameter in model.named_parameters():
        if name in seen:
            torch.testing.assert_close(parameter.grad, known[name].grad, rtol=1e-3, atol=1e-5)


def test_a_trace_of_a_compiled_model_sees_every_operation():
    eager = make_wrapped(drop=0.3)
    model = adaptok.compile(copy.deepcopy(eager), backend="aot_eager")
    images = torch.randn(3, 3, 32, 48)
    with torch.inference_mode():
        model(images)
        traces = []
        for part in (model, eager):
            with adaptok.trace(part) as trace:
                part(images)
            traces.append(trace.steps[0])
    compiled, plain = traces
    assert compiled.kept.tolist() == plain.kept.tolist()
    assert compiled.flops == plain.flops > 0


def test_unwrap_forgets_the_graphs():
    vit = make_vit().eval()
    fill(vit)
    images = torch.randn(2, 3, 32, 48)
    expected = vit(images)
    model = adaptok.wrap(vit, chunker="dc", budget=0.5)
    adaptok.compile(model, backend="eager")(images)
    assert model is vit
    assert adaptok.unwrap(vit)._compiled_call_impl is None
    assert torch.equal(vit(images), expected)


def test_unwrap_gives_back_what_the_user_had_compiled():
    own, ours = Counter(), Counter()
    vit = make_vit().eval()
    fill(vit)
    images = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        expected = vit(images)
        vit.compile(backend=own)
        call = vit._compiled_call_impl
        torch.testing.assert_close(vit(images), expected, rtol=1e-4, atol=1e-5)
        assert own.graphs == 1

        adaptok.wrap(vit, chunker="dc", budget=0.5, verify=False)
        assert vit._compiled_call_impl is call
        fewer = vit(images)
        assert (fewer - expected).abs().max() > 1e-3
        made = own.graphs
        for _ in range(2):  # compiled again: not what was ours is given back
            adaptok.compile(vit, backend=ours)
        torch.testing.assert_close(vit(images), fewer, rtol=1e-4, atol=1e-5)
        assert own.graphs == made
        assert ours.graphs > 0
        assert copy.deepcopy(vit)._compiled_call_impl is None

        made = ours.graphs
        assert adaptok.unwrap(vit)._compiled_call_impl is call
        torch.testing.assert_close(vit(images), expected, rtol=1e-4, atol=1e-5)
        assert ours.graphs == made


def test_unwrap_leaves_what_the_user_compiled_later():
    vit = adaptok.compile(make_wrapped(keep=0.5), backend="eager")
    vit.compile(backend="eager")
    call = vit._compiled_call_impl
    assert adaptok.unwrap(vit)._compiled_call_impl is call


def test_undoing_a_part_leaves_the_compiled_whole():
    holder = torch.nn.Sequential(make_wrapped(keep=0.5))
    holder.compile(backend="eager")
    call = holder._compiled_call_impl
    adaptok.compile(holder[0], backend="eager")
    assert adaptok.unwrap(holder)._compiled_call_impl is call
    assert holder[0]._compiled_call_impl is None


def test_copies_and_pickles_are_not_compiled():
    vit = adaptok.compile(make_wrapped(keep=0.5), backend="eager")
    images = torch.randn(2, 3, 32, 48)
    expected = vit(images)
    for other in (copy.deepcopy(vit), pickle.loads(pickle.dumps(vit))):
        assert other._compiled_call_impl is None
        assert not other.blocks.compiled_regions
        assert not other.blocks.adaptok["dc"].compiled_regions
        torch.testing.assert_close(other(images), expected)
    assert vit.blocks.compiled_regions


def test_wrap_compiles_on_request(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "adaptok.wrapping.compile_adaptive", lambda model: asked.append(model) or model
    )
    vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5, compile=True)
    assert asked == [vit]
    adaptok.unwrap(vit)
    adaptok.wrap(vit, chunker="dc", budget=0.5)
    assert len(asked) == 1


def test_a_model_without_adaptive_parts_is_refused():
    with pytest.raises(NotWrappedError, match=r"nothing in Linear is adaptive: call adaptok.wrap"):
        adaptok.compile(torch.nn.Linear(2, 2))


def test_compiled_for_real():
    """The default backend, which writes and builds kernels."""
    eager = make_model("packed")
    model = adaptok.compile(copy.deepcopy(eager))
    with torch.inference_mode():
        for b, budget in ((3, {"drop": 0.3}), (3, {"drop": 0.6})):
            inputs = make_inputs(b)
            out, expected = model(*inputs, **budget), eager(*inputs, **budget)
            assert (out - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_names_of_requests_make_no_graphs():
    counter = Counter()
    vit = adaptok.compile(make_wrapped(keep=0.5), backend=counter)
    images, seen = torch.randn(2, 3, 32, 48), []
    with torch.inference_mode():
        for name in ("a", "b", "c", "d"):
            with adaptok.request(vit, name):
                vit(images)
            seen.append(counter.graphs)
    assert seen[0] == seen[-1]


def test_what_is_no_module_is_refused():
    class Pipeline:
        transformer = torch.nn.Linear(2, 2)

    with pytest.raises(NotWrappedError, match=r"a Pipeline is no module: .* pipe.transformer"):
        adaptok.compile(Pipeline())
