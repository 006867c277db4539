"""The diffusion step on its way from a host's forward to routers, stages and single blocks."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from backbones.diffusers_checks import HOSTS
from backbones.host_checks import KEEP, find_case
from backbones.pipelines import PIPELINES, draw, make_pipeline

import adaptok
from adaptok import HostInputs, ListBackbone, Router, Routing
from adaptok.backbones.facebook_dit import FacebookDiT
from adaptok.blocks import find_adaptive
from adaptok.errors import HandOverError, UnsupportedModelError
from benchmarks.architectures.facebook_models import DiT

TIMES = torch.tensor([20.0, 400.0, 900.0])
ADAPTERS = {"facebook/dit": FacebookDiT, "facebook/sit": FacebookDiT} | {
    f"diffusers/{name}": host for name, host in HOSTS.items()
}
# as the pipelines of diffusers 0.42.1 call their models
SCALES = {
    "diffusers/dit": (999, 0),
    "diffusers/pixart": (999, 0),
    "diffusers/sd3": (1000, 0),
    "diffusers/sd3.5": (1000, 0),
    "diffusers/flux": (1, 0),
    "diffusers/flux-schnell": (1, 0),
    "diffusers/z_image": (0, 1),
    "diffusers/wan": (1000, 0),
    "diffusers/wan2.2": (1000, 0),
}


class Recorder(Router):
    """Ranks by the norm, and writes down the step of each call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, tokens, context):
        self.seen.append(context.timestep)
        norm = tokens.x.norm(dim=-1)
        return Routing(norm / norm.amax(dim=1, keepdim=True), threshold=None)


class ByStep(Router):
    """Prefers cells at one end of the grid or the other, as the step says."""

    def forward(self, tokens, context):
        place = torch.linspace(0.1, 0.9, tokens.x.shape[1])
        late = (context.timestep > context.timestep.float().mean())[:, None]
        return Routing(torch.where(late, place, 1.0 - place), threshold=None)


def times_of(name, inputs):
    """Return what a case gives as the step, one per sample."""
    given = inputs.kwargs.get("timestep")
    given = inputs.args[1] if given is None else given
    return given.amax(1) if given.ndim == 2 else given


def record(name, host=None, budget=0.5):
    """Wrap a case of a batch with three steps and run it; return what was given and was seen."""
    case, router = find_case(name), Recorder()
    model = case.build()
    inputs = case.inputs(model)
    host = (ADAPTERS[name] if host is None else host).match(model)
    blocks, run = [], host.run
    host.run = lambda block, index, call: blocks.append(call.timestep) or run(block, index, call)
    options = {"router": router, "backbone": host, "verify": False}
    adaptok.wrap(model, "dc", budget=budget, **options)
    with torch.no_grad():
        case.run(model, inputs)
    assert find_adaptive(model).handed.is_empty
    return times_of(name, inputs), router.seen, blocks


def check_steps(name, host=None):
    """The router sees the steps of the batch, and each block those of the samples it runs."""
    given, seen, blocks = record(name, host, budget=list(KEEP))
    assert len(set(given.tolist())) == 3
    assert torch.equal(seen[-1], given)
    groups = [step.tolist() for step in blocks]
    depth = len(groups) // 3
    assert groups == [[step] for step in given.tolist() for _ in range(depth)]


@pytest.mark.parametrize("name", ADAPTERS)
def test_routers_and_blocks_see_the_step_of_each_sample(name):
    check_steps(name)


@pytest.mark.parametrize("name", ["facebook/dit", "diffusers/dit", "diffusers/wan2.2"])
def test_a_host_that_hands_over_another_order_is_caught(name):
    class Flipped(ADAPTERS[name]):
        def hand_over(self, *given):
            numbers = super().hand_over(*given)
            if numbers is None or numbers.timestep is None:
                return numbers
            return replace(numbers, timestep=numbers.timestep.flip(0))

    with pytest.raises(AssertionError):
        check_steps(name, Flipped)


def test_a_call_that_takes_the_steps_of_the_first_samples_is_caught(monkeypatch):
    take = adaptok.BlockCall.take

    def forget(call, *given, **named):
        short = take(call, *given, **named)
        return replace(short, timestep=call.timestep[: len(short.x)])

    monkeypatch.setattr(adaptok.BlockCall, "take", forget)
    with pytest.raises(AssertionError):
        check_steps("diffusers/sd3")


