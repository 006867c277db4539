"""Checks of routers."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptok.budgets import Budget
from adaptok.chunk_stage import ChunkStage
from adaptok.dc.host import HostChunker
from adaptok.registry import Kind
from adaptok.routing import Context, Router, Routing
from adaptok.stages import Stage
from adaptok.testing.cases import (
    HALF,
    ROUNDING,
    Answer,
    PartCase,
    PartSpec,
    copy_part,
    make_tokens,
    require_close,
    take_sample,
)
from adaptok.testing.host_checks import HOST_CHECKS
from adaptok.testing.models import WIDTH
from adaptok.testing.module_checks import MODULE_CHECKS
from adaptok.testing.partners import OwnFeatures
from adaptok.testing.report import ConformanceError, NotRun, Report, require, run_checks
from adaptok.tokens import Tokens


class RouterCase(PartCase):
    """A router that is checked (see `PartCase`)."""

    kind: ClassVar[Kind] = "router"

    def answer(self, part: nn.Module, tokens: Tokens, budget: Budget = HALF) -> Answer:
        """Return the keep probabilities."""
        return (part(tokens, Context()).keep_prob,)

    def stage(self, part: nn.Module) -> Stage:
        """Return a stage that has no weights but the router's."""
        assert isinstance(part, Router)
        return ChunkStage(part, HostChunker(), OwnFeatures(), "dc")


def check_shape(case: RouterCase) -> None:
    """It answers with a Routing of one probability per cell."""
    tokens = make_tokens(width=case.width)
    routing = case.make_filled()(tokens, Context())
    require(
        isinstance(routing, Routing),
        f"it answered with a {type(routing).__name__}: adaptok.Routing(keep_prob) is needed",
    )
    shape = tuple(routing.keep_prob.shape)
    needed = tuple(tokens.x.shape[:2])
    require(shape == needed, f"probabilities have the shape {shape}, one per cell is {needed}")


def check_range(case: RouterCase) -> None:
    """Probabilities are finite, lie in [0, 1], and differ where cells do."""
    (prob,) = case.answer_seeded(case.make_filled(), make_tokens(width=case.width))
    require(bool(prob.isfinite().all()), "a probability is no finite number")
    low, high = prob.min(), prob.max()
    require(low >= 0 and high <= 1, f"probabilities go from {low:g} to {high:g}")
    require(
        bool((prob.amax(1) > prob.amin(1)).all()),
        "all cells of a sample have the same probability, though they differ",
    )


def fill_contexts(b: int, width: int) -> Iterator[tuple[str, Context]]:
    """Give contexts as diffusion hosts fill them, and what is in them in words."""
    waves = torch.arange(b * width, dtype=torch.float32).view(b, width).sin()
    for low, high in ((100.0, 900.0), (0.1, 0.9)):
        steps = torch.linspace(high, low, b)
        kinds = (steps, steps.long()) if low >= 1 else (steps,)
        for step in kinds:
            said = f"with a condition and timesteps of {high:g} to {low:g} ({step.dtype})"
            yield said, Context(2.0 * waves, step, branch="cond", request="kit")


def check_context(case: RouterCase) -> None:
    """With a condition and a diffusion step for each sample it answers as well as without."""
    tokens = make_tokens(width=case.width)
    part = case.make_filled()
    draws = case.find_variation() != "none"
    for said, context in fill_contexts(tokens.num_samples, case.width):
        together = ask(part, tokens, context, said)
        for sample in () if draws else range(tokens.num_samples):
            assert context.condition is not None and context.timestep is not None  # noqa: PT018
            own = replace(
                context,
                condition=context.condition[sample : sample + 1],
                timestep=context.timestep[sample : sample + 1],
            )
            alone = ask(part, take_sample(tokens, sample), own, said)
            problem = f"{said}, sample {sample} has another answer beside others than alone"
            require_close((together[sample : sample + 1],), (alone,), ROUNDING, problem)


def ask(part: nn.Module, tokens: Tokens, context: Context, said: str) -> Tensor:
    """Return the probabilities of a router in a context; what is wrong with them is an error."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            # a copy, so that nothing is kept from call to call
            prob: Tensor = copy_part(part)(tokens, context).keep_prob
    except Exception as error:  # the message of others seldom says that a step came
        text = f"{type(error).__name__}: {error}"
        raise ConformanceError(f"{said} it fails: {text:.200}") from error
    shape, needed = tuple(prob.shape), tuple(tokens.x.shape[:2])
    require(shape == needed, f"{said} probabilities have the shape {shape}, not {needed}")
    require(bool(prob.isfinite().all()), f"{said} a probability is no finite number")
    low, high = prob.min(), prob.max()
    require(low >= 0 and high <= 1, f"{said} probabilities go from {low:g} to {high:g}")
    return prob


def check_starts_full(case: RouterCase) -> None:
    """A router that says `starts_full` keeps every cell while it is fresh."""
    part = case.make()
    assert isinstance(part, Router)
    if not part.starts_full:
        raise NotRun("starts_full = False")
    mask = part(make_tokens(width=case.width), Context()).natural_mask
    require(mask is not None, "starts_full = True needs a threshold")
    kept = int(mask.sum())
    require(kept == mask.numel(), f"a fresh one keeps {kept} of {mask.numel()} cells")


def check_gradient(case: RouterCase) -> None:
    """In training, its probabilities have a gradient to its weights."""
    part = case.make_filled().train()
    if not case.has_weights(part):
        raise NotRun("it has no weights to train")
    (prob,) = case.answer(part, make_tokens(width=case.width))
    require(prob.requires_grad, "keep_prob has no gradient: do not detach or round it")
    weights = torch.randn(prob.shape, generator=torch.Generator().manual_seed(0))
    (prob.float() * weights).sum().backward()
    require_gradients(part)


def require_gradients(part: nn.Module) -> None:
    """Raise a `ConformanceError` unless gradients are finite, reach all weights, and are not 0."""
    named = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
    left_out = [name for name, p in named if p.grad is None]
    require(not left_out, f"no gradient reaches {', '.join(left_out)}")
    gradients = [p.grad for _, p in named if p.grad is not None]
    require(all(bool(g.isfinite().all()) for g in gradients), "a gradient is not finite")
    require(any(bool(g.any()) for g in gradients), "all gradients are zero")


ROUTER_CHECKS = (
    check_shape,
    check_range,
    check_context,
    check_starts_full,
    check_gradient,
    *MODULE_CHECKS,
    *HOST_CHECKS,
)


def check_router(
    part: PartSpec,
    *,
    width: int = WIDTH,
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Check whether a router does what `adaptok.wrap` and its user rely on.

    Args:
        part: a registered name, a mapping with options, a class, a function that makes a router,
            or an instance, of which copies are checked. A parameter called `width` is filled.
        width: features of a token, where an instance has weights of another width.
        skip: names of checks that are not run, and why.
        only: names of the only checks to run.

    Returns:
        The report; print it, or `report.raise_failed()`.

    Raises:
        ConfigError: the part is no router, or there is no check of a name.
        UnknownNameError: there is no router of that name.

    Example:
        >>> check_router("norm", only=["shape", "range", "gradient", "batch"])
        router 'norm': 3 passed, 0 failed, 1 not run
        shape     passed   It answers with a Routing of one probability per cell
        range     passed   Probabilities are finite, lie in [0, 1], and differ where cells do
        gradient  not run  it has no weights to train
        batch     passed   A sample's answer is the same alone and beside others
    """
    case = RouterCase(part, width)
    return run_checks(case.title, ROUTER_CHECKS, case, skip, only)
