"""Warm-up: later calls make no graph, and nothing of the model has changed."""

import pytest
import torch
from test_compiling import make_inputs, make_model, make_wrapped
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import adaptok
from adaptok.errors import BudgetError, ConfigError, NotWrappedError, ShapeError
from adaptok.hosts import HostInputs
from adaptok.measure import warming
from adaptok.measure.subjects import read_budget
from adaptok.measure.warming import WarmCalls, WarmUp, warm_up


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


class TrainingCounter:
    """A backend that counts graphs of both passes and runs them as they are."""

    def __init__(self):
        self.forward = self.backward = 0
        self.run = aot_autograd(fw_compiler=self.count_forward, bw_compiler=self.count_backward)

    def count_forward(self, graph, inputs):
        self.forward += 1
        return make_boxed_func(graph)

    def count_backward(self, graph, inputs):
        self.backward += 1
        return make_boxed_func(graph)

    def __call__(self, graph, inputs):
        return self.run(graph, inputs)


def make_images(b, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(b, 3, 32, 48, generator=generator) * (1 + seed % 3),)


def make_case(kind, layout, backend):
    if kind == "reference":
        return adaptok.compile(make_model(layout), backend=backend), make_inputs
    return adaptok.compile(make_wrapped(layout, keep=0.5), backend=backend), make_images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout", "b", "budgets"),
    [
        ("reference", "packed", 1, [0.5, {}, {"drop": 0.4}]),
        ("reference", "fixed", 4, [0.5, 0.3]),
        ("wrapped", "packed", 4, [{}, 0.5]),
        ("wrapped", "bucketed", 4, [{"drop": 0.4}]),
    ],
)
def test_later_calls_make_no_graph(kind, layout, b, budgets):
    counter = Counter()
    model, make = make_case(kind, layout, counter)
    with torch.inference_mode():
        found = warm_up(model, make(b), budgets)
        assert found.settled
        assert 0 < found.graphs <= counter.graphs
        before = counter.graphs
        for seed in range(12):
            for budget in budgets:
                with adaptok.budget(model, **read_budget(budget)):
                    model(*make(b, seed))
        assert counter.graphs == before
        assert warm_up(model, make(b), budgets).graphs == 0
        with adaptok.budget(model, keep=0.5):  # one sample, or several: the counter can move
            model(*make(4 if b == 1 else 1))
        assert counter.graphs > before


def test_lengths_that_the_inputs_do_not_have_are_made_too():
    counter = Counter()
    model = adaptok.compile(make_wrapped(), backend=counter)  # the natural budget
    with torch.inference_mode():
        found = warm_up(model, make_images(4))
        assert [part.name for part in found.budgets] == ["the natural budget", "16 lengths"]
        before = counter.graphs
        for shares in ([0.25] * 4, [0.2, 0.4, 0.6, 0.9], [0.9, 0.2, 0.2, 0.2], [1e-3] * 4):
            with adaptok.budget(model, keep=shares):
                model(*make_images(4, 3))
        assert counter.graphs == before


def test_exact_budgets_run_no_lengths():
    model = adaptok.compile(make_wrapped("packed", keep=0.5), backend="eager")
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        found = warm_up(model, make_images(2))
    assert found.budgets == (WarmCalls("keep=0.5", 1, 0, found.seconds),)


def test_lengths_of_few_buckets():
    model = make_wrapped()
    model.blocks.adaptok["dc"].chunker.buckets = 3
    adaptok.compile(model, backend="eager")
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        found = warm_up(model, HostInputs(make_images(1)), [{"drop": 0.2}])
    # one cell, and the three buckets
    assert [(part.name, part.calls) for part in found.budgets] == [
        ("drop=0.2", 1),
        ("3 lengths", 4),
    ]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("kind", ["reference", "wrapped"])