@pytest.mark.parametrize("name", SCALES)
def test_the_scale_is_that_of_the_pipelines_and_the_examples_lie_on_it(name):
    noise, clean = ADAPTERS[name].timestep_scale
    assert (noise, clean) == SCALES[name]
    model = find_case(name).build()
    given = times_of(name, ADAPTERS[name].match(model).example(model))
    low, high = sorted((noise, clean))
    assert bool(((given > low) & (given < high)).all())
    assert given.max() > low + 0.5 * (high - low)  # and not on a scale a thousand times smaller


@pytest.mark.parametrize("name", PIPELINES)
def test_real_pipelines_go_from_one_end_of_the_scale_to_the_other(name):
    pipe, router, kind = make_pipeline(name), Recorder(), PIPELINES[name]
    adaptok.wrap(pipe.transformer, "dc", router=router, budget=0.5, verify=False)
    draw(name, pipe, num_inference_steps=6, output_type="latent")
    noise, clean = HOSTS[kind.case].timestep_scale
    assert len(router.seen) == 6 * kind.calls
    assert all(bool((step == step[0]).all()) for step in router.seen)
    levels = [(step[0].item() - clean) / (noise - clean) for step in router.seen[:: kind.calls]]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > 0.8
    assert 0 <= levels[-1] < 0.4


def test_a_layout_of_many_models_has_no_scale_of_its_own():
    assert FacebookDiT.timestep_scale is None


def test_both_halves_of_guidance_see_their_steps():
    case, router = find_case("facebook/dit"), Recorder()
    model = adaptok.wrap(case.build(), "dc", router=router, budget=0.5)
    x, _, y = case.inputs(model).args
    steps = torch.tensor([3, 800, 3, 800])
    with torch.no_grad():  # forward_with_cfg calls forward as a plain method
        model.forward_with_cfg(x[[0, 1, 0, 1]], steps, y[[0, 1, 1, 0]], 2.0)
    assert torch.equal(router.seen[-1], steps)


@pytest.mark.parametrize("step", [torch.tensor([700.0]), torch.full((3,), 700.0)])
def test_one_step_for_all_becomes_one_per_sample(step):
    case, router = find_case("diffusers/sd3"), Recorder()
    model = adaptok.wrap(case.build(), "dc", router=router, budget=list(KEEP))
    kwargs = case.inputs(model).kwargs | {"timestep": step}
    with torch.no_grad():
        model(**kwargs)
    assert router.seen[-1].tolist() == [700.0] * 3


class TimeFirst(DiT):
    """Embeds time and class before the latent, as some research code does."""

    def forward(self, x, t, y):
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


class TwoTimes(DiT):
    """Embeds a second time by the same module."""

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.t_embedder(t / 2) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


def make_inputs(*times):
    b = len(times)
    return torch.randn(b, 4, 8, 12), torch.tensor(times), torch.arange(b)


@pytest.mark.parametrize("make", [DiT, TimeFirst, TwoTimes])
def test_a_pass_that_failed_leaves_no_step_to_the_next(make):
    router = Recorder()
    model = adaptok.wrap(make((8, 12)).eval(), "dc", router=router, budget=0.5)
    blocks = find_adaptive(model)
    x, t, _ = make_inputs(5.0, 6.0)
    for wrong in (torch.tensor([0, 99]), None):
        with pytest.raises((IndexError, TypeError)), torch.no_grad():
            model(x, t, wrong)  # both entrances were called, or one of them
        for other in (copy.deepcopy(blocks), pickle.loads(pickle.dumps(blocks))):
            assert other.handed.is_empty
    for times in ((30.0, 40.0), (50.0, 60.0)):
        with torch.no_grad():
            model(*make_inputs(*times))
        assert router.seen[-1].tolist() == list(times)
    assert blocks.handed.is_empty


def test_a_host_that_embeds_no_time_reads_none_of_a_pass_that_failed():
    class Timeless(DiT):
        def forward(self, x, t, y):
            c = self.y_embedder.embedding_table(y) if t is None else None
            x = self.x_embedder(x) + self.pos_embed
            c = self.t_embedder(t) + self.y_embedder(y, False) if c is None else c
            for block in self.blocks:
                x = block(x, c)
            return x

    router = Recorder()
    model = adaptok.wrap(Timeless((8, 12)).eval(), "dc", router=router, budget=0.5)
    x, t, y = make_inputs(5.0, 6.0)
    with torch.no_grad(), pytest.raises(IndexError):
        model(x, t, y + 99)
    with torch.no_grad():
        model(x, None, y)
    assert router.seen[-1] is None


