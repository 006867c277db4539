"""What ToMe takes from data: a threshold that keeps a share, or how many merge at each block."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok import Budget, Moment
from adaptok.calibrated import CalibrationRecord, Fitted, RunBatch, check_share, read_wanted
from adaptok.errors import ConfigError, DataError
from adaptok_merge.matching import match_alternately
from adaptok_merge.rates import Rates, count_left, list_rates

if TYPE_CHECKING:
    from adaptok_merge.tome import ToMe

COARSE = (-1.0, *(math.cos(math.pi * step / 16) for step in range(8, 0, -1)), 1.0)
FINER = 8  # halvings of the step between two of them, at the share that is wanted
NEAR = math.pi / 16 / 2**FINER  # angle between what is tried there
JUMP = 0.1  # share of the cells that so small a change may matter
Numbers = dict[str, tuple[float, ...]]


def plan_merging(stage: "ToMe", wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what is fitted: a threshold, or one number for each block.

    Args:
        stage: the stage.
        wanted: `fit`: `"threshold"`, or `"r"`; None: a threshold where a share is wanted or the
            stage has one. `keep`: the mean share of the cells to leave; with `"r"` None leaves as
            many as now.

    Returns:
        The plan; None for a threshold without a share.

    Raises:
        ConfigError: a wish is out of range.
    """
    plan = read_wanted(stage.name, wanted, {"fit": None, "keep": None})
    keep, fit = plan["keep"], plan["fit"]
    if fit is None:
        fit = "threshold" if keep is not None or stage.threshold is not None else "r"
    if fit not in ("threshold", "r"):
        raise ConfigError(f"fit of {stage.name!r} is 'threshold' or 'r', got {fit!r}")
    if keep is not None:
        check_share("keep", keep)
    if fit == "threshold" and keep is None:
        if wanted:
            raise ConfigError("a threshold is fitted to a share of the cells: give keep=, too")
        return None
    return {"fit": fit, "keep": keep, "rates": stage.rates}


def measure_merging(stage: "ToMe", run: RunBatch, wanted: Mapping[str, Any]) -> list[Numbers]:
    """Measure one batch (see `Calibrated.measure_batch`)."""
    if wanted["fit"] == "threshold":
        return measure_shares(stage, run, wanted["keep"])
    return measure_cosines(stage, run, wanted["rates"])


def measure_shares(stage: "ToMe", run: RunBatch, keep: float) -> list[Numbers]:
    """Return which share of the cells thresholds leave to each sample.

    A coarse walk over all cosines, and halvings where the mean share is the wanted one.
    """
    seen: dict[float, tuple[float, ...]] = {}

    def try_threshold(threshold: float) -> float:
        with merging_by(stage, None, threshold):
            seen[threshold] = run().kept[stage.name]
        return sum(seen[threshold]) / len(seen[threshold])

    means = [try_threshold(threshold) for threshold in COARSE]
    place = next((i for i, mean in enumerate(means) if mean >= keep), len(means) - 1)
    low, high = COARSE[max(0, place - 1)], COARSE[place]
    for _ in range(FINER):
        middle = math.cos((math.acos(low) + math.acos(high)) / 2)
        if try_threshold(middle) >= keep:
            high = middle
        else:
            low = middle
    thresholds = tuple(sorted(seen))
    return [
        {
            "threshold": thresholds,
            "kept": tuple(seen[threshold][sample] for threshold in thresholds),
        }
        for sample in range(len(seen[thresholds[0]]))
    ]


def measure_cosines(stage: "ToMe", run: RunBatch, rates: Rates) -> list[Numbers]:
    """Return how alike the pairs at each block are, and how many cells each call had."""
    stage.watching = []
    try:
        with merging_by(stage, rates, None):
            samples = run().samples
        found: list[dict[str, list[float]]] = [{"cells": []} for _ in range(samples)]
        for moment in stage.watching:
            part = moment.call.part
            b = moment.sizes.shape[0]
            numbers = list(range(b)) if part is None else part.samples.tolist()
            best = match_alternately(read_metric(moment), moment.call.start).best.tolist()
            for number, cosines in zip(numbers, best, strict=True):
                row = found[number]
                if moment.step == 0:
                    row["cells"].append(float(moment.owner.shape[1]))
                row.setdefault(f"block{moment.step}", []).extend(cosines)
    finally:
        stage.watching = None
    return [{name: tuple(values) for name, values in row.items()} for row in found]


