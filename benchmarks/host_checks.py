"""What a wrap promises, tried on one host of the catalogue: used by tests and by `hosts.py`."""

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import adaptok
from adaptok.errors import HostOptionError
from benchmarks.architectures import HostCase, HostInputs, find_case
from benchmarks.live_memory import LiveMemory

EXACT = 1e-5
BUDGETS = [0.2, 0.5, 0.9]  # kept counts of a batch that differ more than twofold
MEMORY_LIMIT = 1.2


class BrokenPromiseError(AssertionError):
    """A promise does not hold on a host."""


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A host, and a wrapped twin with the same weights.

    Args:
        case: the catalogue's entry.
        plain: the host.
        model: the same host, wrapped, with a router whose weights matter.
        inputs: a batch of three unlike samples.
        expected: what the host computes.
    """

    case: HostCase
    plain: nn.Module
    model: nn.Module
    inputs: HostInputs
    expected: Tensor

    @property
    def stage(self) -> nn.Module:
        """The one stage of the wrap."""
        return stages_of(self.model)[0]

    def run(self, model: nn.Module, inputs: HostInputs | None = None) -> Tensor:
        """Run a model on the batch, or on other inputs."""
        return self.case.run(model, self.inputs if inputs is None else inputs)


def stages_of(model: nn.Module) -> list[nn.Module]:
    """Return the stages of a wrapped model."""
    return next(m for m in model.modules() if isinstance(m, adaptok.AdaptiveBlocks)).stages


def wrap_case(case: HostCase, **options: object) -> Wrapped:
    """Build a host of the catalogue and wrap a copy of it."""
    plain = case.build()
    inputs = case.inputs(plain)
    with torch.no_grad():
        expected = case.run(plain, inputs)
    options = {"chunker": "dc", "budget": 1.0, "backbone": describe_host(case)} | options
    model = adaptok.wrap(copy.deepcopy(plain), **options)
    randomise_router(stages_of(model)[0].router)
    return Wrapped(case, plain, model, inputs, expected)


@dataclass(frozen=True, slots=True)
class CaseInputs:
    """Example inputs of a catalogue entry, for the probe of a plain list of blocks."""

    case: str

    def __call__(self, model: nn.Module) -> adaptok.HostInputs:
        """Return the entry's own batch."""
        inputs = find_case(self.case).inputs(model)
        return adaptok.HostInputs(inputs.args, inputs.kwargs)


def describe_host(case: HostCase) -> str | adaptok.Backbone:
    """Return how a host is found: by itself, or by three words of its user."""
    if case.family != "plain":
        return "auto"
    return adaptok.ListBackbone(
        blocks=case.containers[0],
        grid=case.cells,
        prefix=case.prefix,
        inputs=CaseInputs(case.name),
    )


def randomise_router(router: nn.Module) -> None:
    """Give a router weights of its own, so that it is not its prior only; it keeps every cell."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in router.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = max(1.0, parameter[0].numel() if parameter.ndim > 1 else 1) ** 0.5
            parameter.add_(0.3 * noise / scale)


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def require(condition: bool, message: str) -> None:
    """Raise `BrokenPromiseError` unless a promise holds."""
    if not condition:
        raise BrokenPromiseError(message)


def check_identity(w: Wrapped) -> str:
    """Everything kept, every part run: the host's own output."""
    seen: list[str] = []
    hooks = [
        getattr(w.stage, name).register_forward_hook(lambda *_, name=name: seen.append(name))
        for name in ("router", "chunker", "dechunker")
    ]
    with torch.no_grad(), adaptok.trace(w.model) as trace:
        error = distance(w.run(w.model), w.expected)
    for hook in hooks:
        hook.remove()
    require(seen == ["router", "chunker", "dechunker"], f"parts that ran: {seen}")
    require(len(trace.steps) == 1, f"{len(trace.steps)} entries")
    require(error <= EXACT, f"differs by {error:.1e}")
    return f"{error:.0e}" if error else "0"


def check_kept(w: Wrapped) -> str:
    """Half the cells kept: exactly half are computed, and the output moves."""
    with torch.no_grad(), adaptok.budget(w.model, keep=0.5), adaptok.trace(w.model) as trace:
        moved = distance(w.run(w.model), w.expected)
    n = trace.steps[0].provenance.token.shape[1]
    kept = set(trace.steps[0].kept.tolist())
    require(kept == {max(1, int(0.5 * n + 0.5))}, f"kept {kept} of {n}")
    require(moved > 0.01, f"the output moved by {moved:.1e} only")
    return f"{kept.pop()} of {n}"


