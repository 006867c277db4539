"""When an early answer counts as the same as the full one, and how far it is from it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from adaptok.errors import ConfigError, DataError, NotWrappedError
from adaptok_exit.confidence import ConfidenceExit

Compared = Literal["classes", "features"]
SIMILARITY = 0.95  # cosine above which features count as the same
Batch = Tensor | Mapping[str, Any]


def find_exit(model: nn.Module) -> ConfidenceExit:
    """Return the exit stage of a wrapped model, or raise a `NotWrappedError`."""
    found = next((m for m in model.modules() if isinstance(m, ConfidenceExit)), None)
    if found is None:
        raise NotWrappedError(
            f"{type(model).__name__} has no exits: call adaptok.wrap(model, stack=['exit']) first"
        )
    return found


def call_model(model: nn.Module, batch: Batch) -> Float[Tensor, "b k"]:
    """Call a model and return its classes or features.

    Args:
        model: a host.
        batch: images, or all arguments by name.

    Returns:
        The first tensor of what it returned.

    Raises:
        ConfigError: the batch has another form, or the model returns no `(b k)`.
    """
    if isinstance(batch, Tensor):
        out = model(batch)
    elif isinstance(batch, Mapping):
        out = model(**batch)
    else:
        raise ConfigError(
            f"a batch is a tensor of images or a mapping of arguments, got a "
            f"{type(batch).__name__}: leave labels out, as in (images for images, _ in loader)"
        )
    return read_answer(type(model).__name__, out)


def read_answer(name: str, out: Any) -> Float[Tensor, "b k"]:  # noqa: ANN401
    """Return the classes or features in what a model returned.

    Args:
        name: who asks, or who answered.
        out: the first tensor of it counts.

    Raises:
        ConfigError: there is no `(b k)`.
    """
    found = out
    while not isinstance(found, Tensor):
        items = list(found.values()) if isinstance(found, Mapping) else list(found)
        found = items[0]
    if found.ndim != 2:
        raise ConfigError(
            f"one row of classes or features per image is compared, and {name} "
            f"returned {tuple(found.shape)}: give a model that ends in such a row"
        )
    return found


def check_numbers(batch: Batch, out: Tensor, place: int) -> None:
    """Raise a `DataError` if a batch, or what a model made of it, holds NaN or infinity."""
    given = [batch] if isinstance(batch, Tensor) else list(batch.values())
    floats = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    if not all(bool(x.isfinite().all()) for x in floats):
        raise DataError(
            f"batch {place} holds NaN or infinity, from which nothing can be learnt: leave it out, "
            "or mend it"
        )
    if not bool(out.isfinite().all()):
        raise DataError(
            f"the model answers batch {place} with NaN or infinity, from which nothing can be "
            "learnt: leave it out, or mend the model"
        )


def compare(
    out: Float[Tensor, "b k"],
    full: Float[Tensor, "b k"],
    compared: Compared = "classes",
    similarity: float = SIMILARITY,
) -> Bool[Tensor, " b"]:
    """Say for each sample whether an early answer is the same as the full one.

    Args:
        out: of the early exit.
        full: of all blocks.
        compared: `"classes"`: the largest entry is the same; `"features"`: the cosine is large.
        similarity: what large means.

    Returns:
        One truth value per sample.

    Example:
        >>> import torch
        >>> compare(torch.tensor([[1.0, 2], [5, 1]]), torch.tensor([[0.0, 1], [1, 5]]))
        tensor([ True, False])
    """
    if compared == "classes":
        return out.argmax(1) == full.argmax(1)
    return F.cosine_similarity(out.float(), full.float()) >= similarity


def distance_between(
    out: Float[Tensor, "b k"], full: Float[Tensor, "b k"], compared: Compared = "classes"
) -> Float[Tensor, ""]:
    """Return how far early answers are from full ones, to train by.

    Args:
        out: of the early exit.
        full: of all blocks; it gets no gradient.
        compared: `"classes"`: Kullback-Leibler divergence; `"features"`: one minus the cosine.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> distance_between(x, x), distance_between(x, -x, "features")
        (tensor(0.), tensor(2.))
    """
    out, full = out.float(), full.detach().float()
    if compared == "features":
        return (1.0 - F.cosine_similarity(out, full)).clamp(min=0.0).mean()
    return F.kl_div(
        F.log_softmax(out, dim=-1),
        F.log_softmax(full, dim=-1),
        reduction="batchmean",
        log_target=True,
    )


@contextmanager
def frozen(model: nn.Module, trained: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, with gradients for one part of it only, and put all back after."""
    modes = {module: module.training for module in model.modules()}
    needed = {p: p.requires_grad for p in model.parameters()}
    own = set(trained.parameters())
    model.eval()
    for parameter in needed:
        parameter.requires_grad_(parameter in own)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, wanted in needed.items():
            parameter.requires_grad_(wanted)


def check_compared(compared: str) -> None:
    """Raise a `ConfigError` unless it is known how to compare answers."""
    if compared not in ("classes", "features"):
        raise ConfigError(f"compared is 'classes' or 'features', got {compared!r}")
