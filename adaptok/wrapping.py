"""wrap and unwrap: a model of somebody else becomes adaptive, in place, and goes back."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from adaptok.backbones.packed_forms import pack_blocks
from adaptok.backbones.split_forms import split_blocks
from adaptok.blocks import AdaptiveBlocks, list_adaptive
from adaptok.budgeted import Budgeted
from adaptok.budgets import Budget
from adaptok.chunk_stage import ChunkStage
from adaptok.compiling import compile as compile_adaptive
from adaptok.compiling import uncompile
from adaptok.containers import BlockContainer, FollowingBlocks
from adaptok.discovery import HOST, find_part
from adaptok.entrances import Entrance
from adaptok.errors import (
    AlreadyWrappedError,
    BudgetError,
    ConfigError,
    FullBudgetWarning,
    NotWrappedError,
    UnsupportedModelError,
    WrapError,
)
from adaptok.hosts import Backbone, NoMatch, choose_backbone, device_of, dtype_of
from adaptok.packed_run import PackedBlock
from adaptok.parts import HostFacts, Spec
from adaptok.probing import can_probe, probe, prove_call, set_submodule
from adaptok.reduce_stage import ReduceStage
from adaptok.split_run import SplitBlock
from adaptok.stacking import build_stages
from adaptok.stages import Stage
from adaptok.wrap_config import BudgetConfig

Model = TypeVar("Model", bound=nn.Module)
BudgetSpec = float | Mapping[str, float | Sequence[float]] | Budget


def wrap(
    model: Model,
    chunker: Spec | None = None,
    *,
    router: Spec | None = None,
    dechunker: Spec | None = None,
    span: tuple[int, int] | None = None,
    budget: BudgetSpec | None = None,
    stack: Sequence[Spec] = (),
    backbone: str | Backbone = "auto",
    verify: bool = True,
    compile: bool = False,
) -> Model:
    """Make a model spend its tokens where the image needs them, in place.

    The model keeps its class, its weights and the names of its state dict; new names all contain
    `.adaptok.`. Until something is trained, it computes what it computed before as long as every
    cell is kept.

    Args:
        model: a Vision Transformer or Diffusion Transformer.
        chunker: how tokens become fewer: a name, a mapping such as `{"name": "dc", "layout":
            "fixed"}`, a configuration or an instance.
        router: what says how much each cell deserves a token, in the same four forms; None takes
            the chunker's own.
        dechunker: what gives all cells back, in the same four forms; None takes the chunker's own.
        span: the first block that runs on few tokens, and the one behind the last; None means all.
        budget: a fraction of the cells to keep, a mapping such as `{"drop": 0.3}`, or a `Budget`;
            None is the natural budget, with which a fresh wrap keeps every cell.
        stack: further stages, in the same four forms.
        backbone: name of the adapter of the model's family, or an adapter; `"auto"` finds it.
        verify: try the wrap on small inputs, and raise if it is not what it promises.
        compile: compile the wrapped model, too; see `adaptok.compile`.

    Returns:
        The same object.

    Raises:
        AlreadyWrappedError: the model is wrapped.
        UnsupportedModelError: no backbone fits it; the message lists what was looked for.
        WrapError: the span lies outside the blocks, or nothing was asked for.
        ProbeError: the wrap would not do what it promises. After each of these errors the model
            is as it was before.
        ConfigError: an option does not exist or has a wrong value.
        BudgetError: a budget came, and no stage takes one.
        StackError: the stages cannot run together, or not on this host.
        UnknownNameError: there is no part of that name.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit, image = make_vit(), torch.randn(2, 3, 32, 48)
        >>> before = vit(image)
        >>> _ = adaptok.wrap(vit, chunker="dc", budget=0.5)
        >>> with adaptok.trace(vit) as seen:
        ...     after = vit(image)
        >>> seen.steps[0].kept
        tensor([12, 12])
        >>> torch.equal(adaptok.unwrap(vit)(image), before)
        True
    """
    check_wrappable(model)
    if chunker is None and not stack:
        alone = "router= and dechunker= alone do nothing: " if router or dechunker else ""
        raise WrapError(
            f'{alone}nothing was asked for: give a chunker, as in adaptok.wrap(model, "dc")'
        )
    host = resolve_backbone(model, backbone)
    chosen = resolve_span(span, host.depth)
    limit = resolve_budget(budget)
    facts = HostFacts(host.width, host.depth, host.grid_axes)
    stages, config = build_stages(chunker, router, dechunker, stack, facts, host)
    config = config.model_copy(
        update={
            "backbone": host.name,
            "span": chosen,
            "budget": BudgetConfig.from_budget(limit),
        }
    )
    check_budgeted(limit, stages)
    device, dtype = device_of(model), dtype_of(model)
    for stage in stages.values():
        stage.to(device=device, dtype=dtype)
        stage.train(model.training)
        if isinstance(stage, Budgeted):
            stage.take_budget(limit, None)
    blocks, paths = attach(model, host, stages, chosen)
    blocks.config = config
    try:
        blocks.forms = find_forms(blocks)
        blocks.splits, blocks.whole = find_splits(blocks)
        if verify and can_probe(model):
            probe(model, blocks, paths)
        elif verify:
            blocks.proof = prove_call
    except BaseException:
        detach(model)
        raise
    if limit.is_natural and starts_full(stages.values()):
        warn_full_budget(model)
    return compile_adaptive(model) if compile else model


def unwrap(model: Model) -> Model:
    """Give a wrapped model back as it was before, bit for bit, in place.

    Args:
        model: a wrapped model.

    Returns:
        The same object.

    Raises:
        NotWrappedError: the model is not wrapped.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> adaptok.is_wrapped(adaptok.unwrap(vit))
        False
    """
    if not is_wrapped(model):
        raise NotWrappedError(f"{type(model).__name__} is not wrapped: there is nothing to undo")
    detach(model)
    return model


def is_wrapped(model: nn.Module) -> bool:
    """Say whether a model, or a part of it, is wrapped.

    Args:
        model: any module.

    Returns:
        Whether it is.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> adaptok.is_wrapped(make_vit())
        False
    """
    return bool(list_adaptive(model))


def check_wrappable(model: object) -> None:
    """Raise unless a model can be wrapped at all."""
    if not isinstance(model, nn.Module):
        advice = ""
        if hasattr(model, "transformer") or hasattr(model, "unet"):
            advice = ": pass its transformer, pipe.transformer = adaptok.wrap(pipe.transformer)"
        raise UnsupportedModelError(
            f"wrap takes a torch.nn.Module, got a {type(model).__name__}{advice}"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("a scripted model has no blocks to wrap: wrap it before")
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            "a compiled model is wrapped before it is compiled: "
            "torch.compile(adaptok.wrap(model, ...))"
        )
    if is_wrapped(model):
        raise AlreadyWrappedError(
            f"{type(model).__name__} is wrapped already: use stack= for several methods, or "
            "adaptok.unwrap(model) first"
        )


def resolve_backbone(model: nn.Module, backbone: str | Backbone) -> Backbone:
    """Return the adapter of a model (see `wrap`)."""
    if isinstance(backbone, Backbone):
        return backbone.fit(model)
    if not isinstance(backbone, str):
        raise ConfigError(
            f"backbone is a name or an adaptok.Backbone instance, got {backbone!r:.80}"
        )
    if backbone != "auto":
        candidate = find_part("backbone", backbone)
        try:
            found: Backbone = candidate.match(model)
        except NoMatch as reason:
            raise UnsupportedModelError(
                f"the backbone {backbone!r} does not fit {type(model).__name__}: {reason}"
            ) from None
        return found
    HOST.load_all()
    entries = [entry for entry in HOST.registry.entries.values() if entry.kind == "backbone"]
    own = [entry for entry in entries if entry.path.startswith("adaptok.")]
    candidates = {}
    for entry in [entry for entry in entries if entry not in own][::-1] + own:
        candidates[entry.name] = entry.load()
    return choose_backbone(model, candidates)


def resolve_span(span: tuple[int, int] | None, depth: int) -> tuple[int, int]:
    """Return the blocks inside the stages (see `wrap`)."""
    if span is None:
        return (0, depth)
    try:
        first, last = (int(edge) for edge in span)
    except (TypeError, ValueError):
        raise WrapError(
            f"span is a pair of blocks (first, last), the last one excluded, got {span!r}"
        ) from None
    if not 0 <= first < last <= depth:
        raise WrapError(
            f"the span ({first}, {last}) lies outside the {depth} blocks of this model: give "
            f"0 <= first < last <= {depth}"
        )
    return (first, last)


def resolve_budget(budget: BudgetSpec | str | None) -> Budget:
    """Return the budget that was asked for (see `wrap`)."""
    if budget is None:
        return Budget()
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, Mapping):
        unknown = set(budget) - {"keep", "tokens", "drop"}
        if unknown:
            raise BudgetError(
                f"a budget has keep, tokens or drop, got {', '.join(sorted(map(str, unknown)))}"
            )
        return Budget(keep=budget.get("keep"), tokens=budget.get("tokens"), drop=budget.get("drop"))
    if isinstance(budget, str):
        raise BudgetError(
            f'budget is a number, a mapping such as {{"drop": 0.3}} or a Budget, got {budget!r}'
        )
    return Budget(keep=budget)


def check_budgeted(limit: Budget, stages: Mapping[str, Stage]) -> None:
    """Raise a `BudgetError` where a budget came and no stage takes one."""
    if limit.is_natural or any(isinstance(stage, Budgeted) for stage in stages.values()):
        return
    raise BudgetError(
        f"budget={limit.describe()!r} is for stages that make tokens fewer, and none of "
        f"{', '.join(map(repr, stages))} does: leave it out, or set their own options"
    )


def attach(
    model: nn.Module, host: Backbone, stages: Mapping[str, Stage], span: tuple[int, int]
) -> tuple[AdaptiveBlocks, dict[str, BlockContainer]]:
    """Put the adaptive block list in the place of the host's, and listen at its entrances."""
    first, *others = host.containers
    for path in host.containers:
        refuse_hooks(path, model.get_submodule(path))
    followers = {path: FollowingBlocks(model.get_submodule(path)) for path in others}
    blocks = AdaptiveBlocks(
        model.get_submodule(first), host, stages, span, tuple(followers.values())
    )
    paths: dict[str, BlockContainer] = {first: blocks, **followers}
    for path, container in paths.items():
        set_submodule(model, path, container)
    for path in host.entrances(model):
        model.get_submodule(path).register_forward_pre_hook(
            Entrance(path, blocks), with_kwargs=True
        )
    return blocks, paths