def read_metric(moment: Moment) -> Float[Tensor, "b m e"]:
    """Return what tells how alike tokens are."""
    return moment.x if moment.keys is None else moment.keys.detach().float().mean(1)


@contextmanager
def merging_by(stage: "ToMe", r: Rates | None, threshold: float | None) -> Iterator[None]:
    """Let a stage merge by a number or a threshold for a while, whatever budget is set."""
    before = stage.read_settings()
    budget, uncond = stage.budget_setting, stage.uncond_setting
    stage.take_budget(Budget(), None)
    try:
        stage.change_merging(r, threshold)
        yield
    finally:
        stage.change_merging(before["r"], before["threshold"])
        stage.take_budget(budget, uncond)


def fit_merging(
    chosen: CalibrationRecord, held_out: CalibrationRecord, wanted: Mapping[str, Any]
) -> Fitted:
    """Fit a threshold or numbers (see `Calibrated.fit_settings`)."""
    if wanted["fit"] == "threshold":
        return fit_threshold(chosen, held_out, wanted["keep"])
    return fit_rates(chosen, held_out, wanted)


def fit_threshold(chosen: CalibrationRecord, held_out: CalibrationRecord, keep: float) -> Fitted:
    """Find the threshold that leaves a share of the cells on average.

    Raises:
        DataError: no threshold leaves so few, or so many.
    """
    least = mean_share(chosen, -1.0)
    if least > keep:
        raise DataError(
            f"ToMe leaves {least:.3f} of the cells even where everything merges that can, and "
            f"keep={keep:g} is wanted: give a larger share"
        )
    most = mean_share(chosen, 1.0)
    if most < keep:
        raise DataError(
            f"ToMe leaves {most:.3f} of the cells even if it merges only tokens that are equal, "
            f"and keep={keep:g} is wanted: give a smaller share, or fit r ('fit': 'r')"
        )
    wide, narrow = math.pi, 0.0  # as angles: cosines crowd near 1
    for _ in range(50):
        middle = (wide + narrow) / 2
        if mean_share(chosen, math.cos(middle)) >= keep:
            narrow = middle
        else:
            wide = middle
    angle = (wide + narrow) / 2
    threshold = math.cos(angle)
    low, high = (
        mean_share(chosen, math.cos(edge))
        for edge in (min(math.pi, angle + NEAR), max(0.0, angle - NEAR))
    )
    if high - low > JUMP:
        raise DataError(
            f"ToMe leaves {low:.3f} of the cells just below a cosine of {threshold:.6g}, and "
            f"{high:.3f} just above: no threshold leaves keep={keep:g}. Fit r ('fit': 'r')"
        )
    return Fitted(
        {"threshold": threshold, "r": None},
        {"kept": mean_share(chosen, threshold), "kept_held_out": mean_share(held_out, threshold)},
    )


def mean_share(record: CalibrationRecord, threshold: float) -> float:
    """Return the mean share that a threshold leaves, straight lines between what was tried."""
    shares = []
    for row in record.rows.values():
        tried, kept = row["threshold"], row["kept"]
        after = next((i for i, value in enumerate(tried) if value >= threshold), len(tried) - 1)
        before = max(0, after - 1)
        low, high = tried[before], tried[after]
        share = 1.0 if high == low else min(1.0, (threshold - low) / (high - low))
        shares.append(kept[before] + share * (kept[after] - kept[before]))
    return sum(shares) / len(shares)