def test_training_steps_make_no_graph_of_either_pass(kind):
    counter = TrainingCounter()
    model, make = make_case(kind, "packed", counter)
    model.train()
    adaptok.set_budget(model, drop=0.3)
    warm_up(model, make(3))
    before = counter.forward, counter.backward
    assert min(before) > 0
    for seed in range(4):  # gradients are there from the second step on
        model(*make(3, seed)).square().mean().backward()
    assert (counter.forward, counter.backward) == before


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_the_model_is_as_it_was(monkeypatch):
    monkeypatch.setattr(warming, "LENGTHS", 2)
    vit = make_wrapped("packed")
    norm = torch.nn.BatchNorm1d(10)  # of the head
    vit.head = torch.nn.Sequential(vit.head, torch.nn.Dropout(0.5), norm)
    adaptok.compile(vit.train(), backend="eager")
    adaptok.set_budget(vit, drop=0.25)
    vit.blocks.eval()
    marked = vit.patch_embed.proj.weight
    marked.grad = torch.full_like(marked, 7.0)
    state = {name: value.clone() for name, value in vit.state_dict().items()}
    modes = [module.training for module in vit.modules()]
    random = torch.get_rng_state()

    warm_up(vit, make_images(3), [{"drop": 0.5}])

    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in vit.modules()] == modes
    assert vit.blocks.adaptok["dc"].budget_setting.describe() == "drop=0.25"
    for name, value in vit.state_dict().items():
        assert torch.equal(value, state[name]), name
    for parameter in vit.parameters():
        assert parameter is marked or parameter.grad is None
    assert torch.equal(marked.grad, torch.full_like(marked, 7.0))
    vit(*make_images(3))  # such a call does change it
    assert not torch.equal(torch.get_rng_state(), random)
    assert not torch.equal(norm.running_mean, state["head.2.running_mean"])


def test_the_model_is_as_it_was_after_an_error(monkeypatch):
    model = adaptok.compile(make_model("packed"), backend="eager")
    adaptok.set_budget(model, drop=0.25)
    with (
        torch.no_grad(),
        pytest.raises(BudgetError, match="tokens=999 is more than the 256 cells"),
    ):
        warm_up(model, make_inputs(2), [0.5, {"tokens": 999}])
    assert model.budget_setting.describe() == "drop=0.25"

    def fail(*args):
        raise ValueError("of the host")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(ValueError, match="of the host") as caught:
        warm_up(model, make_inputs(2), [0.5])
    assert caught.value.__notes__ == ["raised in adaptok.warm_up by the call of: keep=0.5"]
    assert model.budget_setting.describe() == "drop=0.25"


def test_a_model_that_never_settles_is_called_so(monkeypatch):
    model = adaptok.compile(make_wrapped("packed", keep=0.5), backend="eager")
    ticks = iter(range(10_000))
    monkeypatch.setattr(warming, "count_graphs", lambda: next(ticks))
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        found = warm_up(model, make_images(2))
    assert (found.settled, found.rounds) == (False, warming.MOST_ROUNDS)
    assert "some even in the last of 5 rounds" in str(found)


def test_progress_goes_from_the_first_call_to_the_last(monkeypatch):
    made = iter((0, 1, 1, 1, 1, 1, 2))  # the first round makes a graph
    monkeypatch.setattr(warming, "count_graphs", lambda: next(made, 2))
    model = adaptok.compile(make_wrapped("packed", keep=0.5), backend="eager")
    seen = []
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        found = warm_up(
            model, make_images(2), [0.5, 0.25], progress=lambda done, of: seen.append((done, of))
        )
    assert [done for done, _ in seen] == list(range(1, 2 * found.rounds + 1))
    assert all(done <= of for done, of in seen)


def test_the_report_sums_up():
    found = WarmUp((WarmCalls("keep=1", 2, 1, 0.5), WarmCalls("natural", 2, 4, 1.25)), 2, True)
    assert (found.graphs, found.seconds) == (5, 1.75)
    assert str(found) == (
        "5 graphs in 1.8 s, none in the last of 2 rounds "
        "(keep=1: 1 graph in 0.5 s; natural: 4 graphs in 1.2 s)"
    )


class TestRefusals:
    def test_what_is_not_adaptive(self):
        for model in (torch.nn.Linear(2, 2), "vit"):
            with pytest.raises(NotWrappedError, match=r"nothing in a \w+ is adaptive: call"):
                warm_up(model, torch.ones(2, 2))

    def test_what_is_not_compiled(self):
        model = make_wrapped(keep=0.5)
        with pytest.raises(ConfigError, match=r"not compiled .* adaptok.compile\(model\)"):
            warm_up(model, make_images(2))
        with pytest.raises(ConfigError, match="call adaptok"):
            warm_up(torch.compile(model), make_images(2))

    def test_budgets_and_inputs(self):
        model = adaptok.compile(make_wrapped(keep=0.5), backend="eager")
        with pytest.raises(BudgetError, match=r"keep=0.5 came twice"):
            warm_up(model, make_images(2), [0.5, {"keep": 0.5}])
        with pytest.raises(BudgetError, match="a fraction in"):
            warm_up(model, make_images(2), [0.5, 1.5])
        with pytest.raises(ShapeError, match="inputs is empty"):
            warm_up(model, ())
