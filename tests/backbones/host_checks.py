"""What every host must pass, with a case of the catalogue and its adapter."""

import copy
import io
import pickle
import sys
from pathlib import Path

import torch

import adaptok

# `benchmarks` is a folder of scripts, not a part of the package
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.architectures import find_case

__all__ = ["find_case"]

KEEP = (0.2, 0.5, 1.0)


def run(case, model, inputs):
    with torch.no_grad():
        return case.run(model, inputs)


def count_parts(model):
    """Count calls of the parts of the chunk stage: a bypass would not call them."""
    calls = {"router": 0, "chunker": 0, "dechunker": 0}
    for stage in (m for m in model.modules() if type(m).__name__ == "ChunkStage"):
        for name in calls:

            def count(*_, name=name):
                calls[name] += 1

            getattr(stage, name).register_forward_hook(count)
    return calls


def check_identity_keys_and_unwrap(case, host):
    """Bit for bit at full budget with every part run; keys and all else as before after unwrap."""
    model = case.build()
    inputs = case.inputs(model)
    expected, keys = run(case, model, inputs), list(model.state_dict())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modules = {name: id(module) for name, module in model.named_modules()}
    assert adaptok.wrap(model, "dc", budget=1.0, backbone=host(model)) is model
    calls = count_parts(model)
    assert torch.equal(run(case, model, inputs), expected)
    assert calls == {"router": 1, "chunker": 1, "dechunker": 1}
    assert [key for key in model.state_dict() if ".adaptok." not in key] == keys
    with adaptok.budget(model, keep=0.5):
        changed = run(case, model, inputs)
    assert (changed - expected).norm() > 0.01 * expected.norm()
    adaptok.unwrap(model)
    assert torch.equal(run(case, model, inputs), expected)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def check_copies(case, host):
    """deepcopy and pickle give a model with weights of its own that computes the same."""
    model = case.build()
    inputs = case.inputs(model)
    adaptok.wrap(model, "dc", router="norm", budget=list(KEEP), backbone=host(model))
    expected = run(case, model, inputs)
    # rotations and masks of a call must not stay behind: deepcopy refuses such tensors
    case.run(model, inputs).sum().backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(case, other, inputs), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        assert torch.equal(run(case, model, inputs), expected)
        assert not torch.allclose(run(case, other, inputs), expected)
        with adaptok.budget(other, keep=1.0):
            whole = run(case, other, inputs)
        assert torch.equal(run(case, adaptok.unwrap(other), inputs), whole)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True), strict=True)


def check_batch_invariance(case, host, router="norm"):
    """A sample gets the same alone as among others that keep other counts; returns the masks."""
    model = case.build()
    inputs = case.inputs(model)
    adaptok.wrap(model, "dc", router=router, budget=list(KEEP), backbone=host(model))
    with adaptok.trace(model) as together:
        out = run(case, model, inputs)
    plan = together.steps[0].plans[0]
    assert together.steps[0].grid == case.cells
    n = plan.keep_mask.shape[1]
    assert plan.computed.tolist() == [max(1, int(keep * n + 0.5)) for keep in KEEP]
    for sample, keep in enumerate(KEEP):
        with adaptok.budget(model, keep=keep), adaptok.trace(model) as alone:
            found = run(case, model, case.one(inputs, sample))
        assert torch.equal(alone.steps[0].plans[0].keep_mask[0], plan.keep_mask[sample])
        torch.testing.assert_close(found[0], out[sample], rtol=0, atol=1e-5)
    return plan.keep_mask


def record_blocks(model, path, call):
    """Run a wrapped model; return what entered its block list, and what left it."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    with adaptok.trace(model) as trace, torch.no_grad():
        call()
    handle.remove()
    (args, kwargs, out), (step,) = seen[0], trace.steps
    return args, kwargs, out, step.plans[0].keep_mask


def check_loop_oracle(case, model, inputs, by_hand):
    """Compare each sample's kept tokens with those that `by_hand` computes of it alone.

    Args:
        case: of the catalogue.
        model: wrapped.
        inputs: of three samples.
        by_hand: called with the host's blocks, arguments and keyword arguments of the block list
            for one sample, and the rows that are kept; returns the features of those rows.
    """
    path = case.containers[0]
    blocks = model.get_submodule(path).blocks
    with adaptok.budget(model, keep=list(KEEP)):
        args, kwargs, out, kept = record_blocks(model, path, lambda: case.run(model, inputs))
    counts = kept.sum(1)
    assert counts.max() >= 2 * counts.min()
    for sample in range(len(KEEP)):
        cells = kept[sample].nonzero().flatten() + case.prefix
        tail = torch.arange(case.rows(sample).stop, out.shape[1])
        rows = torch.cat([torch.arange(case.prefix), cells, tail])
        one = [cut(value, sample, len(out)) for value in args]
        named = {name: cut(value, sample, len(out)) for name, value in kwargs.items()}
        with torch.no_grad():
            expected = by_hand(blocks, one, named, rows)
        torch.testing.assert_close(out[sample, rows], expected[0], rtol=0, atol=2e-5)


def cut(value, sample, batch):
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == batch:
        return value[sample : sample + 1]
    return value


def check_compile(case, host, build=None):
    """One graph, equal to eager at half the budget; True if the bare host makes one graph too."""
    torch._dynamo.reset()
    model = (build or case.build)()
    inputs = case.inputs(model)
    options = {"fullgraph": True, "backend": "eager"}
    run(case, torch.compile(model, **options), inputs)
    torch._dynamo.reset()
    adaptok.wrap(model, "dc", budget=0.5, backbone=host(model))
    expected = run(case, model, inputs)
    compiled = torch.compile(model, **options)
    torch.testing.assert_close(run(case, compiled, inputs), expected, rtol=0, atol=1e-5)


def check_router_gradient(case, host):
    """Training moves the router, through tokens that are dropped."""
    model = case.build().train()
    inputs = case.inputs(model)
    adaptok.wrap(model, "dc", budget=0.5, backbone=host(model))
    case.run(model, inputs).square().mean().backward()
    router = [p for name, p in model.named_parameters() if ".adaptok.dc.router." in name]
    assert router
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in router)