def check_class_and_keys(w: Wrapped) -> str:
    """The class is the host's, and so are all its keys."""
    require(type(w.model) is type(w.plain), type(w.model).__name__)
    keys = list(w.model.state_dict())
    require([k for k in keys if ".adaptok." not in k] == list(w.plain.state_dict()), "keys moved")
    return "yes"


def check_invariance(w: Wrapped) -> str:
    """A sample alone gives what it gives in the batch, with counts that differ."""
    with torch.no_grad(), adaptok.trace(w.model) as trace:
        with adaptok.budget(w.model, keep=BUDGETS):
            whole = w.run(w.model)
        counts = trace.steps[0].kept
        require(bool(counts.max() >= 2 * counts.min()), f"counts {counts.tolist()}")
        worst = 0.0
        for i, keep in enumerate(BUDGETS):
            with adaptok.budget(w.model, keep=keep):
                alone = w.run(w.model, w.case.one(w.inputs, i))
            same = torch.equal(
                trace.steps[-1].plans[0].keep_mask[0], trace.steps[0].plans[0].keep_mask[i]
            )
            require(same, f"sample {i} keeps other cells alone")
            worst = max(worst, distance(alone[0], whole[i]))
    require(worst <= 2 * EXACT, f"differs by {worst:.1e}")
    return f"{worst:.0e}"


def check_positions(w: Wrapped) -> str:
    """Whether samples with other kept cells run in one call, or one by one."""
    blocks = next(m for m in w.model.modules() if isinstance(m, adaptok.AdaptiveBlocks))
    return "together" if blocks.backbone.positions_per_sample else "one by one"


def check_unwrap(w: Wrapped) -> str:
    """Unwrap gives the host back, bit for bit, and nothing else."""
    model = copy.deepcopy(w.model)
    adaptok.unwrap(model)
    with torch.no_grad():
        require(torch.equal(w.run(model), w.expected), "outputs differ")
    require(list(model.state_dict()) == list(w.plain.state_dict()), "keys differ")
    for (name, a), (_, b) in zip(model.named_modules(), w.plain.named_modules(), strict=True):
        require(type(a) is type(b), f"{name} is a {type(a).__name__}")
        require(len(a._forward_pre_hooks) == len(b._forward_pre_hooks), f"a hook is left on {name}")
        require(vars(a).keys() == vars(b).keys(), f"attributes are left on {name}")
    return "exact"


def check_copy(w: Wrapped) -> str:
    """A deep copy and a pickle compute the same, with weights of their own."""
    with torch.no_grad(), adaptok.budget(w.model, keep=0.5):
        expected = w.run(w.model)
        for other in (copy.deepcopy(w.model), pickle.loads(pickle.dumps(w.model))):
            require(torch.equal(w.run(other), expected), "a copy computes something else")
            for parameter in other.parameters():
                parameter.mul_(1.3)
            require(torch.equal(w.run(w.model), expected), "a copy shares weights")
            require(distance(w.run(other), expected) > 1e-3, "a copy has others' weights")
    return "own weights"


def check_state_dict(w: Wrapped) -> str:
    """A state dict goes round; the host's own checkpoint loads with only our keys missing."""
    other = adaptok.wrap(w.case.build(), chunker="dc", budget=0.5, backbone=describe_host(w.case))
    for parameter in other.parameters():
        parameter.data.mul_(0.9)
    missing = other.load_state_dict(w.plain.state_dict(), strict=False)
    require(all(".adaptok." in key for key in missing.missing_keys), "host keys are missing")
    require(not missing.unexpected_keys, "unexpected keys")
    other.load_state_dict(w.model.state_dict())
    with torch.no_grad(), adaptok.budget(w.model, keep=0.5):
        require(torch.equal(w.run(other), w.run(w.model)), "outputs differ")
    return "yes"


def check_compile(w: Wrapped) -> str:
    """One graph, the same values; where the host itself makes one."""
    torch._dynamo.reset()
    with torch.no_grad():
        try:
            w.run(torch.compile(w.plain, fullgraph=True, backend="eager"))
        except Exception:  # what a host does in its own forward is its own
            return "host does not"
        finally:
            torch._dynamo.reset()
        with adaptok.budget(w.model, keep=0.5):
            expected = w.run(w.model)
            found = w.run(torch.compile(w.model, fullgraph=True, backend="eager"))
        torch._dynamo.reset()
    error = distance(found, expected)
    require(error <= EXACT, f"differs by {error:.1e}")
    return "yes"


