"""Tuning: the new parts of a wrapped model learn to give what the model gives without them."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptok.blocks import PARTS
from adaptok.errors import AdaptokError, ConfigError
from adaptok.routing import Router
from adaptok.tracing import require_adaptive
from adaptok.train.config import open_stream
from adaptok.train.tuning_loss import (
    Batches,
    Inputs,
    choose_batch,
    give_gradients,
    measure_parts,
)

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
GRADIENT_CLIP = 1.0

OnTune = Callable[["TuneStep"], None]


@dataclass(frozen=True, slots=True)
class TuneStep:
    """One step of a tuning.

    Args:
        step: its number, from 1.
        steps: how many there are.
        keep: fraction of the cells that it kept.
        loss: what it was trained on.
        parts: the terms of the loss by name: `output` and `tokens` (squared distance to the plain
            model, as a share of the plain model's own spread), `ranking` (1 minus the correlation
            of what the router says of dropped cells with how wrong they came out), and what the
            stages add, such as `ratio`.
    """

    step: int
    steps: int
    keep: float
    loss: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TuneReport:
    """How a tuning went.

    Args:
        steps: all steps in order.
        trained: names of the weights that were trained.
        seconds: duration.
    """

    steps: tuple[TuneStep, ...]
    trained: tuple[str, ...]
    seconds: float

    def mean(self, part: str = "output", first: bool = False) -> float:
        """Return the mean of a term of the loss over the last tenth of the steps, or the first."""
        count = max(1, len(self.steps) // 10)
        chosen = self.steps[:count] if first else self.steps[-count:]
        return sum(step.parts[part] for step in chosen) / count


def tune(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    lr: float = 1e-3,
    budgets: Sequence[float] = BUDGETS,
    ratio_weight: float = 0.03,
    token_weight: float = 0.5,
    ranking_weight: float = 1.0,
    train_host: bool = False,
    host_lr: float = 5e-6,
    seed: int = 0,
    on_step: OnTune | None = None,
) -> TuneReport:
    """Train router and dechunker of a wrapped model against its own plain outputs, in place.

    The teacher is the same model with its stages passed over (`adaptok.tracing.plain`), and
    nothing is copied; if the host is trained too, the teacher is a copy made at the start. Each
    step keeps another share of the cells. Dechunkers (and the host) learn from the distance to
    the teacher. A router learns to rank the cells by how wrong they come out where they are
    dropped, since the distance itself has a gradient for tokens that are there only. Dropout
    and the like are off; train modes and `requires_grad` are as before afterwards.

    Args:
        model: a wrapped model.
        batches: what the model is called with: a sequence, gone through again and again, or a
            function of the step (from 0). Each is a tensor, a tuple of arguments, a mapping of
            arguments by name, or `adaptok.hosts.HostInputs`; tensors may lie on any device.
        steps: optimiser steps.
        lr: learning rate of AdamW at the start; it falls to zero along half a cosine.
        budgets: fractions of the cells to keep; one is drawn for each step from (seed, step).
        ratio_weight: weight of the ratio loss, where the router has a threshold.
        token_weight: weight of the distance between the tokens behind the blocks, each brought
            to mean 0 and variance 1. It teaches the cells of models that give out a class only.
        ranking_weight: weight of what ranks the cells; 0 leaves the ranking to the router's start.
        train_host: train the host as well, which models need whose output is a class token.
        host_lr: learning rate of the host at the start.
        seed: of the drawn budgets.
        on_step: called after each step.

    Returns:
        What each step measured.

    Raises:
        NotWrappedError: the model is not wrapped.
        ConfigError: there is nothing to train, or an option is out of range.
        AdaptokError: the loss is no longer finite. The weights are then as before.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> report = tune(vit, [torch.randn(2, 3, 32, 48)], steps=2)
        >>> len(report.steps), sorted(report.steps[0].parts)
        (2, ['output', 'ranking', 'ratio', 'tokens'])

    Paper: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    check_options(steps, lr, budgets)
    if not callable(batches) and not len(batches):
        raise ConfigError("there is no batch to learn from: give at least one")
    trained = find_trained(model, train_host)
    routers = find_routers(model, trained)
    own = find_trained(model, False) if has_own(model) else {}
    host = [weight for name, weight in trained.items() if name not in own]
    teacher = copy.deepcopy(model) if train_host else model
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    groups = [{"params": list(own.values()), "peak": lr}, {"params": host, "peak": host_lr}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, weight_decay=0.0)
    weights = {"tokens": token_weight, "ratio": ratio_weight, "ranking": ranking_weight}
    done: list[TuneStep] = []
    started = time.monotonic()
    try:
        with only_training(model, trained), only_training(teacher, {}) if train_host else quiet():
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * decay_at(step, steps)
                keep = draw_budget(budgets, seed, step)
                parts = measure_parts(model, teacher, choose_batch(batches, step, model), keep)
                loss = give_gradients(parts, weights, trained, routers)
                norm = nn.utils.clip_grad_norm_(trained.values(), GRADIENT_CLIP)
                check_finite(loss, norm, step, lr)
                optimizer.step()
                numbers = {name: float(part.detach()) for name, part in parts.items()}
                done.append(TuneStep(step + 1, steps, keep, float(loss), numbers))
                if on_step is not None:
                    on_step(done[-1])
    except KeyboardInterrupt:
        raise
    except BaseException:
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(before[name])
        raise
    finally:
        optimizer.zero_grad()
    return TuneReport(tuple(done), tuple(trained), time.monotonic() - started)