def test_a_latent_that_is_refused_leaves_nothing():
    model = adaptok.wrap(DiT((8, 12)).eval(), "dc", budget=0.5)
    x, t, y = make_inputs(5.0, 6.0)
    with pytest.raises(IndexError):
        model(x, t, y + 99)
    assert not find_adaptive(model).handed.is_empty
    with pytest.raises(HandOverError, match="takes latents"):
        model(x[0], t, y)
    assert find_adaptive(model).handed.is_empty


@pytest.mark.parametrize("name", ["facebook/dit", "diffusers/sd3", "diffusers/dit"])
def test_a_router_of_the_step_compiles_as_one_graph(name):
    torch._dynamo.reset()
    case = find_case(name)
    model = adaptok.wrap(case.build(), "dc", router=ByStep(), budget=0.5)
    inputs = case.inputs(model)
    later = change_step(inputs, 7)
    with torch.no_grad():
        expected = [case.run(model, given) for given in (inputs, later)]
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        found = [case.run(compiled, given) for given in (inputs, later)]
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert find_adaptive(model).handed.is_empty


def change_step(inputs, shift):
    """Return the inputs of a case with its steps in another order."""
    if "timestep" in inputs.kwargs:
        step = inputs.kwargs["timestep"].flip(0) + shift
        return HostInputs(inputs.args, inputs.kwargs | {"timestep": step})
    x, t, *others = inputs.args
    return HostInputs((x, t.flip(0) + shift, *others))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_a_router_of_the_step_is_exported(strict):
    case = find_case("facebook/dit")
    model = adaptok.wrap(case.build(), "dc", router=ByStep(), budget=0.5)
    inputs = case.inputs(model)
    program = torch.export.export(model, inputs.args, strict=strict).module()
    for given in (inputs, change_step(inputs, 7)):
        with torch.no_grad():
            expected = case.run(model, given)
            torch.testing.assert_close(program(*given.args), expected, rtol=0, atol=1e-5)


def test_gradients_under_checkpointing_see_the_same_step():
    case, router = find_case("diffusers/sd3"), Recorder()
    model = case.build().train()
    model.enable_gradient_checkpointing()
    adaptok.wrap(model, "dc", router=router, budget=list(KEEP), verify=False)
    inputs = case.inputs(model)
    case.run(model, inputs).square().mean().backward()
    assert router.seen
    assert all(torch.equal(step, TIMES) for step in router.seen)
    router.seen.clear()
    copy.deepcopy(model)


class Mine(DiT):
    """A user's model, described by a `ListBackbone`; its step may be a number."""

    def forward(self, latent, step, *, labels):
        step = torch.as_tensor(step).float().expand(len(latent))
        return super().forward(latent, step, labels)


def find_grid(latent, step, *, labels):
    return (latent.shape[2] // 2, latent.shape[3] // 2)


def wrap_mine(name="step", grid=(4, 6)):
    router = Recorder()
    host = ListBackbone(blocks="blocks", grid=grid, per_sample=(1,), timestep=name, width=96)
    model = adaptok.wrap(
        Mine((8, 12)).eval(), "dc", router=router, budget=0.5, backbone=host, verify=False
    )
    return model, router


@pytest.mark.parametrize("grid", [(4, 6), find_grid])
def test_a_described_model_says_which_argument_is_the_step(grid):
    model, _ = wrap_mine(grid=grid)
    x, t, y = make_inputs(5.0, 6.0)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = next(part for part in other.modules() if isinstance(part, Recorder))
        with torch.no_grad():
            other(x, t, labels=y)
            other(latent=x, step=t + 1, labels=y)
            other(x, 7, labels=y)
        assert [step.tolist() for step in found.seen[-3:]] == [[5.0, 6.0], [6.0, 7.0], [7, 7]]


def test_a_described_model_without_that_argument_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"no argument 'sigma'.* latent, step, labels"):
        wrap_mine("sigma")
