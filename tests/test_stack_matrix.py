"""Stacks of methods on a DiT and on a ViT: all pairs, five triples, identity, provenance, batches.

Listed by name before they run. On a DiT every pair and triple runs; on a ViT those without a step,
and the others refuse with what is missing.
"""

import copy
from itertools import combinations

import pytest
import torch

import adaptok
from adaptok.chunking import Provenance
from adaptok.errors import StackError
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights
from benchmarks.architectures import find_case

# each method at full budget, where it must change nothing, and where it saves
DIT = {
    "dc": ({"name": "dc"}, {"name": "dc"}),
    "tome": ({"name": "tome", "restore": "update"},) * 2,
    "prune": ({"name": "dynamicvit", "restore": "update"},) * 2,
    "exit": (
        {"name": "schedule", "schedule": ((0.0, 1.0),), "scale": (999.0, 0.0)},
        {"name": "schedule", "schedule": ((0.0, 1.0), (0.5, 0.5)), "scale": (999.0, 0.0)},
    ),
    "teacache": ({"name": "teacache", "threshold": 0.0}, {"name": "teacache", "threshold": 0.5}),
    "width": ({"name": "width"}, {"name": "width"}),
}
VIT = {
    "dc": ({"name": "dc"}, {"name": "dc"}),
    "tome": ({"name": "tome"},) * 2,
    "prune": ({"name": "evit"},) * 2,
    "exit": ({"name": "exit"}, {"name": "exit", "threshold": 0.3}),
    "teacache": ({"name": "teacache"},) * 2,
    "width": ({"name": "width"},) * 2,
}
PAIRS = list(combinations(DIT, 2))
TRIPLES = [
    ("dc", "tome", "teacache"),
    ("dc", "exit", "teacache"),
    ("dc", "tome", "width"),
    ("tome", "prune", "exit"),
    ("dc", "width", "teacache"),
]
STACKS = PAIRS + TRIPLES
NEED_STEP = {"teacache", "width"}
ON_VIT = [names for names in STACKS if not NEED_STEP & set(names)]
OFF_VIT = [names for names in STACKS if NEED_STEP & set(names)]
TOKENS = {"dc", "tome", "prune"}


def join(names):
    return "+".join(names)


def make_host(kind):
    if kind == "vit":
        return fill_weights(make_vit()).eval()
    return find_case("facebook/dit").build().eval()


def give_inputs(kind, model):
    if kind == "vit":
        generator = torch.Generator().manual_seed(3)
        return (torch.randn(3, 3, 32, 48, generator=generator),)
    return find_case("facebook/dit").inputs(model).args


def wrap(kind, names, model, full, **options):
    methods = DIT if kind == "dit" else VIT
    stack = [copy.deepcopy(methods[name][0 if full else 1]) for name in names]
    if TOKENS & set(names):
        options = {"budget": 1.0 if full else 0.5} | options
    adaptok.wrap(model, stack=stack, verify=False, **options)
    randomise_parts(model, names)
    return model