def fit_rates(
    chosen: CalibrationRecord, held_out: CalibrationRecord, wanted: Mapping[str, Any]
) -> Fitted:
    """Merge at each block as many as there are pairs above one cosine, as many as wanted in all.

    Raises:
        DataError: samples have other numbers of cells, so that one list does not fit.
    """
    sizes = {cells for record in (chosen, held_out) for cells in record.values("cells").tolist()}
    if len(sizes) != 1:
        raise DataError(
            f"a list of r is for one number of cells, and samples have {sorted(sizes)}: calibrate "
            "on inputs of one shape"
        )
    n = int(sizes.pop())
    blocks = len(next(iter(chosen.rows.values()))) - 1
    even = list_rates(wanted["rates"], blocks)
    final = count_left(even, n) if wanted["keep"] is None else max(1, round(wanted["keep"] * n))
    cosine = find_cosine(chosen, blocks, n - final)
    rates = share_out(n, n - final, count_above(chosen, blocks, cosine))
    return Fitted(
        {"threshold": None, "r": list(rates)},
        {
            "cosine": cosine,
            "merged": n - final,
            "above_held_out": sum(count_above(held_out, blocks, cosine)),
            "alike_held_out": mean_cosine(held_out, rates),
            "alike_before": mean_cosine(held_out, even),
        },
    )


def find_cosine(record: CalibrationRecord, blocks: int, total: int) -> float:
    """Return the cosine above which there are so many pairs in a call, over all blocks."""
    pooled = torch.cat([record.values(f"block{block}") for block in range(blocks)])
    calls = len(record.values("cells"))
    place = min(len(pooled) - 1, max(0, total * calls - 1))
    return float(pooled.sort(descending=True).values[place])


def count_above(record: CalibrationRecord, blocks: int, cosine: float) -> list[float]:
    """Return how many pairs of a call are at least so alike, block by block."""
    calls = len(record.values("cells"))
    found = (record.values(f"block{block}") for block in range(blocks))
    return [float((values >= cosine).sum()) / calls for values in found]


def mean_cosine(record: CalibrationRecord, rates: Sequence[int]) -> float | None:
    """Return how alike the pairs are that merge, the most alike of each block."""
    calls = len(record.values("cells"))
    best = [
        record.values(f"block{block}").sort(descending=True).values[: rate * calls]
        for block, rate in enumerate(rates)
    ]
    joined = torch.cat(best)
    return float(joined.mean()) if len(joined) else None


def share_out(n: int, total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Return whole numbers in proportion to weights, of which each block can merge its own.

    A block merges at most half of the tokens that are left to it.

    Args:
        n: tokens in front of the first block.
        total: how many merge in all.
        weights: of the blocks.

    Returns:
        A number for each block.

    Raises:
        DataError: so many cannot merge in so many blocks.

    Example:
        >>> share_out(24, 12, (1.0, 2.0, 0.0)), share_out(24, 16, (1.0, 0.0, 0.0))
        ((4, 8, 0), (12, 4, 0))
    """
    whole = sum(weights) or float(len(weights))
    shares = [weight * total / whole if sum(weights) else total / whole for weight in weights]
    rates: list[int] = []
    owed, left = 0.0, n
    for share in shares:
        owed += share
        rate = min(math.floor(owed + 0.5), left // 2)
        rates.append(rate)
        owed, left = owed - rate, left - rate
    for block in range(len(rates) - 1, -1, -1):  # what the last blocks could not take
        while sum(rates) < total and fits(
            n, [*rates[:block], rates[block] + 1, *rates[block + 1 :]]
        ):
            rates[block] += 1
    if sum(rates) != total:
        raise DataError(
            f"{total} of {n} tokens are to merge, and {len(rates)} blocks, which merge at most "
            f"half each, reach {sum(rates)}: give a larger keep="
        )
    return tuple(rates)


def fits(n: int, rates: Sequence[int]) -> bool:
    """Say whether no block is to merge more than half of what is left to it."""
    left = n
    for rate in rates:
        if rate > left // 2:
            return False
        left -= rate
    return True
