"""Features, tokens, operations and time of a wrapped model, beside its unwrapped twin."""

import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import adaptok

from .models import FeatureModel

Pixels = npt.NDArray[np.uint8]

TWIN_EVERY = 4  # batches between two timings of the unwrapped twin


@dataclass(frozen=True, slots=True)
class RouterCase:
    """A router of the table.

    Args:
        name: what the table calls it.
        router: what `adaptok.wrap` gets; None is the default of the preset.
        seeds: one pass over the queries for each; figures are means over them.
    """

    name: str
    router: str | Mapping[str, object] | None
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What one router did at one budget.

    Args:
        features: of the queries, for each seed, `(n d)`.
        tokens: tokens that the blocks of the span computed for an image, prefix included.
        flops: operations of one image, as torch counts them.
        ms: median time of an image, in milliseconds.
    """

    features: tuple[Float[Tensor, "n d"], ...]
    tokens: float
    flops: float
    ms: float


@dataclass(frozen=True, slots=True, eq=False)
class RouterRuns:
    """What one router did at all budgets.

    Args:
        by_keep: one run per share of kept cells.
        unwrapped_ms: median time of an image in the unwrapped twin, in turn with the others.
        unwrapped_flops: operations of one image in it.
    """

    by_keep: Mapping[float, Run]
    unwrapped_ms: float
    unwrapped_flops: float


def extract_features(host: FeatureModel, pictures: Pixels, batch: int) -> Float[Tensor, "n d"]:
    """Return the features of pictures by a model as it is."""
    with torch.inference_mode():
        parts = [host.extract(host.prepare(part)) for part in split_batches(pictures, batch)]
    return torch.cat(parts).clone()


def run_router(
    host: FeatureModel,
    pictures: Pixels,
    case: RouterCase,
    keeps: Sequence[float],
    span: tuple[int, int] | None,
    batch: int,
) -> RouterRuns:
    """Wrap a model with a router, take its features at several budgets, and unwrap it.

    Budgets take turns batch by batch, and so does an unwrapped twin every few batches, so that
    what the machine does meanwhile hits all alike. Times include the router.

    Args:
        host: the model.
        pictures: the queries.
        case: the router.
        keeps: shares of the cells to keep.
        span: blocks that run on few tokens; None takes all.
        batch: pictures of a batch.

    Returns:
        Features and costs.
    """
    twin = copy.copy(host)
    twin.model = copy.deepcopy(host.model)
    torch.manual_seed(0)
    adaptok.wrap(host.model, chunker="dc", router=case.router, span=span, budget=keeps[0])
    features: dict[float, list[Tensor]] = {keep: [] for keep in keeps}
    times: dict[float | None, list[float]] = {None: [], **{keep: [] for keep in keeps}}
    try:
        for seed in case.seeds:
            torch.manual_seed(seed)
            parts: dict[float, list[Tensor]] = {keep: [] for keep in keeps}
            for index, part in enumerate(split_batches(pictures, batch)):
                images = host.prepare(part)
                full = len(part) == batch or len(pictures) < batch
                if index % TWIN_EVERY == 0 and full:
                    times[None].append(time_features(twin, images)[1])
                for keep in keeps:
                    with adaptok.budget(host.model, keep=keep):
                        found, ms = time_features(host, images)
                    parts[keep].append(found)
                    if full:
                        times[keep].append(ms)
            for keep in keeps:
                features[keep].append(torch.cat(parts[keep]))
        images = host.prepare(pictures[:batch])
        by_keep = {}
        for keep in keeps:
            with adaptok.budget(host.model, keep=keep):
                tokens, flops = count_work(host, images)
            by_keep[keep] = Run(
                tuple(features[keep]), tokens, flops, statistics.median(times[keep])
            )
    finally:
        adaptok.unwrap(host.model)
    return RouterRuns(by_keep, statistics.median(times[None]), count_flops(twin, images))


def time_features(
    host: FeatureModel, images: Float[Tensor, "b 3 h w"]
) -> tuple[Float[Tensor, "b d"], float]:
    """Return the features of a batch and the milliseconds that one image took."""
    with torch.inference_mode():
        start = time.perf_counter()
        found = host.extract(images)
        ms = 1e3 * (time.perf_counter() - start) / len(images)
    return found.clone(), ms


def count_work(host: FeatureModel, images: Float[Tensor, "b 3 h w"]) -> tuple[float, float]:
    """Return the tokens that a wrapped model computes for an image, and the operations."""
    with torch.no_grad(), adaptok.trace(host.model) as seen:
        host.extract(images)
    kept = seen.steps[0].kept.float().mean()
    return float(kept) + host.prefix, count_flops(host, images)


def count_flops(host: FeatureModel, images: Float[Tensor, "b 3 h w"]) -> float:
    """Return the operations of one image by torch's counter: matrix products and attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        host.extract(images)
    return counter.get_total_flops() / len(images)


def split_batches(pictures: Pixels, batch: int) -> Iterator[Pixels]:
    """Yield pictures in batches; the last one may be smaller."""
    for start in range(0, len(pictures), batch):
        yield pictures[start : start + batch]