def refuse_hooks(path: str, container: nn.Module) -> None:
    """Raise an `UnsupportedModelError` if somebody listens to a block list itself."""
    hooks = (
        container._forward_hooks,
        container._forward_pre_hooks,
        container._backward_hooks,
        container._backward_pre_hooks,
    )
    if any(hooks):
        raise UnsupportedModelError(
            f"{path} has hooks of its own, which would not be called any more: remove them, wrap, "
            f"and register them at {path} again; hooks of single blocks may stay"
        )


def find_forms(blocks: AdaptiveBlocks) -> dict[nn.Module, PackedBlock]:
    """Return packed forms of the blocks in the span, where the layout asks for them."""
    layouts = [
        stage.chunker.layout
        for stage in blocks.stages
        if isinstance(stage, ChunkStage) and hasattr(stage.chunker, "layout")
    ]
    if "packed" not in layouts:
        return {}
    inside = blocks.all_blocks[slice(*blocks.span)]
    return dict(zip(inside, pack_blocks(inside), strict=True))


def find_splits(blocks: AdaptiveBlocks) -> tuple[dict[nn.Module, SplitBlock], str]:
    """Return halves of the blocks in the span where a stage asks for them, or why not."""
    asked = [
        stage
        for stage in blocks.stages
        if isinstance(stage, ReduceStage)
        or stage.effects.needs_keys
        or stage.effects.needs_attention
    ]
    if not asked:
        return {}, blocks.whole
    first, last = blocks.span
    inside = blocks.all_blocks[first:last]
    try:
        return dict(zip(inside, split_blocks(inside, first), strict=True)), blocks.whole
    except UnsupportedModelError as reason:
        return {}, str(reason)


def detach(model: nn.Module) -> None:
    """Put the host's own block lists back, stop listening, and forget compiled graphs."""
    uncompile(model)
    for module in list(model.modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Entrance):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for name, child in list(module.named_children()):
            if isinstance(child, BlockContainer):
                setattr(module, name, child.restore())


def starts_full(stages: Iterable[Stage]) -> bool:
    """Say whether fresh stages keep every cell of themselves, so that nothing is saved yet."""
    return all(isinstance(stage, ChunkStage) and stage.router.starts_full for stage in stages)


def warn_full_budget(model: nn.Module) -> None:
    """Say once that nothing is saved yet, and what to do."""
    warnings.warn(
        f"{type(model).__name__} is wrapped without a budget: its fresh router keeps every cell, "
        "so that nothing gets faster yet. Give budget=0.5 or adaptok.set_budget(model, keep=0.5), "
        "or train the router: adaptok tune",
        FullBudgetWarning,
        stacklevel=3,
    )