def check_gradient(w: Wrapped) -> str:
    """A loss on the output reaches the router."""
    model = copy.deepcopy(w.model)
    for module in stages_of(model):
        module.train()
    with adaptok.budget(model, keep=0.5):
        w.run(model).square().mean().backward()
    reached = stages_of(model)[0].router.logit.weight.grad
    require(reached is not None and bool(reached.any()), "no gradient")
    return f"{float(reached.abs().max()):.0e}"


def checkpointing_of(model: nn.Module) -> Callable[[], object] | None:
    """Return what switches gradient checkpointing of a host on, or None."""
    for name in ("set_grad_checkpointing", "enable_gradient_checkpointing"):
        if hasattr(model, name):
            return getattr(model, name)
    if hasattr(model, "gradient_checkpointing_enable"):
        return lambda: model.gradient_checkpointing_enable({"use_reentrant": False})
    return None


def check_checkpointing(w: Wrapped) -> str:
    """Checkpointed gradients are the same, and the peak stays near the host's own."""
    plain, model = copy.deepcopy(w.plain).train(), copy.deepcopy(w.model).train()
    silence_dropout(plain)
    silence_dropout(model)
    wanted = gradients(w, model)
    for host in (plain, model):
        switch = checkpointing_of(host)
        if switch is None:
            return "host has none"
        switch()
    found = gradients(w, model)
    require(found.keys() == wanted.keys(), "other parameters have gradients")
    for name, value in wanted.items():
        gap = float((found[name] - value).abs().max())
        require(gap <= 1e-5 * float(value.abs().max()) + 1e-7, f"gradient of {name} by {gap:.1e}")
    ratio = peak(w, model) / peak(w, plain)
    require(ratio <= MEMORY_LIMIT, f"peak memory {ratio:.2f} times the host's own")
    return f"{ratio:.2f}"


def silence_dropout(model: nn.Module) -> None:
    """Leave train mode on, and take randomness out."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("drop_prob", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def gradients(w: Wrapped, model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of all parameters."""
    model.zero_grad()
    torch.manual_seed(0)
    w.run(model).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def peak(w: Wrapped, model: nn.Module) -> int:
    """Return the peak of live bytes of a training step, gradients of parameters included."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with LiveMemory() as memory:
        w.run(model).square().mean().backward()
    return memory.peak


def check_options(w: Wrapped) -> str:
    """Options of the host that reach into single blocks are refused by name."""
    asked = options_into_blocks(w)
    for name, use in asked.items():
        try:
            with torch.no_grad():
                use()
        except HostOptionError:
            continue
        raise BrokenPromiseError(f"{name} was not refused")
    return ", ".join(asked) or "none known"


def options_into_blocks(w: Wrapped) -> dict[str, Callable[[], object]]:
    """Return uses of a host that want single blocks, by name."""
    model, args, kwargs = w.model, w.inputs.args, w.inputs.kwargs
    if w.case.family == "timm":
        return {"forward_intermediates": lambda: model.forward_intermediates(*args, **kwargs)}
    if w.case.family == "transformers":
        return {
            f"output_{name}": lambda name=name: model(*args, **kwargs, **{f"output_{name}": True})
            for name in ("hidden_states", "attentions")
        }
    uses: dict[str, Callable[[], object]] = {}
    kind = type(model).__name__
    if kind == "SD3Transformer2DModel":
        uses["skip_layers"] = lambda: model(*args, **kwargs, skip_layers=[1])
        uses["controlnet"] = lambda: model(
            *args, **kwargs, block_controlnet_hidden_states=[torch.zeros(1)]
        )
    if kind == "FluxTransformer2DModel":
        uses["controlnet"] = lambda: model(
            *args, **kwargs, controlnet_single_block_samples=[torch.zeros(1)]
        )
    return uses


CHECKS: dict[str, Callable[[Wrapped], str]] = {
    "identity": check_identity,
    "kept at .5": check_kept,
    "class and keys": check_class_and_keys,
    "unwrap": check_unwrap,
    "copies": check_copy,
    "state dict": check_state_dict,
    "fullgraph": check_compile,
    "router gradient": check_gradient,
    "batch of one": check_invariance,
    "positions": check_positions,
    "checkpointed peak": check_checkpointing,
    "options refused": check_options,
}


def quietly(run: Callable[[], str]) -> str:
    """Run a check without the warnings of hosts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()