def measure_distance(model: nn.Module, batches: Sequence[Inputs], keep: float) -> float:
    """Say how far the outputs of a wrapped model are from its plain ones.

    Args:
        model: a wrapped model.
        batches: what it is called with, as `tune` takes it.
        keep: fraction of the cells to keep.

    Returns:
        The mean squared distance, as a share of the spread of the plain outputs of a batch: 0 is
        equal, and 1 as far away as always giving the mean.

    Raises:
        NotWrappedError: the model is not wrapped.
        ConfigError: there are no batches.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), chunker="dc", budget=0.5)
        >>> measure_distance(vit, [torch.randn(2, 3, 32, 48)], keep=1.0) < 1e-9
        True
    """
    if not len(batches):
        raise ConfigError("a distance needs at least one batch, got none")
    total = 0.0
    with only_training(model, {}), torch.no_grad():
        for place in range(len(batches)):
            inputs = choose_batch(batches, place, model)
            total += float(measure_parts(model, model, inputs, keep)["output"])
    return total / len(batches)


def check_options(steps: int, lr: float, budgets: Sequence[float]) -> None:
    """Raise a `ConfigError` unless the options of a tuning are in range."""
    if steps < 1:
        raise ConfigError(f"steps is at least 1, got {steps}")
    if not 0 < lr < math.inf:
        raise ConfigError(f"lr is a positive number, got {lr}")
    if not budgets or not all(0 < keep <= 1 for keep in budgets):
        raise ConfigError(
            f"budgets are fractions of the cells in (0, 1], at least one, got {list(budgets)}"
        )


def find_trained(model: nn.Module, train_host: bool) -> dict[str, nn.Parameter]:
    """Return the weights that a tuning trains, by name (see `tune`)."""
    own = {id(p) for p in require_adaptive(model).get_submodule(PARTS).parameters()}
    trained = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and (train_host or id(p) in own)
    }
    if not trained:
        raise ConfigError(
            "there is nothing to train: the stages of this wrap have no weights of their own, or "
            'frozen ones. Wrap with router="dc" or dechunker="dc", or give train_host=True'
        )
    return trained


def has_own(model: nn.Module) -> bool:
    """Say whether the stages of a wrapped model have weights to train."""
    parts = require_adaptive(model).get_submodule(PARTS)
    return any(weight.requires_grad for weight in parts.parameters())


def find_routers(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return those of some weights that belong to routers."""
    parts = require_adaptive(model).get_submodule(PARTS).modules()
    own = {id(p) for part in parts if isinstance(part, Router) for p in part.parameters()}
    return {name: weight for name, weight in trained.items() if id(weight) in own}


def draw_budget(budgets: Sequence[float], seed: int, step: int) -> float:
    """Return the fraction of the cells that a step keeps, drawn from seed and step."""
    draw = open_stream("drop", seed, step).random()
    return budgets[math.floor(draw * len(budgets))]


def decay_at(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: half a cosine from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * step / steps))


def check_finite(loss: Tensor, norm: Tensor, step: int, lr: float) -> None:
    """Raise an `AdaptokError` unless a step may change the weights."""
    if not bool(loss.isfinite() & norm.isfinite()):
        raise AdaptokError(
            f"the loss or its gradient is not a finite number at step {step + 1}: take a smaller "
            f"learning rate than {lr:g}; the weights are as they were before"
        )


def quiet() -> nullcontext[None]:
    """Return a context that does nothing."""
    return nullcontext()


@contextmanager
def only_training(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let only some weights of a model learn, with dropout off; all is as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    wanted = {id(parameter) for parameter in trained.values()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    for parameter in flags:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