def randomise_parts(model, names):
    """Give the new weights values that matter, where that keeps the identity at full budget."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".adaptok." in name and any(part in name for part in ("predictor", "router.head")):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def call(model, args, request="one"):
    """Run three steps of a request, so that caches have something to reuse; one on a ViT."""
    outs = []
    with torch.no_grad(), adaptok.trace(model) as seen, adaptok.request(model, request):
        for given in list_steps(args):
            out = model(*given)
            outs.append(out if isinstance(out, torch.Tensor) else out[0])
    return torch.stack(outs, dim=1), seen.steps


def call_plain(model, args):
    with torch.no_grad():
        return torch.stack([model(*given) for given in list_steps(args)], dim=1)


def list_steps(args):
    if len(args) == 1:
        return [args]
    x, t, y = args
    return [(x * (1 - 0.01 * step), (t - 2 * step).clamp(min=0), y) for step in range(3)]


def cut(args, sample):
    return tuple(arg[sample : sample + 1] if isinstance(arg, torch.Tensor) else arg for arg in args)


@pytest.mark.parametrize("names", STACKS, ids=join)
def test_every_stack_on_a_dit_is_the_identity_at_full_budget(names):
    model = make_host("dit")
    args = give_inputs("dit", model)
    expected = call_plain(model, args)
    changed = call_plain(model, (torch.zeros_like(args[0]), *args[1:]))
    assert (changed - expected).abs().max() > 0.01 * expected.abs().max()
    wrap("dit", names, model, full=True)
    out, steps = call(model, args)
    assert set(model.get_submodule("blocks.adaptok")._modules) == {
        {"prune": "dynamicvit", "exit": "schedule"}.get(name, name) for name in names
    }
    assert {"dc", "tome", "dynamicvit"} & set(join(steps[0].stages).split("+")) == {
        {"prune": "dynamicvit"}.get(name, name) for name in TOKENS & set(names)
    }
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    adaptok.unwrap(model)
    assert torch.equal(call_plain(model, args), expected)


@pytest.mark.parametrize("names", STACKS, ids=join)
def test_every_stack_on_a_dit_saves_and_leaves_batch_mates_alone(names):
    model = make_host("dit")
    args = give_inputs("dit", model)
    twin = copy.deepcopy(model)
    expected = call_plain(model, args)
    wrap("dit", names, model, full=False)
    out, steps = call(model, args)
    assert (out - expected).abs().max() > 1e-3 * expected.abs().max()
    if "teacache" in names:
        assert steps[2].flops < 0.7 * steps[0].flops  # not all samples were computed again
    check_provenance(steps[0], names)
    for sample in range(len(args[0])):
        alone = wrap("dit", names, copy.deepcopy(twin), full=False)
        single, _ = call(alone, cut(args, sample), request=f"sample {sample}")
        torch.testing.assert_close(
            single[0], out[sample], rtol=1e-4, atol=1e-4 * float(out.abs().max())
        )


@pytest.mark.parametrize("names", ON_VIT, ids=join)
def test_the_fitting_stacks_on_a_vit(names):
    model = make_host("vit")
    args = give_inputs("vit", model)
    twin = copy.deepcopy(model)
    expected = call_plain(model, args)
    wrap("vit", names, model, full=True)
    out, _ = call(model, args)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    saving = wrap("vit", names, copy.deepcopy(twin), full=False)
    out, steps = call(saving, args)
    check_provenance(steps[0], names)
    for sample in range(len(args[0])):
        single, _ = call(saving, cut(args, sample))
        torch.testing.assert_close(
            single[0], out[sample], rtol=1e-4, atol=1e-4 * float(out.abs().max())
        )


@pytest.mark.parametrize("names", OFF_VIT, ids=join)
def test_what_needs_a_step_refuses_on_a_vit(names):
    model = make_host("vit")
    with pytest.raises(StackError, match=r"needs the diffusion step, and .* hands none over"):
        wrap("vit", names, model, full=True)
    assert not adaptok.is_wrapped(model)


def check_provenance(step, names):
    """Compose the maps of all plans by hand, cell by cell, where each stage told once."""
    if not TOKENS & set(names):
        assert step.plans == ()
        return
    b, n = step.provenance.token.shape
    assert all(plan.computed.max() < n for plan in step.plans)
    if len(set(step.stages)) != len(step.stages):
        return  # an outer stage ran its blocks in pieces: see tests/test_reduce_stage.py
    token = Provenance.identity(b, n).token.clone()
    for plan in step.plans:
        for sample in range(b):
            if not plan.keep_mask[sample].any():
                continue
            for cell in range(n):
                if token[sample, cell] >= 0:
                    token[sample, cell] = plan.provenance.token[sample, token[sample, cell]]
    assert torch.equal(token, step.provenance.token)
    assert step.provenance.token.amax(1).lt(n - 1).all()
